"""Worker pools, as datasets and users see them: `WorkerPool`, and the pools that datasets share.

Here is who owns a pool, and what a fork or the end of the process does to it. What happens inside, from queue to crash,
is in `workers`; the engine itself is `workers.client.PoolClient`.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from keras_mp.checks import check_count, check_workers
from keras_mp.errors import KerasMPError
from keras_mp.loading.base import Loader
from keras_mp.loading.recording import Recorder
from keras_mp.memory.system import missing_for_workers
from keras_mp.workers.client import PoolClient
from keras_mp.workers.dispatcher import Dispatcher
from keras_mp.workers.tuning import TunedClient


class WorkerPool:
    """A pool of worker processes that several datasets can share: `PoolDataset(..., pool=pool)`.

    Processes start at the first request. They import NumPy and what the datasets' own code needs, nothing else. What
    this code starts ends with its worker, unless it has a session or process group of its own.

    Args:
        workers: number of processes; None takes the usable cores.
        env: environment variables to set in the workers, over the parent's.
        worker_threads: threads that BLAS and OpenMP may use in each worker.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        KerasMPError: this system has no such processes (Windows).
    """

    def __init__(
        self, workers: int | None = None, env: Mapping[str, str] | None = None, worker_threads: int = 1
    ) -> None:
        count = check_workers(workers)
        if count == 0:
            raise ValueError(
                "a WorkerPool needs workers >= 1, got 0; workers=0 (in-process) is an option of the dataset"
            )
        if isinstance(worker_threads, bool) or not isinstance(worker_threads, int) or worker_threads < 1:
            raise ValueError(f"worker_threads must be an int >= 1, got {worker_threads!r}")
        if env is not None and not (
            isinstance(env, Mapping) and all(isinstance(k, str) and isinstance(v, str) for k, v in env.items())
        ):
            raise TypeError(f"env must map str to str, got {env!r}")
        if missing := missing_for_workers():
            raise KerasMPError(
                f"a WorkerPool cannot run its processes here: {missing}. Leave out pool=, and threads load the "
                "batches; or pass a concurrent.futures.ProcessPoolExecutor or a Dask client as pool="
            )
        self._dispatcher = Dispatcher(count, env, worker_threads)
        self.end = self._dispatcher.close  # outlives the pool, for whoever drops it and wants to wait
        _dispatchers.add(self._dispatcher)
        self._finalizer = weakref.finalize(self, self._dispatcher.close, wait=False)
        self._finalizer.atexit = False  # `_close_all` does that, and waits

    def resize(self, workers: int) -> None:
        """Has another number of workers from now on. Those that are too many end after the batch that they are at.

        Raises:
            TypeError, ValueError: it is no whole number from 1 on.
        """
        self._dispatcher.resize(check_count(workers, "workers"))

    @property
    def workers(self) -> int:
        """How many workers there are to be."""
        return self._dispatcher.workers.count

    def client(
        self, loader: Loader, timeout_s: float | None = None, recorder: Recorder | None = None, tuned: bool = False
    ) -> PoolClient:
        """The engine of one dataset on this pool, which it keeps alive until it is closed.

        Args:
            loader: what the workers load batches with.
            timeout_s: seconds that a batch may take in a worker; None: any time.
            recorder: gets what happens when, for a timeline.
            tuned: find the number of workers while the first epoch runs.

        Raises:
            KerasMPError: the loader holds something that cannot be pickled, or there is no shared memory for it.
        """
        kind = TunedClient if tuned else PoolClient
        return kind(self._dispatcher, loader, timeout_s, self, recorder)

    def stats(self) -> dict[str, Any]:
        """Process ids, restarts so far, jobs queued and running."""
        return self._dispatcher.describe()

    def close(self) -> None:
        """Ends the worker processes. Datasets that use the pool raise `PoolClosed` from then on."""
        self._finalizer.detach()
        self._dispatcher.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"WorkerPool(workers={self.workers}{', closed' if self._dispatcher.closed else ''})"


_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
_shared: weakref.WeakValueDictionary[tuple[int, int], WorkerPool] = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_pool(workers: int) -> WorkerPool:
    """The pool that all datasets with this number of workers use, unless they are given one."""
    key = (os.getpid(), workers)
    with _shared_lock:
        pool = _shared.get(key)
        if pool is None or pool._dispatcher.closed:
            pool = _shared[key] = WorkerPool(workers)
        return pool


def _close_all() -> None:
    for dispatcher in list(_dispatchers):
        dispatcher.close()


_fork_lock = threading.Lock()
_forking: list[Dispatcher] = []


def _before_fork() -> None:
    _fork_lock.acquire()
    _forking[:] = _dispatchers
    for dispatcher in _forking:
        dispatcher.before_fork()


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    while _forking:
        _forking.pop().after_fork_in_child()
    _fork_lock.release()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
