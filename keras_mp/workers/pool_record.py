"""What has become of a pool's workers: counts, for `stats()`, and moments, for whoever has a timeline recorded.

The dispatcher calls this under its lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from keras_mp.loading.recording import Event
from keras_mp.workers.faults import WorkerEnd
from keras_mp.workers.handle import WorkerHandle
from keras_mp.workers.shared_loader import SharedLoader


class PoolRecord:
    """Counts of one pool."""

    def __init__(self) -> None:
        self._restarts = self._timeouts = 0
        self._ended_busy_s = self._ended_ready_s = 0.0

    def add_start(self, handle: WorkerHandle, loaders: Iterable[SharedLoader]) -> None:
        """A worker has set itself up; `loaders` are those of the datasets that use the pool."""
        process = handle.process
        lane = (process.pid, 0)
        start = Event(lane, "worker", "start", process.started, process.ready_at - process.started)
        name = "worker restarted" if self._restarts else "worker started"
        _add([start, Event(lane, "worker", name, process.ready_at, None, text=f"process {process.pid}")], loaders)

    def add_end(self, handle: WorkerHandle, end: WorkerEnd, loaders: Iterable[SharedLoader]) -> None:
        """A worker has ended, whose jobs have not been put back yet."""
        lane, now = (handle.process.pid, 0), time.monotonic()
        name = "worker timed out" if end.cause == "late" else "worker died"
        _add([Event(lane, "worker", name, now, None, text=f"process {handle.process.pid} {end.text}")], loaders)
        if not handle.process.ready:
            return
        self._restarts += 1
        self._timeouts += end.cause == "late"
        self._ended_busy_s += handle.busy_s
        self._ended_ready_s += handle.ready_s
        if (job := handle.current) is not None:
            begun, request = handle.head_since, job.request
            name = f"batch {request.batch} lost"
            job.loader.recorder.add(
                [Event(lane, "worker", name, begun, now - begun, request.epoch, request.batch, text=end.text)]
            )

    def describe(self, handles: Sequence[WorkerHandle]) -> dict[str, Any]:
        """Numbers for `stats()`; `handles` are the workers that there are."""
        return {
            "pids": tuple(handle.process.pid for handle in handles),
            "busy_s": tuple(handle.busy_s for handle in handles),
            "ready_s": tuple(handle.ready_s for handle in handles),
            "pool_busy_s": self._ended_busy_s + sum(handle.busy_s for handle in handles),
            "pool_ready_s": self._ended_ready_s + sum(handle.ready_s for handle in handles),
            "restarts": self._restarts,
            "timeouts": self._timeouts,
        }


def _add(events: Sequence[Event], loaders: Iterable[SharedLoader]) -> None:
    for loader in loaders:
        loader.recorder.add(events)
