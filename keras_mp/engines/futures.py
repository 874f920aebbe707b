"""What engines have in common whose batches are finished on threads: the handle is a future that such a thread sets.

Every future ends: with a batch, an error, by `cancel`, or by `close` (P3).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any

from keras_mp.engines.isolation import ThreadIsolation
from keras_mp.errors import PoolClosed
from keras_mp.plan.request import Request


class Job(Future[Any]):
    """A request and its outcome to be. Of several outcomes the first counts.

    Attributes:
        request: what is to be loaded.
        load: what it is loaded with, where the engine wants to know that later.
        position: of the sample that it is at, in the request; -1: at none yet.
        since: when it came to that, in seconds of `time.monotonic`.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        self.load: Any = None
        self.position, self.since = -1, 0.0

    def report(self, position: int) -> None:
        """It has come to the sample at `position`."""
        self.position, self.since = position, time.monotonic()

    @property
    def name(self) -> str:
        """The batch, in words."""
        return f"batch {self.request.batch} of epoch {self.request.epoch}"

    def run(self, load: Callable[[Request], Any]) -> None:
        """Ends the job with what `load` gives for the request, or raises; does nothing if it has ended already."""
        if self.done():
            return
        try:
            loaded = load(self.request)
        except BaseException as error:  # also what ends a thread: it is the consumer's to know
            self.fail(error)
        else:
            self.finish(loaded)

    def finish(self, loaded: Any) -> None:
        """Ends the job with its batch, unless it has ended already: it was cancelled, or the dataset closed."""
        with contextlib.suppress(InvalidStateError):
            self.set_result(loaded)

    def fail(self, error: BaseException) -> None:
        """Ends the job without a batch, unless it has ended already."""
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)


class FuturesEngine:
    """Base of these engines. One of them gives `start`, `update` and `stats`."""

    bundle_size = 1
    batch_bytes: int | None = None

    def __init__(self) -> None:
        self._isolation = ThreadIsolation()
        self._jobs: set[Job] = set()  # whose result somebody may ask for
        self._closed = False

    def start(self, job: Job) -> None:
        """Has the job's batch loaded and the job ended, on whatever thread."""
        raise NotImplementedError

    def check_open(self) -> None:
        """Raises PoolClosed if the engine cannot be used any more."""
        if self._closed:
            raise PoolClosed("the dataset has been closed; make a new one")

    def wait(self, job: Job) -> Any:
        """Waits for the job's outcome, which is returned or raised."""
        return job.result()

    def submit(self, requests: Sequence[Request]) -> list[Job]:
        jobs = [Job(request) for request in requests]
        self._jobs.update(jobs)
        self.check_open()  # only now: what is started after this, `close` sees
        for job in jobs:
            self.start(job)
        return jobs

    def is_ready(self, handle: Job) -> bool:
        return handle.done()

    def result(self, handle: Job) -> Any:
        try:
            if not handle.done():
                self.check_open()
            result = self.wait(handle)
            if (nbytes := getattr(result, "nbytes", None)) is not None:
                self.batch_bytes = nbytes
            return result
        except CancelledError as error:
            raise PoolClosed(f"{handle.name} was asked for, but is not wanted any more") from error
        finally:
            self._jobs.discard(handle)

    def cancel(self, handle: Job) -> None:
        handle.cancel()
        self._jobs.discard(handle)

    def close(self) -> None:
        self._closed = True
        self._isolation.abandon()
        for job in list(self._jobs):
            job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
