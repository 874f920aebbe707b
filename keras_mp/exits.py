"""The end of the process: before the interpreter is taken apart, nobody loads, and TensorFlow has left Python.

TensorFlow asks for batches from threads of its own. Python ends such a thread, in the middle of what it does, when it
wants the GIL while the interpreter is being finalised; TensorFlow's destructor of an iterator then waits for it for
ever. So, as long as Python lives, every dataset is closed, which wakes who waits for a batch and refuses who asks for
one, and the threads are given time to leave (P3). A call that comes later does no harm: TensorFlow turns it away as
soon as the interpreter says that it is finalised.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Protocol

_DEADLINE_S = 30.0  # user code that loads a batch in this process may have to finish first
_LOOK_S = 0.005
# Between one call and the next a thread is out of sight, in C++, for much less than this.
_QUIET_S = 0.05


class Closable(Protocol):
    """What can be closed: from any thread, more than once."""

    def close(self) -> None: ...


_datasets: weakref.WeakSet[Closable] = weakref.WeakSet()
_lock = threading.Lock()


def close_at_exit(dataset: Closable) -> None:
    """Has `dataset` closed when the process ends, if it is still there."""
    with _lock:
        _datasets.add(dataset)


def open_datasets() -> list[Closable]:
    """Those that load, or have loaded, and are still there."""
    with _lock:
        return list(_datasets)


def _end() -> None:
    datasets = open_datasets()
    with contextlib.ExitStack() as ends:  # the last first, and each of them, whatever the others raise
        if datasets and "tensorflow" in sys.modules:
            ends.callback(_wait_until_left)
        for dataset in datasets:
            ends.callback(dataset.close)


def _wait_until_left() -> None:
    """Returns when TensorFlow's threads have left Python and stayed out of it for a while."""
    deadline = time.monotonic() + _DEADLINE_S
    quiet_since: float | None = None
    while True:
        time.sleep(_LOOK_S)  # here the others get the GIL, those too that have been waiting for it to come in
        now = time.monotonic()
        inside = _frames_of_tensorflow()
        if not inside:
            quiet_since = quiet_since or now
            if now - quiet_since > _QUIET_S:
                return
        else:
            quiet_since = None
            if now > deadline:
                sys.stderr.write(
                    f"keras_mp: after {_DEADLINE_S:.0f} s a thread of TensorFlow's is still in Python code, so this "
                    f"process may not end. It is in {'; '.join(map(_where, inside))}\n"
                )
                return


def _frames_of_tensorflow() -> list[FrameType]:
    """Where in Python TensorFlow's native threads are now. A thread that Python started begins elsewhere."""
    return [frame for frame in sys._current_frames().values() if _module(_outermost(frame)) == "tensorflow"]


def _outermost(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _where(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})"


def _forget() -> None:
    """In a fork: the datasets are the parent's, and a thread that held the lock is not here to give it back."""
    global _datasets, _lock
    _datasets, _lock = weakref.WeakSet(), threading.Lock()


# Early, when this is imported, so that it comes late: at exit, who registered first is called last.
atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
