"""Runs short programs in a process of their own: what must survive the training process cannot be seen from inside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_HEAD = """
import gc, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import keras_mp
from tests.faults.common import digests, harmed, undisturbed
from tests.faults.harm import Harm, Source
here = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
"""


def start(code: str, folder: Path, backend: str = "numpy", head: str = _HEAD) -> subprocess.Popen[str]:
    """Starts `code`, with the usual imports and `here`, its folder; stdout and stderr come through one pipe."""
    script = folder / "script.py"
    script.write_text(head + textwrap.dedent(code))
    return subprocess.Popen(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": str(_ROOT), "KERAS_BACKEND": backend},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120.0) -> tuple[int, str]:
    """Waits for the program: its exit code and what it said."""
    with process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            said += "\n(killed: it did not end)"
        except BaseException:  # the test's own time is up
            process.kill()
            raise
        return process.returncode, said


def run(code: str, folder: Path, backend: str = "numpy") -> str:
    """What the program said; it must end with exit code 0."""
    code_, said = finish(start(code, folder, backend))
    assert code_ == 0, said
    return said
