"""Scripts in an interpreter of their own, as users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def run_script(path: Path, code: str, *, timeout_s: float = 120, **environment: str) -> str:
    """Writes `code` to `path`, runs it as `python path`, and returns its standard output.

    It must end with exit code 0, and leave no traceback on its error output.
    """
    path.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, path],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def python_path() -> str:
    """A search path on which this checkout's package comes first."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
