"""What a worker's end says of the batch that it was at: run it again, leave a sample out, or give it up.

A batch that two workers died on is given up, and so is one that took too long twice; where samples may be left out, the
sample that did it is, and the batch goes on without it. A worker that somebody killed before the batch's first sample,
or that had no descriptor left, says little against the batch: five of them do. Nothing here touches a process.
"""

from __future__ import annotations

from collections.abc import Sequence

from keras_mp.errors import BatchTimeout, WorkerCrashed
from keras_mp.loading.base import SAMPLES_DONE
from keras_mp.memory.control import NOT_STARTED
from keras_mp.workers.faults import Fault, WorkerEnd
from keras_mp.workers.jobs import Job

_OWN_SHARE = 0.25  # of a batch's timeout: a sample that took longer is blamed for it, otherwise the batch as a whole
_TRIES, _UNSTARTED_TRIES = 2, 5


def record_end(job: Job, end: WorkerEnd, pid: int, killed_at: float) -> None:
    """Holds a worker's end against the batch that it was at; gives up a batch, or a sample, that has had its tries.

    Args:
        job: the batch.
        end: how the worker ended.
        pid: its process.
        killed_at: when it was killed, in seconds of `time.monotonic`; 0.0 if it was not.
    """
    position, samples = job.position, job.loader.samples
    is_late = end.cause == "late"
    if end.lacked_descriptor or (end.is_from_outside and position == NOT_STARTED and end.cause != "broken"):
        kind, tries = "unstarted", _UNSTARTED_TRIES
    else:
        kind, tries = ("BatchTimeout" if is_late else "WorkerCrashed"), _TRIES
    took_its_time = end.was_stopped or killed_at - job.sample_since > _OWN_SHARE * (job.loader.timeout_s or 0.0)
    is_to_blame = kind != "unstarted" and (not is_late or took_its_time)
    blamed = position if position >= 0 and samples.may_be_left_out and is_to_blame else None
    index = samples.index_at(job.request, position)
    at = "after its last sample" if position == SAMPLES_DONE else "before its first sample"
    at = f"at sample {position} of the batch" if position >= 0 else at
    where = at if index is None else f"at sample {index}"
    job.faults.append(Fault(kind, blamed, f"process {pid} {end.text}, {where}"))
    same = [fault.text for fault in job.faults if (fault.kind, fault.position) == (kind, blamed)]
    if len(same) < tries:
        return
    if blamed is not None:
        _leave_out(job, blamed, kind, same)
    else:
        _give_up(job, end)


def _leave_out(job: Job, position: int, kind: str, faults: Sequence[str]) -> None:
    """Goes on without a sample, which is listed as failed."""
    how = "took too long in a worker" if kind == "BatchTimeout" else "ended its worker"
    message = f"{how} {len(faults)} times: {'; '.join(faults)}"
    failure = job.loader.samples.failure(job.request, position, kind, message)
    job.request = job.request._replace(failed=(*job.request.failed, (position, failure)))


def _give_up(job: Job, end: WorkerEnd) -> None:
    texts = [fault.text for fault in job.faults]
    faults = f"{'twice' if len(texts) == 2 else f'{len(texts)} times'}: {'; '.join(texts)}."
    if end.cause == "late":
        advice = (
            "Raise timeout= (a worker's first batch includes importing what the dataset needs), or make the source "
            "and transform give up by themselves."
        )
        job.fail(BatchTimeout(f"{job.name} took too long in a worker, {faults} {advice}"))
        return
    if end.lacked_descriptor:
        advice = "Close the files that the dataset's code opens, or raise the limit on open files (ulimit -n)."
    else:
        advice = (
            "Load that sample with workers=0 under a debugger; SIGKILL often means that memory ran out (dmesg), "
            "SIGSEGV a fault in compiled code, whose traceback is on stderr above."
        )
    job.fail(WorkerCrashed(f"{job.name} ended its worker {faults} {advice}"))
