"""What each worker opens for itself, such as a file or a connection, which cannot be sent to it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from keras_mp.checks import length_of


class PerWorker:
    """An object that each worker opens when it first needs it, and closes when it ends or the dataset is closed.

    Call it for the object: `database = keras_mp.PerWorker(sqlite3.connect, "samples.db")`, and in the transform
    `database().execute(...)`. Or give it as the source: `[i]` and `len()` are those of the object.

    With threads, each thread has one of its own, and closes it when it ends. In the process that made it, its length is
    asked of an object that is closed again; only a dataset with `workers=0`, or threads, keeps one open there.

    Args:
        open_object: what opens it; runs in the worker.
        *arguments: of that function.
        close: called with the object in the end; None: its method `close`, if it has one.

    Raises:
        TypeError: `open_object` or `close` cannot be called.
    """

    def __init__(
        self, open_object: Callable[..., Any], *arguments: Any, close: Callable[[Any], Any] | None = None
    ) -> None:
        if not callable(open_object):
            raise TypeError(
                f"open_object must be a function that opens something, got {open_object!r}; pass the function and its "
                "arguments: PerWorker(h5py.File, path)"
            )
        if close is not None and not callable(close):
            raise TypeError(f"close must be callable or None, got {close!r}")
        self._open_object = open_object
        self._arguments = arguments
        self._close = close
        self._length: int | None = None

    def __call__(self) -> Any:
        """The object, opened for this process and thread."""
        held = self._held
        if held is None:
            held = _of_this_thread()[self] = _Held(self._open_object(*self._arguments), self._close)
        return held.opened

    def __getitem__(self, index: int) -> Any:
        return self()[index]

    def __len__(self) -> int:
        if self._length is None:
            if (held := self._held) is not None:
                self._length = length_of(held.opened)
            else:
                opened = self._open_object(*self._arguments)
                try:
                    self._length = length_of(opened)
                finally:
                    _close(opened, self._close)
        return self._length

    def __repr__(self) -> str:
        name = getattr(self._open_object, "__qualname__", repr(self._open_object))
        return f"PerWorker({', '.join([name, *map(repr, self._arguments)])})"

    @property
    def _held(self) -> _Held | None:
        held = _of_this_thread().get(self)
        return held if held is not None and held.process == os.getpid() else None


class _Held:
    """An object that a thread has opened, to be closed when that ends, the `PerWorker` is gone or the process ends."""

    def __init__(self, opened: Any, close: Callable[[Any], Any] | None) -> None:
        self.opened = opened
        self.process = os.getpid()
        self.close = weakref.finalize(self, _close_there, opened, close, self.process, threading.get_ident())


_local = threading.local()


def _of_this_thread() -> weakref.WeakKeyDictionary[PerWorker, _Held]:
    opened: weakref.WeakKeyDictionary[PerWorker, _Held] = vars(_local).setdefault("opened", weakref.WeakKeyDictionary())
    return opened


def close_those_of_this_thread() -> None:
    """What a thread of ours does at its end: sooner than Python, and where `threading` still knows the thread."""
    for held in list(_of_this_thread().values()):
        held.close()


def _close_there(opened: Any, close: Callable[[Any], Any] | None, process: int, thread: int) -> None:
    if process != os.getpid():  # a forked copy of the parent's is the parent's
        return
    try:
        _close(opened, close)
    except Exception:  # what only its own thread may close, as a connection of sqlite3, closes as it is let go
        if thread == threading.get_ident():
            raise


def _close(opened: Any, close: Callable[[Any], Any] | None) -> None:
    if close is not None:
        close(opened)
    elif callable(method := getattr(opened, "close", None)):
        method()
