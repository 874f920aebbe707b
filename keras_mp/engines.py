"""Where a batch is loaded: in this process, on an executor, or on a worker pool. Three rooms with the same door.

`submit` takes a request and returns a handle at once, `result` waits for that handle's batch. Which engine it is makes
no difference to the batch (P2).
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from keras_mp import wire
from keras_mp.loading import Loaded, Loader, Request, ignore_position
from keras_mp.messages import Failed, error_of, failed_batch
from keras_mp.randomness import Seeder, ThreadIsolation, restored_global_state, seed_global_state


class Engine(Protocol):
    """A place where batches are loaded."""

    @property
    def bundle_size(self) -> int:
        """How many requests had better travel together: more than one where a batch takes no longer than asking."""

    def submit(self, requests: Sequence[Request]) -> Sequence[Any]:
        """Asks for batches; returns a handle for each."""

    def is_ready(self, handle: Any) -> bool:
        """Whether `result` would return, or raise, at once."""

    def result(self, handle: Any) -> Loaded:
        """Waits for the batch of `handle`. Once for each handle."""

    def cancel(self, handle: Any) -> None:
        """Nobody will ask for the result of `handle`."""

    def update(self, loader: Loader) -> bool | None:
        """Uses `loader` for the requests that follow; whether it differs from the one before (None: not known)."""

    def close(self) -> None:
        """Gives up what the engine holds."""

    def stats(self) -> dict[str, Any]:
        """Numbers about the engine."""


def load_alone(loader: Loader, request: Request) -> Loaded:
    """Loads a batch in this thread, leaving the global random state as it was."""
    if not loader.runs_user_code:
        return loader.load(request, ignore_position, None)
    with restored_global_state():
        return loader.load(request, ignore_position, seed_global_state)


class InlineEngine:
    """Loads in the calling thread, when the batch is asked for."""

    bundle_size = 1

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def submit(self, requests: Sequence[Request]) -> Sequence[Request]:
        return requests

    def is_ready(self, handle: Request) -> bool:
        return False

    def result(self, handle: Request) -> Loaded:
        return load_alone(self._loader, handle)

    def cancel(self, handle: Request) -> None:
        pass

    def update(self, loader: Loader) -> None:
        self._loader = loader

    def close(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {"engine": "in-process"}


class ExecutorEngine:
    """Loads on a `concurrent.futures.Executor`: threads of this process, or the user's own executor.

    Threads share the loader. Any other executor gets it pickled with every request, and its workers keep it unpickled;
    what that costs is the executor's affair.
    """

    bundle_size = 1

    def __init__(self, executor: concurrent.futures.Executor, loader: Loader, owned: bool) -> None:
        self._executor = executor
        self._owned = owned
        self._isolation = ThreadIsolation()
        self._load: Callable[[Request], Loaded | Failed]
        self.update(loader)

    def submit(self, requests: Sequence[Request]) -> list[concurrent.futures.Future[Any]]:
        return [self._executor.submit(self._load, request) for request in requests]

    def is_ready(self, handle: concurrent.futures.Future[Any]) -> bool:
        return handle.done()

    def result(self, handle: concurrent.futures.Future[Any]) -> Loaded:
        reply = handle.result()
        if isinstance(reply, Failed):
            raise error_of(reply)
        loaded: Loaded = reply
        return loaded

    def cancel(self, handle: concurrent.futures.Future[Any]) -> None:
        handle.cancel()

    def update(self, loader: Loader) -> None:
        if isinstance(self._executor, concurrent.futures.ThreadPoolExecutor):
            self._load = functools.partial(self._load_in_thread, loader)
        else:
            data = wire.dump_user_object(loader, "dataset")
            self._load = functools.partial(_load_remotely, hashlib.sha256(data).digest(), data)

    def _load_in_thread(self, loader: Loader, request: Request) -> Loaded:
        def load(seed: Seeder | None) -> Loaded:
            return loader.load(request, ignore_position, seed)

        loaded: Loaded = self._isolation.run(load) if loader.runs_user_code else load(None)
        return loaded

    def close(self) -> None:
        if self._owned:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def stats(self) -> dict[str, Any]:
        return {"engine": type(self._executor).__name__}


_remote_loaders: dict[bytes, Loader] = {}  # in the executor's worker process: the last few loaders it was sent
_MAX_REMOTE_LOADERS = 8


def _load_remotely(key: bytes, data: bytes, request: Request) -> Loaded | Failed:
    try:
        loader = _remote_loaders.get(key)
        if loader is None:
            loader = pickle.loads(data)
            if len(_remote_loaders) >= _MAX_REMOTE_LOADERS:
                _remote_loaders.pop(next(iter(_remote_loaders)))
            _remote_loaders[key] = loader
        return load_alone(loader, request)
    except Exception as error:  # many exceptions do not survive an executor's pickling; the reply does
        return failed_batch(error)
