"""What parent and workers send each other; how it travels is the affair of `memory.frames`.

`Setup` and then `SetLoader`, `Run`, `Forget` go to a worker; `Ready` and then a `Reply` to each `Run` come back. No
array is ever in a message: only its place in a slot, which is (offset, bytes).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
from typing import NamedTuple

from keras_mp.errors import KerasMPError, SampleError, SampleFailure, sample_error
from keras_mp.loading.timing import Work
from keras_mp.memory import pickling
from keras_mp.plan.request import Request

# The exit code of a worker to which the kernel could give no descriptor.
EXIT_NO_DESCRIPTOR = 75  # EX_TEMPFAIL of sysexits.h
# What the system says when it has none, for this process or for all.
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


Place = tuple[int, int]  # (offset, bytes) in a slot or segment


class Setup(NamedTuple):
    """First message to a worker: how its interpreter should look."""

    path: list[str]
    python_path: str | None


class Ready(NamedTuple):
    """First message from a worker: it has set itself up.

    `where_fd` is its own descriptor of a memory file to which it writes, on SIGUSR1, where in its code it stands.
    """

    pid: int
    where_fd: int


@dataclasses.dataclass(frozen=True)
class SetLoader:
    """A loader, or a new version of one, and descriptors: of the pickle's segment, of the large arrays' one, and of its
    cache.

    Attributes:
        loader: its number.
        version: counts its states.
        pickle: place of the pickle, in the first segment.
        small, large: places of the out-of-band buffers in each of the two, in the order of the pickle.
        order: for each buffer, whether it is a large one.
        sizes: bytes of the two segments.
        files: how many descriptors come after these.
    """

    loader: int
    version: int
    pickle: Place
    small: list[Place]
    large: list[Place]
    order: list[bool]
    sizes: tuple[int, int]
    files: int = 0


class Run(NamedTuple):
    """A request for batches, to be built in one slot.

    `requests` may be the length of their pickle, which is then at the start of the slot. A slot the worker has not seen
    yet comes as a descriptor.
    """

    number: int
    loader: int
    slot: int
    slot_size: int
    requests: list[Request] | int


class Forget(NamedTuple):
    """What will not be used any more: a loader and all its slots, or (with numbers) slots of it."""

    loader: int
    slots: tuple[int, ...] | None = None


class Done(NamedTuple):
    """A batch: its pickle, or where that lies; the places of its buffers."""

    header: bytes | Place
    buffers: list[Place]
    failures: tuple[SampleFailure, ...]
    load_s: float

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(size for _, size in self.buffers)


class Refused(NamedTuple):
    """A batch for which the system refused shared memory.

    Attributes:
        error: the system's.
        nbytes: what the slot would have been, at most.
        where: the process, in words.
    """

    error: OSError
    nbytes: int
    where: str


class Failed(NamedTuple):
    """A batch that could not be made; `error` is the pickled exception, where it can be pickled at all."""

    failure: SampleFailure
    note: str
    error: bytes | None


class Reply(NamedTuple):
    """What became of a run's batches, in order, and the slot's new size. Batches that are missing were not begun.

    `slot_is_held` says that user code has kept an array in the slot, which may not be used again then. `work` is what
    all of them took.
    """

    number: int
    batches: list[Done | Failed | Refused]
    slot_size: int
    slot_is_held: bool = False
    work: Work | None = None


def failed_batch(error: BaseException, request: Request | None = None, stage: str = "worker") -> Failed:
    """The answer that says `error`, in a form that survives pickling."""
    if isinstance(error, SampleError):
        return Failed(error.failure, error.note, _dump_exception(error.__cause__))
    epoch, batch = (-1, -1) if request is None else (request.epoch, request.batch)
    failure = SampleFailure.of(
        error, stage=stage, index=None, item="", epoch=epoch, batch=batch, where=f"process {os.getpid()}"
    )
    note = " (a batch crosses to the training process by pickle)" if stage == "result" else ""
    return Failed(failure, note, _dump_exception(error))


def _dump_exception(error: BaseException | None) -> bytes | None:
    """The pickled exception, if it survives the way there and back: many do not take their own arguments."""
    if error is None:
        return None
    try:
        data = pickling.dump_result(error, [])
        pickle.loads(data)
        return data
    except Exception:
        return None


def error_of(reply: Failed) -> BaseException:
    """The exception that a worker's `Failed` stands for."""
    cause: BaseException | None = None
    if reply.error is not None:
        try:
            cause = pickle.loads(reply.error)
        except Exception:  # its class exists in the worker only; the text has its traceback
            cause = None
    if reply.failure.stage != "worker":
        return sample_error(reply.failure, cause, reply.note)
    which = "" if reply.failure.batch < 0 else f" for batch {reply.failure.batch} of epoch {reply.failure.epoch}"
    error = KerasMPError(
        f"{reply.failure.where} could not run the dataset's code{which}: {reply.failure.type}: "
        f"{reply.failure.message}\n\nTraceback from the worker:\n{reply.failure.traceback}"
    )
    error.__cause__ = cause
    return error
