"""What runs in a worker that is not ours: it keeps the loaders that it was given, and loads batches with them.

A worker may be a process with one thread or several, or this very process. It keeps a loader as long as the dataset is
open, where that can be known, and at most the last few. It imports what our own workers import.
"""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np

from keras_mp.engines.isolation import ThreadLoader
from keras_mp.engines.package import Bytes, Key, Package, Place
from keras_mp.errors import KerasMPError, SampleFailure
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.in_process import load_in_process
from keras_mp.loading.timing import Work
from keras_mp.memory import pickling
from keras_mp.plan.request import Request
from keras_mp.workers.messages import Failed, failed_batch

_MAX_LOADERS = 8


class Missing(NamedTuple):
    """The answer of a worker that has no loader for the request, and cannot get at the package."""


class Batch(NamedTuple):
    """A batch on its way back: `header` is its pickle, and the bytes of its arrays are out of band.

    Each engine's transport moves the buffers as it moves arrays best; none has to look into a user's structure.
    """

    header: bytes
    buffers: list[Bytes]
    failures: tuple[SampleFailure, ...]
    work: Work | None
    nbytes: int | None

    def unpack(self, buffers: list[Bytes]) -> Any:
        """The batch, its arrays standing on `buffers`.

        Raises:
            KerasMPError: it is of a class that only the worker has.
        """
        try:
            return pickle.loads(self.header, buffers=buffers)
        except Exception as error:
            raise KerasMPError(f"a batch came back, but cannot be unpickled here: {error!r}") from error


class _Kept(NamedTuple):
    loader: Loader
    in_threads: ThreadLoader
    place: Place | weakref.ref[Package]

    @property
    def is_held(self) -> bool:
        place = self.place() if isinstance(self.place, weakref.ref) else self.place
        return place is not None and place.is_held


_loaders: dict[Key, _Kept] = {}  # the last used ones last
_lock = threading.Lock()


def load(key: Key, place: Place, request: Request) -> Batch | Failed | Missing:
    """Loads a batch, on any thread of this process.

    Args:
        key: whose loader.
        place: where the loader lies, should this process not have it yet.
        request: which batch.
    """
    try:
        kept = _kept(key, place)
        if kept is None:
            return Missing()
        # Processes mostly have their tasks on the main thread, where no other can run meanwhile.
        if threading.current_thread() is threading.main_thread():
            loaded = load_in_process(kept.loader, request)
        else:
            loaded = kept.in_threads.load(request)
    except Exception as error:  # many exceptions do not survive an executor's pickling; the reply does
        return failed_batch(error, request)
    try:
        return _packed(loaded)
    except Exception as error:
        return failed_batch(error, request, "result")


def _packed(loaded: Loaded) -> Batch:
    buffers: pickling.Buffers = []
    header = pickling.dump_result(loaded.batch, buffers)
    arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    return Batch(header, arrays, loaded.failures, loaded.work, loaded.nbytes)


def _kept(key: Key, place: Place) -> _Kept | None:
    with _lock:
        kept = _loaders.pop(key, None)
        if kept is None:
            for other, old in list(_loaders.items()):
                if not old.is_held:
                    _loaders.pop(other, None)
            package = place.open()
            if package is None:
                return None
            loader = package.unpack()
            # A package that a cluster keeps here for its owner goes when the dataset is closed, and the loader with it.
            held = weakref.ref(package, lambda _: _loaders.pop(key, None)) if package is place else place
            kept = _Kept(loader, ThreadLoader(loader), held)
            while len(_loaders) >= _MAX_LOADERS:
                _loaders.pop(next(iter(_loaders)), None)
        _loaders[key] = kept
        return kept


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
