"""Jobs that wait for a worker, and which of them goes where.

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
        while jobs:
            job = jobs[0]
            loader = job.loader
            if loader.closed:
                job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
            if job.cancelled or job.done:
                jobs.popleft()
                continue
            depth = loader.depth
            usable = [handle for handle in self._workers.handles if handle.has_room(depth)]
            if not usable:
                break
            most = loader.bundle_size
            if loader.spreads:
                most = min(most, -(-len(jobs) // len(usable)))
            self._give(min(usable, key=lambda handle: len(handle.bundles)), loader, most)

    def _give(self, handle: WorkerHandle, loader: SharedLoader, most: int) -> None:
        """Gives a worker the first job, and those after it that may go with it, `most` in all."""
        try:
            bundle = Bundle(self._next_number, loader, loader.slots.acquire())
        except OSError as error:
            self._jobs[0].refuse(error, mmap.PAGESIZE)  # and is taken out as others that are done
            return
        self._next_number += 1
        handle.begin_bundle(bundle)
        try:
            self._fill(bundle, most)
            loader.totals.queued_s += len(bundle.jobs) * time.monotonic() - sum(job.queued_at for job in bundle.jobs)
            self._workers.trim(loader)
            handle.send_bundle(bundle)
            self._workers.watch_room(handle)
        except BaseException:  # Ctrl-C in a consumer: the worker may have half a message
            handle.process.kill()
            raise

    def _fill(self, bundle: Bundle, most: int) -> None:
        jobs = self._jobs
        bundle.add(jobs.popleft())
        while len(bundle.jobs) < most and jobs and not bundle.jobs[0].alone:
            job = jobs[0]
            if job.loader is not bundle.loader or job.alone or job.cancelled:
                break
            bundle.add(jobs.popleft())
