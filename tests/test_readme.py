"""The README's code runs as it is printed there, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"^```python\n(.*?)^```", _README, re.MULTILINE | re.DOTALL)


def test_readme_has_code() -> None:
    assert _BLOCKS
    assert "PoolDataset" in _BLOCKS[0]


@pytest.mark.parametrize("block", _BLOCKS, ids=[f"block{number}" for number in range(len(_BLOCKS))])
def test_readme_code_runs(block: str, tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(block, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert done.stdout.count("Epoch 2/2") == block.count(".fit(")


def test_readme_names_what_exists() -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", _README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for example in re.findall(r"^\| `(\w+\.py)`", _README, re.MULTILINE):
        assert (_ROOT / "examples" / example).is_file(), example
