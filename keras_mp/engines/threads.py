"""Loading on threads of this process.

The threads are daemons: one that hangs in the user's code cannot be ended, and neither `close` nor the interpreter's
end waits for it longer than a moment (P3).
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any

from keras_mp.engines.isolation import MustRunAlone, ThreadIsolation
from keras_mp.errors import PoolClosed
from keras_mp.loading.loader import Loaded, Loader, ignore_position
from keras_mp.loading.owned import owned
from keras_mp.loading.randomness import Seeder
from keras_mp.plan.request import Request

_END_GRACE_S = 2.0  # what a thread gets to finish a batch that nobody wants any more
_MOST_PLACES = 4096


class ThreadLoader:
    """Loads batches on any thread; several may do so at once."""

    def __init__(self, loader: Loader, isolation: ThreadIsolation | None = None) -> None:
        self._loader = loader.renewed()
        self._isolation = isolation or ThreadIsolation()
        self._places: dict[int, tuple[int, int]] = {}

    def load(self, request: Request) -> Loaded:
        """Loads a batch, whose arrays nobody else holds."""
        if not self._loader.runs_user_code:
            return self._load(request, None)
        loaded: Loaded = self._isolation.run(lambda seed: self._load(request, seed), self._loader.generators)
        return loaded

    def _load(self, request: Request, seed: Seeder | None) -> Loaded:
        loaded, copied = owned(self._loader.load(request, ignore_position, seed), self._loader)
        if len(self._places) > _MOST_PLACES:
            self._places.clear()
        for place in copied:
            epoch, batch = self._places.setdefault(place, (request.epoch, request.batch))
            if epoch == request.epoch and batch != request.batch and seed is None:
                raise MustRunAlone(
                    f"batches {batch} and {request.batch} lie in the same memory, so while one was made, or copied, "
                    "another thread may have written to it"
                )
            self._places[place] = request.epoch, request.batch
        return loaded


class _Job(Future[Loaded]):
    """A batch that has been asked for."""

    def __init__(self, loader: ThreadLoader, request: Request) -> None:
        super().__init__()
        self._loader = loader
        self._request = request

    @property
    def name(self) -> str:
        """The batch, in words."""
        return f"batch {self._request.batch} of epoch {self._request.epoch}"

    def run(self) -> None:
        """Loads the batch, unless nobody wants it any more."""
        if self.done():
            return
        try:
            loaded = self._loader.load(self._request)
        except BaseException as error:  # also what ends a thread: it is the consumer's to know
            self.fail(error)
        else:
            with contextlib.suppress(InvalidStateError):  # cancelled, or the dataset was closed
                self.set_result(loaded)

    def fail(self, error: BaseException) -> None:
        """There will be no batch."""
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)


class ThreadsEngine:
    """Loads on threads of its own, which share the loader."""

    bundle_size = 1

    def __init__(self, count: int, loader: Loader) -> None:
        self._process = os.getpid()
        self._isolation = ThreadIsolation()
        self._jobs: set[_Job] = set()  # that `result` has not been called for
        self._at: dict[int, _Job] = {}  # by thread: what it is doing
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self.update(loader)
        self._end_threads = weakref.finalize(self, _end_threads, self._isolation, self._queue, count)
        self._end_threads.atexit = False  # the dataset is closed there, which waits
        self._threads = [
            threading.Thread(target=_serve, args=(self._queue, self._at), daemon=True, name=f"keras_mp-loader-{number}")
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[Request]) -> list[_Job]:
        """Queues requests."""
        jobs = [_Job(self._loader, request) for request in requests]
        self._jobs.update(jobs)
        self._check()  # only now: what is queued after this, `close` sees
        for job in jobs:
            self._queue.put(job)
        return jobs

    def is_ready(self, handle: _Job) -> bool:
        """Whether the job has its answer."""
        return handle.done()

    def result(self, handle: _Job) -> Loaded:
        """Waits for the job's batch."""
        try:
            if not handle.done():
                self._check()
            return handle.result()
        except CancelledError as error:
            raise PoolClosed(f"{handle.name} was asked for, but is not wanted any more") from error
        finally:
            self._jobs.discard(handle)

    def cancel(self, handle: _Job) -> None:
        """Nobody will ask for this job's result: it is dropped if no thread has begun it."""
        handle.cancel()
        self._jobs.discard(handle)

    def update(self, loader: Loader) -> None:
        """Replaces the loader for the requests that follow."""
        self._loader = ThreadLoader(loader, self._isolation)

    def close(self) -> None:
        """Ends the threads, and waits a moment for those that are at a batch; who waits for one gets `PoolClosed`."""
        if self._closed:
            return
        self._closed = True
        for job in list(self._jobs):
            job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
        self._end_threads()
        if self._process != os.getpid():
            return
        deadline = time.monotonic() + _END_GRACE_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [job.name for thread, job in list(self._at.items()) if thread != threading.get_ident()]
        if stuck:
            warnings.warn(
                f"keras_mp: {_END_GRACE_S:g} s after the dataset was closed, threads are still at {', '.join(stuck)}. "
                "A thread cannot be ended, so they are left running; use_multiprocessing=True loads in processes, "
                "which can, and knows timeout=.",
                RuntimeWarning,
                stacklevel=3,
            )

    def stats(self) -> dict[str, Any]:
        """How many threads there are."""
        return {"engine": "threads", "workers": len(self._threads)}

    def _check(self) -> None:
        if self._closed:
            raise PoolClosed("the dataset has been closed; make a new one")
        if self._process != os.getpid():
            raise PoolClosed(
                f"the dataset's threads are in process {self._process}, which made it, and this is a forked copy, "
                f"{os.getpid()}; make the dataset in the forked process, or give it workers=0"
            )


def _serve(jobs: queue.SimpleQueue[_Job | None], at: dict[int, _Job]) -> None:
    """What a thread does. It knows nothing of its engine, so that an engine that is dropped can be collected."""
    while (job := jobs.get()) is not None:
        at[threading.get_ident()] = job
        job.run()
        del at[threading.get_ident()], job  # a batch must not live on until the next one is asked for


def _end_threads(isolation: ThreadIsolation, jobs: queue.SimpleQueue[_Job | None], count: int) -> None:
    isolation.give_up()
    for _ in range(count):
        jobs.put(None)  # safe in a finaliser: it takes no lock of Python's
