"""`workers="auto"`: finds how many workers are enough, while the first epoch runs.

The arithmetic is that of `sizing`. Where the consumer waits though there should be enough, and more workers made it no
faster, something else is short.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from keras_mp.checks import usable_cores
from keras_mp.loading.base import Loaded
from keras_mp.sizing import useful_workers, workers_to_keep_up
from keras_mp.workers.client import PoolClient
from keras_mp.workers.jobs import Job

_WAITS = 0.05  # a smaller share of waiting is none
_HELPS = 1.05  # times as fast: less is none
_MOST_WORKERS = 128
_LEAST_WINDOW_S, _LEAST_WINDOW_BATCHES = 0.3, 8

_log = logging.getLogger("keras_mp")


@dataclasses.dataclass(frozen=True)
class Window:
    """What was measured over a while with one number of workers.

    Attributes:
        workers: their number.
        batches: taken in that time.
        elapsed_s: the time.
        wait_s: how much of it the consumer waited.
        service_s: what one worker needs for a batch.
        cpu_share: how much of that is processor time, from 0 to 1.
    """

    workers: int
    batches: int
    elapsed_s: float
    wait_s: float
    service_s: float
    cpu_share: float

    @property
    def rate(self) -> float:
        """Batches taken per second."""
        return self.batches / self.elapsed_s


class Search:
    """Decides on the number of workers, window by window.

    Args:
        cores: how many there are to run on.
    """

    def __init__(self, cores: int) -> None:
        self.is_over = False
        self._cores = cores
        self._smaller: Window | None = None  # with fewer workers, before they became more
        self._has_shrunk = self._doubts = False

    def next_count(self, window: Window) -> int:
        """How many workers there should be after what was measured in `window`."""
        service_s = window.service_s
        useful = useful_workers(service_s, window.cpu_share * service_s, self._cores) or _MOST_WORKERS
        most = min(_MOST_WORKERS, useful)
        smaller, self._smaller = self._smaller, None
        if window.wait_s <= _WAITS * window.elapsed_s:
            enough = workers_to_keep_up(service_s, 1 / window.rate)
            self.is_over = self._has_shrunk or enough >= window.workers
            self._has_shrunk = True
            return min(enough, window.workers)
        if smaller is not None and window.rate < _HELPS * smaller.rate:
            if not self._doubts:  # once may be chance
                self._doubts, self._smaller = True, smaller
                return window.workers
            self.is_over = True
            return smaller.workers
        self._doubts = False
        if self._has_shrunk or window.workers >= most:
            self.is_over = True
            return window.workers + self._has_shrunk if window.workers < most else most
        enough = workers_to_keep_up(service_s, (window.elapsed_s - window.wait_s) / window.batches)
        self._smaller = window
        return min(most, 2 * window.workers, max(window.workers + 1, enough))


class TunedClient(PoolClient):
    """A client that resizes its pool, which is its own, while the first epoch runs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._search = Search(usable_cores())
        self._epoch: int | None = None
        self._begin()

    def _begin(self) -> None:
        """A window begins."""
        totals = self._shared.totals
        self._began, self._batches, self._wait_s = time.monotonic(), 0, 0.0
        self._work_before = totals.batches, totals.total_s, totals.cpu_s

    def result(self, job: Job) -> Loaded:
        """Waits for the job and takes its batch; see `PoolClient.result`."""
        before = time.monotonic()
        loaded = super().result(job)
        if not self._search.is_over:
            self._wait_s += time.monotonic() - before
            self._batches += 1
            self._look(job.request.epoch)
        return loaded

    def _look(self, epoch: int) -> None:
        if self._epoch is None:
            self._epoch = epoch
            self._begin()  # without the start of the workers
            return
        workers = self._dispatcher.workers
        if epoch != self._epoch:
            self._search.is_over = True
            return
        if workers.ready != workers.count:
            self._begin()
            return
        elapsed_s = time.monotonic() - self._began
        if self._batches < max(_LEAST_WINDOW_BATCHES, 2 * workers.count) or elapsed_s < _LEAST_WINDOW_S:
            return
        totals, (batches, work_s, cpu_s) = self._shared.totals, self._work_before
        made, work_s, cpu_s = totals.batches - batches, totals.total_s - work_s, totals.cpu_s - cpu_s
        if made and work_s:
            window = Window(workers.count, self._batches, elapsed_s, self._wait_s, work_s / made, cpu_s / work_s)
            count = self._search.next_count(window)
            if count != workers.count:
                _log.info(f"{window}: from now on {count} workers")
                self._dispatcher.resize(count)
        self._begin()
