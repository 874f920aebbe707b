"""The moments of a worker's life, for whoever has a timeline recorded.

The dispatcher calls this under its lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from keras_mp.loading.recording import Event
from keras_mp.workers.faults import WorkerEnd
from keras_mp.workers.handle import WorkerHandle
from keras_mp.workers.shared_loader import SharedLoader


def add_start(handle: WorkerHandle, again: bool, loaders: Iterable[SharedLoader]) -> None:
    """A worker has set itself up, in another's place if `again`; `loaders` are of the datasets that use the pool."""
    process = handle.process
    lane = (process.pid, 0)
    start = Event(lane, "worker", "start", process.started, process.ready_at - process.started)
    name = "worker restarted" if again else "worker started"
    _add([start, Event(lane, "worker", name, process.ready_at, None, text=f"process {process.pid}")], loaders)


def add_end(handle: WorkerHandle, end: WorkerEnd, loaders: Iterable[SharedLoader]) -> None:
    """A worker has ended, whose jobs have not been put back yet."""
    lane, now = (handle.process.pid, 0), time.monotonic()
    if handle.is_surplus and not handle.bundles:
        name = "worker let go"
    else:
        name = "worker timed out" if end.cause == "late" else "worker died"
    _add([Event(lane, "worker", name, now, None, text=f"process {handle.process.pid} {end.text}")], loaders)
    if handle.process.ready and (job := handle.current) is not None:
        begun, request = handle.head_since, job.request
        name = f"batch {request.batch} lost"
        job.loader.recorder.add(
            [Event(lane, "worker", name, begun, now - begun, request.epoch, request.batch, text=end.text)]
        )


def _add(events: Sequence[Event], loaders: Iterable[SharedLoader]) -> None:
    for loader in loaders:
        loader.recorder.add(events)
