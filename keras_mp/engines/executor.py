"""Loading on a `concurrent.futures.Executor` of the user's."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import pickle
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from keras_mp.engines.base import load_alone
from keras_mp.engines.isolation import ThreadIsolation
from keras_mp.engines.threads import ThreadLoader
from keras_mp.errors import KerasMPError, PoolClosed
from keras_mp.loading.loader import Loaded, Loader
from keras_mp.memory import pickling
from keras_mp.plan.request import Request
from keras_mp.workers.messages import Failed, error_of, failed_batch


class ExecutorEngine:
    """Loads on a `concurrent.futures.Executor` of the user's.

    One that runs its tasks in this process shares the loader. Any other gets it pickled with every request, and its
    workers keep it unpickled; what that costs is the executor's affair.
    """

    bundle_size = 1

    def __init__(self, executor: concurrent.futures.Executor, loader: Loader) -> None:
        self._executor = executor
        self._isolation = ThreadIsolation()
        self._closed = False
        self._waiting: set[threading.Event] = set()
        self.update(loader)

    def submit(self, requests: Sequence[Request]) -> list[_Submitted]:
        try:
            return [_Submitted(request, self._executor.submit(self._load, request)) for request in requests]
        except RuntimeError as error:
            if "shutdown" not in str(error) or isinstance(error, concurrent.futures.BrokenExecutor):
                raise
            raise self._is_shut_down() from error

    def is_ready(self, handle: _Submitted) -> bool:
        return handle.future.done()

    def result(self, handle: _Submitted) -> Loaded:
        future = handle.future
        if not future.done():
            self._wait(future)
        if self._closed and (future.cancelled() or not future.done()):
            request = handle.request
            raise PoolClosed(
                f"the dataset was closed while batch {request.batch} of epoch {request.epoch} was being loaded"
            )
        try:
            reply = future.result()
        except concurrent.futures.CancelledError as error:
            raise self._is_shut_down() from error
        if isinstance(reply, Failed):
            raise error_of(reply)
        loaded: Loaded = reply
        return loaded

    def cancel(self, handle: _Submitted) -> None:
        handle.future.cancel()

    def update(self, loader: Loader) -> None:
        self._load = _Load(loader, self._isolation)
        if not isinstance(self._executor, concurrent.futures.ThreadPoolExecutor):
            self._load.pack(loader)

    def close(self) -> None:
        self._closed = True
        self._isolation.give_up()
        for woken in list(self._waiting):
            woken.set()

    def stats(self) -> dict[str, Any]:
        return {"engine": type(self._executor).__name__}

    def _wait(self, future: concurrent.futures.Future[Any]) -> None:
        """Waits until the future is done or the engine closed."""
        woken = threading.Event()
        future.add_done_callback(lambda _: woken.set())
        self._waiting.add(woken)
        try:
            if not self._closed:  # what is closed after this, sees the event
                woken.wait()
        finally:
            self._waiting.discard(woken)

    def _is_shut_down(self) -> PoolClosed:
        return PoolClosed(
            f"the {type(self._executor).__name__} that was given as pool= has been shut down, or has cancelled the "
            "batch; keep it open as long as the dataset is in use"
        )


class _Submitted(NamedTuple):
    """A batch that an executor has been asked for."""

    request: Request
    future: concurrent.futures.Future[Any]


class _Load:
    """The task of an executor: `load(request)`. What it is pickled to works in another process too.

    So nobody needs to know whether the executor's tasks run in this process.
    """

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
            return load_alone(loaders[0], request)
        return loaders[1].load(request)
    except Exception as error:  # many exceptions do not survive an executor's pickling; the reply does
        return failed_batch(error)
