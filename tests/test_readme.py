"""The code of the README and of the guides runs as it is printed there, and the README's commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import run_script

_ROOT = Path(__file__).resolve().parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BLOCKS = _PYTHON.findall(_README)
# A page each of whose blocks is a script of its own, for another package.
_SOURCES = _PYTHON.findall((_ROOT / "docs" / "sources.md").read_text(encoding="utf-8"))
_GUIDES = [path for path in sorted((_ROOT / "docs").rglob("*.md")) if _PYTHON.search(path.read_text(encoding="utf-8"))]
_GUIDES.remove(_ROOT / "docs" / "sources.md")


def test_readme_has_code() -> None:
    assert _BLOCKS
    assert "PoolDataset" in _BLOCKS[0]


@pytest.mark.parametrize("block", _BLOCKS, ids=[f"block{number}" for number in range(len(_BLOCKS))])
def test_readme_code_runs(block: str, tmp_path: Path) -> None:
    output = _run(block, tmp_path)
    assert output.count("Epoch 2/2") == block.count(".fit(")


@pytest.mark.parametrize("path", _GUIDES, ids=lambda path: path.stem)
def test_the_code_of_a_guide_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    _run("\n".join(_PYTHON.findall(path.read_text(encoding="utf-8"))), tmp_path)


@pytest.mark.parametrize("block", _SOURCES, ids=lambda block: _imported(block)[0])
def test_each_block_of_the_page_on_sources_runs_by_itself(block: str, tmp_path: Path) -> None:
    _run(block, tmp_path)


def _imported(block: str) -> list[str]:
    """The packages that a block imports, but for keras_mp."""
    names = re.findall(r"^import ([a-z0-9]+)", block, re.MULTILINE)
    return [name for name in names if name not in ("keras_mp", "keras", "numpy")] or ["plain"]


def _run(code: str, folder: Path) -> str:
    """Its output; unless it names TensorFlow, on a backend that is imported sooner."""
    backend = "jax" if "fit(" in code else "numpy"
    if re.search("tensorflow|to_tf_dataset", code):
        backend = "tensorflow"
    return run_script(folder / "page.py", code, KERAS_BACKEND=backend)


def test_readme_names_what_exists() -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", _README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for example in re.findall(r"^\| `(\w+\.py)`", _README, re.MULTILINE):
        assert (_ROOT / "examples" / example).is_file(), example
