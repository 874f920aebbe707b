"""What is said to whoever waits for a batch: that workers are starting, and that one has stood at a sample for long.

The dispatcher's thread finds out and the consumer's says it: a warning that is turned into an error is then one of the
consumer's code, and ends no pool.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from keras_mp.errors import warn_user
from keras_mp.loading.stalls import STALL_S, describe_stall
from keras_mp.memory.control import NOT_STARTED
from keras_mp.workers.jobs import Job
from keras_mp.workers.process import Process

_START_IS_LONG_S = 2.0
_REMEDY = (
    "Nothing ends it, as no timeout= is set; with timeout=seconds the worker would be replaced, and the batch run "
    "again."
)


class StallWatch:
    """Watches one worker for a sample that takes a minute and more, where no `timeout` ends it."""

    def __init__(self) -> None:
        self._asked: tuple[Job, int] | None = None

    def check(self, process: Process, job: Job | None, now: float) -> None:
        """Looks at the batch that the worker is at; what is found is left at its loader, once."""
        asked, self._asked = self._asked, None
        if job is None or job.loader.timeout_s is not None or job.loader.stall_is_told:
            return
        position = job.position
        if position == NOT_STARTED or now - job.sample_since < STALL_S:
            return
        if asked != (job, position):
            self._asked = job, position
            process.ask_where()  # the answer is there when this looks again
            return
        job.loader.stall_is_told = True
        index = job.loader.samples.index_at(job.request, position)
        where = f"worker process {process.pid}"
        seconds = now - job.sample_since
        job.loader.stall = describe_stall(job.name, position, index, seconds, where, _REMEDY, process.where())


class Patience:
    """Goes with one wait for a batch; used as a context, as there may be a line on the terminal to clear."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.monotonic()
        self._line = contextlib.ExitStack()
        self._status: Any = None

    def __enter__(self) -> Patience:
        return self

    def __exit__(self, *exc: object) -> None:
        self._line.close()

    def look(self, ready: int, count: int) -> None:
        """Called now and then during the wait.

        Args:
            ready: how many workers have started.
            count: how many there are to be.
        """
        stall, self._job.loader.stall = self._job.loader.stall, None
        if stall is not None:
            warn_user(stall)
        is_first = not self._job.loader.totals.batches
        if not is_first or time.monotonic() - self._began < _START_IS_LONG_S or not sys.stderr.isatty():
            return
        text = f"keras_mp: {ready} of {count} workers have started; waiting for the first batch"
        if self._status is None:
            from rich.console import Console

            self._status = self._line.enter_context(Console(stderr=True).status(text))
        self._status.update(text)
