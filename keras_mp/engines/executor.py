"""Loading on a `concurrent.futures.Executor` of the user's, which keeps and ends its own workers.

Some executors run their tasks in this process and share the loader. Any other gets it pickled with every request, and
its workers keep it unpickled; what that costs is the executor's affair. Nobody needs to know which kind it is.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import pickle
import threading
from collections.abc import Sequence
from typing import Any

from keras_mp.engines.futures import FuturesEngine, Job
from keras_mp.engines.isolation import ThreadIsolation, ThreadLoader
from keras_mp.errors import KerasMPError, PoolClosed
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.in_process import load_in_process
from keras_mp.memory import pickling
from keras_mp.plan.request import Request
from keras_mp.workers.messages import Failed, error_of, failed_batch


class ExecutorEngine(FuturesEngine):
    """Loads on a `concurrent.futures.Executor` of the user's; `close` leaves it running."""

    def __init__(self, executor: concurrent.futures.Executor, loader: Loader) -> None:
        super().__init__()
        self._executor = executor
        self._futures: dict[Job, concurrent.futures.Future[Any]] = {}  # of jobs that have not ended
        self.update(loader)

    def submit(self, requests: Sequence[Request]) -> list[Job]:
        try:
            return super().submit(requests)
        except RuntimeError as error:
            if "shutdown" not in str(error) or isinstance(error, concurrent.futures.BrokenExecutor):
                raise
            raise self._shut_down_error() from error

    def start(self, job: Job) -> None:
        future = self._futures[job] = self._executor.submit(self._load, job.request)
        future.add_done_callback(lambda done: self._end(job, done))

    def cancel(self, handle: Job) -> None:
        super().cancel(handle)
        if (future := self._futures.pop(handle, None)) is not None:
            future.cancel()

    def result(self, handle: Job) -> Loaded:
        reply: Loaded | Failed = super().result(handle)
        if isinstance(reply, Failed):
            raise error_of(reply)
        return reply

    def update(self, loader: Loader) -> None:
        self._load = _LoadFunction(loader, self._isolation)
        if not isinstance(self._executor, concurrent.futures.ThreadPoolExecutor):
            self._load.pack(loader)

    def stats(self) -> dict[str, Any]:
        return {"engine": type(self._executor).__name__}

    def _end(self, job: Job, future: concurrent.futures.Future[Any]) -> None:
        self._futures.pop(job, None)  # it refers to the job, and neither may keep a batch that is done with
        if future.cancelled():
            job.fail(self._shut_down_error())
        elif (error := future.exception()) is not None:
            job.fail(error)
        else:
            job.finish(future.result())

    def _shut_down_error(self) -> PoolClosed:
        return PoolClosed(
            f"the {type(self._executor).__name__} that was given as pool= has been shut down, or has cancelled the "
            "batch; keep it open as long as the dataset is in use"
        )


class _LoadFunction:
    """What an executor runs: `load(request)`. What it is pickled to works in another process too."""

    def __init__(self, loader: Loader, isolation: ThreadIsolation) -> None:
        self._loader = ThreadLoader(loader, isolation)
        self._packed: bytes | KerasMPError | None = None

    def pack(self, loader: Loader) -> None:
        """Pickles the loader as it is now."""
        try:
            self._packed = pickling.dump_user_object(loader, "dataset")
        except KerasMPError as error:  # which matters only if the executor pickles its tasks
            self._packed = error

    def __call__(self, request: Request) -> Loaded:
        return self._loader.load(request)

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._packed, bytes):
            raise self._packed or KerasMPError("the executor is one of threads, which need no pickle")
        return functools.partial, (_load_remotely, hashlib.sha256(self._packed).digest(), self._packed)


_remote_loaders: dict[bytes, tuple[Loader, ThreadLoader]] = {}  # in the executor's worker: the last few it was sent
_MAX_REMOTE_LOADERS = 8


def _load_remotely(key: bytes, data: bytes, request: Request) -> Loaded | Failed:
    try:
        loaders = _remote_loaders.get(key)
        if loaders is None:
            loader = pickle.loads(data)
            if len(_remote_loaders) >= _MAX_REMOTE_LOADERS:
                _remote_loaders.pop(next(iter(_remote_loaders)))
            loaders = _remote_loaders[key] = loader, ThreadLoader(loader)
        # Processes have their tasks on the main thread, where no other can run meanwhile.
        if threading.current_thread() is threading.main_thread():
            return load_in_process(loaders[0], request)
        return loaders[1].load(request)
    except Exception as error:  # many exceptions do not survive an executor's pickling; the reply does
        return failed_batch(error)
