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

    With threads, each thread has one of its own. In the process that made it, its length is asked of an object that is
    closed again; only a dataset with `workers=0`, or threads, keeps one open there.

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
        self._opened: dict[tuple[int, int], Any] = {}
        weakref.finalize(self, _close_all, self._opened, close)  # also when the process ends

    def __call__(self) -> Any:
        """The object, opened for this process and thread."""
        place = (os.getpid(), threading.get_ident())
        if place not in self._opened:
            self._opened[place] = self._open_object(*self._arguments)
        return self._opened[place]

    def __getitem__(self, index: int) -> Any:
        return self()[index]

    def __len__(self) -> int:
        if self._length is None:
            if (os.getpid(), threading.get_ident()) in self._opened:
                self._length = length_of(self())
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

    def __getstate__(self) -> dict[str, Any]:
        names = ("_open_object", "_arguments", "_close", "_length")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened={})
        weakref.finalize(self, _close_all, self._opened, self._close)


def _close_all(opened: dict[tuple[int, int], Any], close: Callable[[Any], Any] | None) -> None:
    for process, thread in list(opened):
        held = opened.pop((process, thread))
        if process == os.getpid():  # a forked copy of the parent's is the parent's
            _close(held, close)


def _close(opened: Any, close: Callable[[Any], Any] | None) -> None:
    if close is not None:
        close(opened)
    elif callable(method := getattr(opened, "close", None)):
        method()
