"""One worker as the dispatcher sees it: what it is doing, whether it is late, and what its end says of its batches."""

from __future__ import annotations

import collections
import signal

from keras_mp import wire
from keras_mp.errors import BatchTimeout, WorkerCrashed
from keras_mp.messages import EXIT_NO_DESCRIPTOR
from keras_mp.spawn import Process
from keras_mp.task import Bundle, Job

EXIT_GRACE_S = 2.0  # what a worker gets to end by itself, or to finish a batch that nobody wants any more
_START_TIMEOUT_S = 120.0
_STOPPED_GRACE_S = 5.0  # a terminal's Ctrl-Z stops parent and workers together; both go on within this
_UNSTARTED_TRIES = 5  # workers that may be killed before a batch's first sample, before the batch is blamed
# Exit codes that say nothing against a batch that the worker had not begun.
INNOCENT_EXITS = (-signal.SIGKILL, -signal.SIGTERM, EXIT_NO_DESCRIPTOR)


class Seat:
    """A worker process and what it is doing."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.frames = wire.FrameReader(process.sock)
        self.bundles: collections.deque[Bundle] = collections.deque()
        self.head_since = 0.0
        self.stopped_since: float | None = None
        self.versions: dict[int, int] = {}
        self.slots: set[tuple[int, int]] = set()
        self.ended_for = ""
        self.ended_at: Job | None = None
        self.broken = ""

    @property
    def jobs(self) -> list[Job]:
        """The batches that the worker has been asked for, in order."""
        return [job for bundle in self.bundles for job in bundle.jobs]

    def current(self) -> Job | None:
        """The batch that the worker is at."""
        return next((job for job in self.jobs if not job.is_finished), None)

    def missed_deadline(self, now: float) -> str:
        """What is wrong with a worker that has something to do, in words; "" if nothing is."""
        if self.process.ready:
            task = self.jobs[0].task
            if task.timeout_s is not None and now - self.head_since > task.timeout_s:
                return f"took longer than timeout={task.timeout_s:g} s"
            if task.closed and now - max(self.head_since, task.closed_at) > EXIT_GRACE_S:
                return "was at a batch of a closed dataset"
        elif now - self.process.started > _START_TIMEOUT_S:
            return f"was not ready within {_START_TIMEOUT_S:g} s"
        if not self.process.is_stopped():
            self.stopped_since = None
        elif self.stopped_since is None:
            self.stopped_since = now
        elif now - self.stopped_since > _STOPPED_GRACE_S:
            return f"stood stopped (SIGSTOP) for {_STOPPED_GRACE_S:g} s"
        return ""

    def judge(self, job: Job, ended: str) -> None:
        """Fails `job` if the end of this worker is its end too.

        A batch that two workers died on is given up, and so is one that took too long twice. A worker that somebody
        killed before the batch's first sample says little against the batch: five of them do.

        Args:
            job: the batch that the worker was at.
            ended: how the worker ended, in words.
        """
        if job.done or (self.ended_for and job is not self.ended_at):
            return  # it was the batch before this one that the worker was ended for
        sample = job.sample_in_progress()
        at = "before its first sample" if sample is None else f"at sample {sample}"
        job.faults.append(f"process {self.process.pid} {self.ended_for or ended}, {at}")
        from_outside = self.stopped_since is not None if self.ended_for else self.process.exit_code in INNOCENT_EXITS
        if from_outside and sample is None and job.lease is not None and not self.broken:
            job.unstarted += 1
        elif self.ended_for:
            job.timeouts += 1
        else:
            job.crashes += 1
        if max(job.timeouts, job.crashes) < 2 and job.unstarted < _UNSTARTED_TRIES:
            return
        faults = f"{'twice' if len(job.faults) == 2 else f'{len(job.faults)} times'}: {'; '.join(job.faults)}."
        if self.ended_for:
            advice = (
                "Raise timeout= (a worker's first batch includes importing what the dataset needs), or make the source "
                "and transform give up by themselves."
            )
            job.fail(BatchTimeout(f"{job.name} took too long in a worker, {faults} {advice}"))
        else:
            advice = (
                "Load that sample with workers=0 under a debugger; SIGKILL often means that memory ran out (dmesg), "
                "SIGSEGV a fault in compiled code, whose traceback is on stderr above."
            )
            job.fail(WorkerCrashed(f"{job.name} ended its worker {faults} {advice}"))
