"""One worker as the dispatcher sees it: what it is doing, whether it is late, and what its end says of its batches."""

from __future__ import annotations

import collections
import signal

from keras_mp.errors import BatchTimeout, WorkerCrashed
from keras_mp.loading.loader import SAMPLES_DONE
from keras_mp.memory import frames
from keras_mp.memory.control import NOT_STARTED
from keras_mp.workers.jobs import Bundle, Fault, Job
from keras_mp.workers.messages import EXIT_NO_DESCRIPTOR
from keras_mp.workers.process import KILL_GRACE_S, Process

EXIT_GRACE_S = 2.0  # what a worker gets to end by itself, or to finish a batch that nobody wants any more
_START_TIMEOUT_S = 120.0
_STOPPED_GRACE_S = 5.0  # who stops all of a program's processes for a moment lets them go on one after the other
_OWN_SHARE = 0.25  # of a batch's timeout: a sample that took longer is blamed for it, otherwise the batch as a whole
_UNSTARTED_TRIES = 5  # workers that may be killed before a batch's first sample, before the batch is blamed
# Exit codes that say nothing against a batch that the worker had not begun.
INNOCENT_EXITS = (-signal.SIGKILL, -signal.SIGTERM, EXIT_NO_DESCRIPTOR)


class Seat:
    """A worker process and what it is doing."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.frames = frames.FrameReader(process.sock)
        self.writer = frames.FrameWriter(process.sock)
        self.bundles: collections.deque[Bundle] = collections.deque()
        self.head_since = 0.0
        self.stopped_since: float | None = None
        self.versions: dict[int, int] = {}
        self.slots: set[tuple[int, int]] = set()
        self.ended_for = ""
        self.ended_at: Job | None = None
        self.broken = ""
        self.removed_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether the worker is ready and has nothing to do."""
        return not self.bundles and self.process.ready and self.process.killed_at is None

    def survives(self, now: float) -> bool:
        """Whether it has been killed, and has had the time to be gone."""
        return self.process.killed_at is not None and now - self.process.killed_at > KILL_GRACE_S

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

    def _took_its_time(self, job: Job) -> bool:
        """Whether it is the sample in progress that took so long, and not all of them together."""
        lasted_s = (self.process.killed_at or 0.0) - job.sample_since()
        return self.stopped_since is not None or lasted_s > _OWN_SHARE * (job.task.timeout_s or 0.0)

    def judge(self, job: Job, how: str) -> None:
        """Blames `job`, or its sample, if the end of this worker is its doing.

        A batch that two workers died on is given up, and so is one that took too long twice; where samples may be left
        out, the sample that did it is, and the batch goes on without it. A worker that somebody killed before the
        batch's first sample says little against the batch: five of them do.

        Args:
            job: the batch that the worker was at.
            how: what became of the worker, in words.
        """
        if job.done or (self.ended_for and job is not self.ended_at):
            return  # it was the batch before this one that the worker was ended for
        position = job.position()
        index = None if position < 0 else job.task.sample_at(job.request, position)
        at = "after its last sample" if position == SAMPLES_DONE else "before its first sample"
        from_outside = self.stopped_since is not None if self.ended_for else self.process.exit_code in INNOCENT_EXITS
        if from_outside and position == NOT_STARTED and job.lease is not None and not self.broken:
            kind, tries = "unstarted", _UNSTARTED_TRIES
        else:
            kind, tries = ("BatchTimeout" if self.ended_for else "WorkerCrashed"), 2
        its_own = kind == "WorkerCrashed" or self._took_its_time(job)
        blamed = position if position >= 0 and job.task.leaves_out and its_own else None
        where = at if index is None else f"at sample {index}"
        job.faults.append(Fault(kind, blamed, f"process {self.process.pid} {how}, {where}"))
        same = [fault.text for fault in job.faults if (fault.kind, fault.position) == (kind, blamed)]
        if len(same) < tries:
            return
        if blamed is not None:
            job.leave_out(blamed, kind, same)
            return
        texts = [fault.text for fault in job.faults]
        faults = f"{'twice' if len(texts) == 2 else f'{len(texts)} times'}: {'; '.join(texts)}."
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
