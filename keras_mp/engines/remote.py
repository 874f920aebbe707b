"""What runs in a worker that is not ours: it keeps the loaders that it was given, and loads batches with them.

A worker may be a process with one thread or several, or this very process. It keeps a loader as long as the dataset is
open, where that can be known, and at most the last few. It imports what our own workers import.
"""

from __future__ import annotations

import os
import pickle
import threading
from typing import Any, NamedTuple

import numpy as np

from keras_mp.engines.isolation import ThreadIsolation, ThreadLoader
from keras_mp.engines.package import Bytes, Key, Place
from keras_mp.engines.processes import shared_pool
from keras_mp.errors import KerasMPError, SampleFailure, WorkerCrashed
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.in_process import load_in_process
from keras_mp.loading.timing import Work
from keras_mp.memory import pickling
from keras_mp.memory.system import missing_for_workers
from keras_mp.plan.request import Request
from keras_mp.workers.client import PoolClient
from keras_mp.workers.messages import Failed, failed_batch

_MAX_LOADERS = 8


class Missing(NamedTuple):
    """The answer of a worker that has no loader for the request, and cannot get at the package.

    `worker` is where it is to be sent, if the engine sends to workers.
    """

    worker: str | None = None


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


class _Kept:
    """A loader that this process keeps.

    On the main thread of a process of one thread it loads as our own workers do. Elsewhere, other threads may draw from
    the shared generators, as a cluster's own threads do at any moment: so what draws from them is loaded by a worker of
    ours beside this process (P2). Whatever does not, and that is most, is loaded here.
    """

    def __init__(self, loader: Loader, place: Place) -> None:
        self._loader = loader
        self._place = place
        self._isolation = ThreadIsolation()
        self._in_threads = ThreadLoader(loader, self._isolation)
        self._beside: PoolClient | None = None
        self._lock = threading.Lock()

    @property
    def is_held(self) -> bool:
        return self._place.is_held

    def load(self, request: Request) -> Loaded:
        if threading.current_thread() is threading.main_thread():
            return load_in_process(self._loader, request)
        if not self._isolation.is_exclusive or missing_for_workers():
            loaded = self._in_threads.load(request)
            if not self._isolation.is_exclusive or missing_for_workers():
                return loaded
        with self._lock:
            if self._beside is None:
                self._beside = shared_pool(1).client(self._loader)
            (job,) = self._beside.submit([request])
        return self._beside.result(job)


_loaders: dict[Key, _Kept] = {}  # the last used ones last
_lock = threading.Lock()


def load(key: Key, place: Place, request: Request) -> Batch | Failed | Missing:
    """Loads a batch, on any thread of this process.

    Args:
        key: whose loader.
        place: where the loader lies, should this process not have it yet.
        request: which batch.

    Raises:
        WorkerCrashed: it has ended workers of ours beside this process.
    """
    try:
        kept = _kept(key, place)
        if kept is None:
            return Missing()
        loaded = kept.load(request)
    except WorkerCrashed:
        raise
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


def drop_closed() -> None:
    """Lets go of the loaders in this process whose datasets are known to be closed."""
    for key, kept in list(_loaders.items()):
        if not kept.is_held:
            _loaders.pop(key, None)


def _kept(key: Key, place: Place) -> _Kept | None:
    with _lock:
        kept = _loaders.pop(key, None)
        if kept is None:
            drop_closed()
            package = place.open()
            if package is None:
                return None
            kept = _Kept(package.unpack(), place)
            for other in [other for other in _loaders if other[0] == key[0] and other[1] < key[1] - 1]:
                _loaders.pop(other, None)  # what is in flight is of this state of the loader, or the one before
            while len(_loaders) >= _MAX_LOADERS:
                _loaders.pop(next(iter(_loaders)), None)
        _loaders[key] = kept
        return kept


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
