"""Scripts in an interpreter of their own, as users run them; and checks that several files make."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_ROOT = Path(__file__).resolve().parents[1]

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="an export needs TensorFlow, which is not installed"
)


def run(
    arguments: Sequence[object],
    environment: Mapping[str, str],
    *,
    timeout_s: float = 120,
    exit_code: int = 0,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program, with this checkout's package on Python's path; it must end with that exit code."""
    done = subprocess.run(
        [*map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == exit_code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_script(path: Path, code: str, *, timeout_s: float = 120, **environment: str) -> str:
    """Writes `code` to `path`, runs it as `python path`, and returns its standard output.

    It must end with exit code 0, and leave no traceback on its error output.
    """
    path.write_text(code, encoding="utf-8")
    done = run([sys.executable, path], environment, timeout_s=timeout_s, cwd=path.parent)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def lies_in_a_slot(address: int) -> bool:
    """Whether this is an address in the memory that workers write batches to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:keras_mp" in line:
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            if start <= address < stop:
                return True
    return False


def python_path() -> str:
    """A search path on which this checkout's package comes first."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


def assert_refused(make: Callable[[], Any], kind: type[Exception], texts: Sequence[str]) -> None:
    """Calls `make`, which must raise `kind` with all of `texts` in its message."""
    with pytest.raises(kind) as caught:
        make()
    for text in texts:
        assert text in str(caught.value)


def assert_alike(ours: Sequence[Any], theirs: Sequence[Any], tolerance: float = 0.0) -> None:
    """The same batches, of one array or of a tuple of arrays, but for `tolerance` in the numbers."""
    assert len(ours) == len(theirs)
    for batch, expected in zip(ours, theirs, strict=True):
        leaves, others = (batch, expected) if isinstance(expected, tuple) else ((batch,), (expected,))
        for leaf, other in zip(leaves, others, strict=True):
            assert leaf.dtype == other.dtype
            np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance)


def assert_same(one: Any, other: Any, flag: str) -> None:
    """The same nest of arrays and plain values; all arrays of `one` have the NumPy flag."""
    assert type(one) is type(other)
    if isinstance(other, np.ndarray):
        assert one.dtype == other.dtype
        assert getattr(one.flags, flag)
        np.testing.assert_array_equal(one, other)
    elif isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_same(one[key], other[key], flag)
    elif isinstance(other, list | tuple):
        for part, another in zip(one, other, strict=True):
            assert_same(part, another, flag)
    else:
        assert one == other
