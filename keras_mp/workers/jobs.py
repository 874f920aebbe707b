"""A batch on its way, and several that go together. A job is what a consumer waits for; the dispatcher answers it once.

Two threads meet in a job, by its latch alone: what the dispatcher's thread writes before `finish`, `fail` or `refuse`
let the latch go, the consumer's reads after `wait`.
"""

from __future__ import annotations

import dataclasses
import errno
import threading
import time

from keras_mp.errors import KerasMPError, PoolClosed
from keras_mp.loading.base import Loaded
from keras_mp.memory.control import NOT_STARTED
from keras_mp.memory.slots import Lease
from keras_mp.plan.request import Request
from keras_mp.workers.faults import Fault
from keras_mp.workers.messages import NO_DESCRIPTOR, Done, Failed, error_of
from keras_mp.workers.shared_loader import SharedLoader


class Job:
    """One batch on its way: in the queue, on a worker, or ready."""

    def __init__(self, loader: SharedLoader, request: Request) -> None:
        self.loader = loader
        self.request = request
        self.queued_at = time.monotonic()
        self.lease: Lease | None = None
        self.index = 0  # among the batches in that slot
        self.cancelled = False
        self.alone = False  # never in a bundle again, as something went wrong in one
        self.done = False
        self.refused = False  # memory for it, by the system
        self.faults: list[Fault] = []  # what became of the workers that had it
        self._latch = threading.Lock()
        self._latch.acquire()
        self._reply: Done | Failed | None = None
        self._error: BaseException | None = None

    @property
    def name(self) -> str:
        """The batch, in words."""
        return f"batch {self.request.batch} of epoch {self.request.epoch}"

    # -- the dispatcher's side -----------------------------------------------------------------------------------

    def finish(self, reply: Done | Failed) -> None:
        """The worker has answered."""
        if not self.done:
            self.done = True
            self._reply = reply
            self._latch.release()

    def fail(self, error: BaseException) -> None:
        """There will be no answer. The slot goes back: no worker may be writing to it, unless the loader is closed."""
        if not self.done:
            self.done = True
            self._error = error
            self.lease = None
            self._latch.release()

    def refuse(self, error: OSError, nbytes: int, where: str = "the training process") -> None:
        """The system has refused memory for the batch, `nbytes` in all; it can be asked for again."""
        self.refused |= not self.done
        self.fail(
            KerasMPError(
                f"no shared memory for {self.name}: {where} was refused {nbytes} bytes: {error}. {_remedy(error)} "
                "Nothing is lost: the batch may be asked for again."
            )
        )

    @property
    def position(self) -> int:
        """Position of the sample that the worker is at, `NOT_STARTED` or `SAMPLES_DONE`."""
        control = None if self.lease is None else self.lease.control
        return NOT_STARTED if control is None or control.batch != self.index else control.position

    @property
    def sample_since(self) -> float:
        """When that sample began, in seconds of `time.monotonic`."""
        return 0.0 if self.lease is None else self.lease.control.sample_since

    @property
    def is_finished(self) -> bool:
        """Whether the worker was done with this batch, though its reply has not come."""
        return self.lease is not None and self.lease.control.batch > self.index

    # -- the consumer's side -------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> bool:
        """Waits for the answer; whether it is there."""
        if not self._latch.acquire(timeout=timeout_s):
            return False
        self._latch.release()
        return True

    def take(self) -> Loaded:
        """The batch, whose arrays alias the slot. Only once: the job keeps nothing.

        Raises:
            SampleError: user code failed.
            WorkerCrashed, BatchTimeout, PoolClosed, KerasMPError: as the pool found.
        """
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame: a cycle would keep the pool alive until it is collected
        reply, lease = self._reply, self.lease
        self._reply = self.lease = None
        if isinstance(reply, Failed):
            raise error_of(reply)
        if reply is None or lease is None:
            raise PoolClosed("this batch has been taken already")
        lease.slot.in_flight = False
        try:
            return Loaded(lease.decode(reply.header, reply.buffers), reply.failures)
        except Exception as error:
            raise KerasMPError(
                f"{self.name} came from its worker, but cannot be unpickled here: {type(error).__name__}: {error}. "
                "Return arrays, or objects of classes that this process can import too."
            ) from error


@dataclasses.dataclass
class Bundle:
    """Jobs that a worker does one after the other, in one slot: one message there, one back."""

    number: int
    loader: SharedLoader
    lease: Lease
    jobs: list[Job] = dataclasses.field(default_factory=list)

    def add(self, job: Job) -> None:
        """Puts a job in the bundle, and its batch in the bundle's slot."""
        job.lease, job.index = self.lease, len(self.jobs)
        self.jobs.append(job)


def _remedy(error: OSError) -> str:
    smaller = "or lower batch_size or max_queue_size."
    if error.errno in NO_DESCRIPTOR:
        return "Raise the limit on open files (ulimit -n), close files, hold fewer batches, or lower max_queue_size."
    if error.errno == errno.EFBIG:
        return f"Raise the limit on the size of files (ulimit -f), {smaller}"
    if error.errno == errno.ENOMEM:
        return f"Free memory, raise the limit on address space (ulimit -v), {smaller}"
    return f"Free memory, {smaller}"
