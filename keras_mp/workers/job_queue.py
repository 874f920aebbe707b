"""Jobs that wait for a worker, and which of them goes where.

Most jobs go to the idlest worker. One that goes on where another has ended (a lane of a stream) is best given to the
worker which had that, as any other would have to read its way there. So it waits for that worker, unless it is gone, or
is at a batch for much longer than usual, or another has nothing to do while two more wait for the same one.

Called under the dispatcher's lock, by whichever thread has something to hand out: a consumer too, as waking a thread
for every batch would cost more than the batch. So Ctrl-C may come at any line: a job is in the queue or in a bundle of
a worker's at every moment, or has its answer.
"""

from __future__ import annotations

import collections
import mmap
import time
from collections.abc import Sequence

from keras_mp.errors import PoolClosed, WorkerCrashed
from keras_mp.workers.handle import WorkerHandle
from keras_mp.workers.jobs import Bundle, Job
from keras_mp.workers.shared_loader import SharedLoader
from keras_mp.workers.worker_set import WorkerSet


class JobQueue:
    """Jobs in the order in which they were asked for, those first that are run again."""

    def __init__(self, workers: WorkerSet) -> None:
        self._workers = workers
        self._jobs: collections.deque[Job] = collections.deque()
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def extend(self, jobs: Sequence[Job]) -> None:
        """Adds jobs at the end."""
        self._jobs.extend(jobs)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Adds jobs at the beginning that were handed out in vain, unless they have an answer; each goes alone now."""
        for job in reversed(jobs):
            if not job.done:
                job.lease, job.alone = None, True
                self._jobs.appendleft(job)

    def fail_all(self, text: str) -> None:
        """Fails every job: no worker can be had. A later request tries afresh."""
        while self._jobs:
            job = self._jobs.popleft()
            if not job.cancelled:
                job.fail(WorkerCrashed(text))

    def remove(self, loader: SharedLoader) -> None:
        """Fails the jobs of a loader that is being closed."""
        for job in [job for job in self._jobs if job.loader is loader]:
            self._jobs.remove(job)
            job.fail(PoolClosed("the dataset was closed while this batch was waiting for a worker"))

    def clear(self) -> list[Job]:
        """Takes out all jobs."""
        jobs, self._jobs = list(self._jobs), collections.deque()
        return jobs

    def hand_out(self) -> None:
        """Hands jobs to workers that have room, the idlest first."""
        jobs = self._jobs
        waiting: list[int] = []  # of those that wait for their own worker: its process id
        while len(waiting) < len(jobs):
            job = jobs[len(waiting)]
            loader = job.loader
            if loader.closed:
                job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
            if job.cancelled or job.done:
                del jobs[len(waiting)]
                continue
            depth = loader.depth
            usable = [handle for handle in self._workers.handles if handle.has_room(depth)]
            if not usable:
                break
            own = self._own_worker(job)
            if own is not None and own not in usable and not loader.is_late(own.head_since):
                waiting.append(own.process.pid)
                continue
            self._give(own if own in usable else _idlest(usable), len(waiting), len(usable))
        self._share_out(waiting)

    def _share_out(self, waiting: list[int]) -> None:
        """Gives jobs that wait for a worker of their own, and are the third to do so, to workers with nothing to do."""
        for place in reversed(range(len(waiting))):
            idle = [handle for handle in self._workers.handles if handle.is_idle and handle.has_room(1)]
            if not idle:
                return
            if waiting[: place + 1].count(waiting[place]) > _MOST_WAITING:
                self._give(idle[0], place, 1)
                del waiting[place]

    def _own_worker(self, job: Job) -> WorkerHandle | None:
        """The worker that the job had best go to, if there is one."""
        pid = job.loader.worker_of(job.request)
        if pid is None:
            return None
        return next((each for each in self._workers.handles if each.process.pid == pid and each.is_usable), None)

    def _give(self, handle: WorkerHandle, place: int, usable: int) -> None:
        """Gives a worker the job at `place`, and those after it that may go with it, sharing with `usable` workers."""
        job = self._jobs[place]
        loader = job.loader
        most = loader.bundle_size
        if loader.spreads:
            most = min(most, -(-(len(self._jobs) - place) // usable))
        try:
            bundle = Bundle(self._next_number, loader, loader.slots.acquire())
        except OSError as error:
            job.refuse(error, mmap.PAGESIZE)  # and is taken out as others that are done
            return
        self._next_number += 1
        handle.begin_bundle(bundle)
        try:
            self._fill(bundle, handle, place, most)
            loader.totals.queued_s += len(bundle.jobs) * time.monotonic() - sum(job.queued_at for job in bundle.jobs)
            self._workers.trim(loader)
            handle.send_bundle(bundle)
            self._workers.watch_room(handle)
        except BaseException:  # Ctrl-C in a consumer: the worker may have half a message
            handle.process.kill()
            raise

    def _fill(self, bundle: Bundle, handle: WorkerHandle, place: int, most: int) -> None:
        jobs = self._jobs
        self._move(bundle, handle, place)
        while len(bundle.jobs) < most and place < len(jobs) and not bundle.jobs[0].alone:
            job = jobs[place]
            if job.loader is not bundle.loader or job.alone or job.cancelled:
                break
            own = self._own_worker(job)
            if own is None or own is handle:
                self._move(bundle, handle, place)
            else:
                place += 1

    def _move(self, bundle: Bundle, handle: WorkerHandle, place: int) -> None:
        """Moves the job at `place` to a bundle."""
        self._jobs.rotate(-place)
        bundle.add(self._jobs.popleft())
        self._jobs.rotate(place)
        bundle.loader.set_worker(bundle.jobs[-1].request, handle.process.pid)


_MOST_WAITING = 2


def _idlest(handles: Sequence[WorkerHandle]) -> WorkerHandle:
    return min(handles, key=lambda handle: len(handle.bundles))
