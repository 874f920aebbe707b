"""The code in the guides runs, from top to bottom, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import run_script

_DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("page", ["caching.md", "variable-lengths.md"])
def test_the_code_runs(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (_DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    run_script(tmp_path / "page.py", "\n\n".join(blocks))
