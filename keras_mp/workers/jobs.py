"""What a pool is asked to do: tasks (one dataset's loader, packed for the workers), jobs (one batch each), and bundles
(jobs that one worker does in one go)."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keras_mp.errors import KerasMPError, PoolClosed, SampleFailure, short_repr
from keras_mp.loading.loader import Loaded, Loader, SampleLoader
from keras_mp.memory import files, pickling
from keras_mp.memory.control import NOT_STARTED
from keras_mp.memory.segment import Segment
from keras_mp.memory.slots import Arena, Lease
from keras_mp.plan.request import Request
from keras_mp.workers.messages import Done, Failed, Load, error_of

# Buffers from this size on are kept apart, so that an epoch that changes only an index array does not copy the images.
_LARGE_BYTES = 1 << 20

# Batches that take less than this are handed out several at a time, and the next ones before these are done: the way
# there and back would cost more than a batch. Others are handed out one by one, so that none waits behind a slow one.
_SHORT_LOAD_S, _SHORT_BUNDLE = 0.002, 4
# And of these one worker makes more than a consumer can take, so that it costs nothing to leave the others idle.
_TINY_LOAD_S, _TINY_BUNDLE = 0.00015, 8
_BUNDLE_BYTES = 1 << 20  # as one batch that is kept keeps the slot of them all

_PLAIN_TYPES = (str, bytes, int, float, type(pathlib.Path()))  # whose repr runs no code of the user's

_numbers = itertools.count()


class Task:
    """One dataset's loader, as the workers get it, and the slots its batches are built in."""

    def __init__(self, loader: Loader, timeout_s: float | None) -> None:
        self.number = next(_numbers)
        self.version = 0
        self.timeout_s = timeout_s
        self.arena = Arena()
        self.closed = False
        self.closed_at = 0.0
        self._mean_load_s = _SHORT_LOAD_S
        self._batch_bytes = _BUNDLE_BYTES
        self._lock = threading.Lock()
        self._large: Segment | None = None
        self._large_places: dict[int, tuple[int, int]] = {}  # by the address the buffer came from
        self._small: Segment | None = None
        self._message: Load | None = None
        self._retired: list[Segment] = []
        # What tells a sample by its position, without the source's arrays; None where no sample may be left out.
        self._indexer: SampleLoader | None = None
        self._stage = "source"
        if isinstance(loader, SampleLoader) and loader.on_error != "raise":
            names = loader.source if type(loader.source) in (list, tuple) else range(len(loader.source))
            self._indexer = SampleLoader(names, seed=loader.seed)
            self._stage = "source" if loader.transform is None else "transform"
        self.update(loader)

    def update(self, loader: Loader) -> bool:
        """Packs a new state of the loader; large arrays that have not changed stay where they are.

        Where nothing has changed it costs the pickling, and a comparison: a tenth of a second for 1 GiB of arrays, and
        none for what the loader has as a `shared_view`.

        Returns:
            Whether anything has changed since the last time.

        Raises:
            KerasMPError: something in it cannot be pickled.
        """
        buffers: pickling.Buffers = []
        try:
            body = pickling.dump_user_object(loader, "dataset", buffers)
        except KerasMPError:
            for field in dataclasses.fields(loader):  # type: ignore[arg-type]  # say which part it is
                pickling.dump_user_object(getattr(loader, field.name), field.name)
            raise
        is_large = [buffer.raw().nbytes >= _LARGE_BYTES for buffer in buffers]
        large = [buffer for buffer, big in zip(buffers, is_large, strict=True) if big]
        small = [pickle.PickleBuffer(body)] + [buffer for buffer, big in zip(buffers, is_large, strict=True) if not big]
        small_places, small_size = files.place_buffers(small)
        large_places, large_size = files.place_buffers(large)
        message = Load(
            task=self.number,
            version=self.version,
            pickle=small_places[0],
            small=small_places[1:],
            large=large_places,
            order=is_large,
            sizes=(small_size, large_size),
        )
        addresses = [np.frombuffer(buffer.raw(), np.uint8).ctypes.data for buffer in large]
        before, small_before, segment = self._large, self._small, None
        same_large = before is not None and before.holds(large, large_places, large_size)
        if same_large and small_before is not None and message == self._message:
            if small_before.holds(small, small_places, small_size):
                return False
        try:
            if not same_large:
                segment = Segment(large, large_places, large_size)
            small_segment = Segment(small, small_places, small_size)
        except OSError as error:
            if segment is not None:
                segment.close()
            raise KerasMPError(
                f"no shared memory for the dataset's source, {small_size + large_size} bytes: {error}. Free memory or "
                "file descriptors (ulimit -n), or pass what is read from disk sample by sample: paths, or a np.memmap."
            ) from error
        with self._lock:  # the dispatcher may be handing out the version before this one
            self._retired += [old for old in (self._small, before if segment else None) if old is not None]
            self._small, self._large = small_segment, segment or before
            self.version += 1
            self._large_places = dict(zip(addresses, large_places, strict=True))
            self._message = dataclasses.replace(message, version=self.version)
        if self.closed:
            self.close()
        return True

    def load_message(self) -> tuple[Load, list[int]]:
        """The message that gives a worker this task, and the descriptors that go with it, valid until the next call.

        Raises:
            PoolClosed: the task has been closed.
        """
        with self._lock:
            while self._retired:
                self._retired.pop().close()
            found = self._message, self._small, self._large
        if self.closed:
            self.close()
        message, small, large = found
        if self.closed or message is None or small is None or large is None:
            raise PoolClosed("the dataset has been closed")
        return message, [small.fd, large.fd]

    def shared_view(self, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """A large array of the loader's as it lies in shared memory, read-only; None if it does not lie there whole.

        Who uses it in place of the array lets that go: the data is then in memory once, for parent and workers.
        """
        place = self._large_places.get(array.ctypes.data)
        if place is None or place[1] != array.nbytes or not array.flags.c_contiguous or self._large is None:
            return None
        memory = self._large.view()
        return np.ndarray(array.shape, array.dtype, buffer=memory[place[0] : place[0] + place[1]].data)

    @property
    def leaves_out(self) -> bool:
        """Whether a batch may be made without a sample that fails."""
        return self._indexer is not None

    def sample_at(self, request: Request, position: int) -> int | None:
        """Source index of a request's sample, or None if it cannot be told."""
        if position < len(request.samples):
            return int(request.samples[position])
        return None if self._indexer is None else self._indexer.index_at(request, position)

    def failed_sample(self, request: Request, position: int, kind: str, message: str) -> SampleFailure:
        """The record of a sample that no worker survives, or that none has the time for."""
        index = self.sample_at(request, position)
        names = () if self._indexer is None or isinstance(self._indexer.source, range) else self._indexer.source
        item = names[index] if index is not None and index < len(names) else None
        return SampleFailure(
            stage=self._stage,
            index=index,
            item=short_repr(item) if _is_plain(item) else "not read",
            epoch=request.epoch,
            batch=request.batch,
            type=kind,
            message=message,
            traceback="(none: the worker was ended; what compiled code said of a crash is on stderr)\n",
            where="the training process",
        )

    @property
    def depth(self) -> int:
        """How many bundles of this task one worker may hold at once."""
        return 2 if self._mean_load_s < _SHORT_LOAD_S else 1

    @property
    def bundle_size(self) -> int:
        """How many of this task's batches may go to a worker together."""
        if self._mean_load_s >= _SHORT_LOAD_S:
            return 1
        most = _SHORT_BUNDLE if self.spreads else _TINY_BUNDLE
        return max(1, min(most, _BUNDLE_BYTES // max(1, self._batch_bytes)))

    @property
    def spreads(self) -> bool:
        """Whether it is worth while to keep several workers busy."""
        return self._mean_load_s >= _TINY_LOAD_S

    def note_load(self, load_s: float, nbytes: int) -> None:
        """Takes a batch's loading time and size into account."""
        self._mean_load_s += 0.2 * (load_s - self._mean_load_s)
        self._batch_bytes = nbytes

    def close(self) -> None:
        """Gives up segments and slots; batches that the consumer holds stay valid.

        Called by finalisers too, so it waits for no lock: who holds it closes what it finds closed.
        """
        if not self.closed:
            self.closed, self.closed_at = True, time.monotonic()
        self.arena.close()
        if self._lock.acquire(blocking=False):
            try:
                self._close_segments()
            finally:
                self._lock.release()

    def _close_segments(self) -> None:
        for segment in (self._small, self._large, *self._retired):
            if segment is not None:
                segment.close()
        self._small = self._large = self._message = None
        self._retired.clear()


class Job:
    """One batch on its way: in the queue, on a worker, or ready."""

    def __init__(self, task: Task, request: Request) -> None:
        self.task = task
        self.request = request
        self.lease: Lease | None = None
        self.place = 0  # among the batches in that slot
        self.cancelled = False
        self.alone = False  # never in a bundle again, as something went wrong in one
        self.by_socket = False  # as the slot that it was built in could not be mapped
        self.done = False
        self.faults: list[Fault] = []  # what became of the workers that had it
        self._latch = threading.Lock()
        self._latch.acquire()
        self._reply: Done | Failed | None = None
        self._error: BaseException | None = None

    def finish(self, reply: Done | Failed) -> None:
        """The worker has answered."""
        if not self.done:
            self.done = True
            self._reply = reply
            self._latch.release()

    def fail(self, error: BaseException) -> None:
        """There will be no answer. The slot goes back, so no worker may be writing to it unless its task is closed."""
        if not self.done:
            self.done = True
            self._error = error
            self.lease = None
            self._latch.release()

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
            WorkerCrashed, BatchTimeout, PoolClosed: as the pool found.
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
        if reply is None:
            raise PoolClosed("this batch has been taken already")
        if lease is not None:
            lease.slot.in_flight = False
        if reply.buffers and isinstance(reply.buffers[0], bytes):
            # Writable, like every other batch.
            own = [bytearray(data) for data in reply.buffers if isinstance(data, bytes)]
            header = reply.header
            if not isinstance(header, bytes):
                raise KerasMPError("a batch came with its buffers in the message but its header elsewhere")
            return Loaded(self._unpickle(pickle.loads, header, buffers=own), reply.failures)
        places = [place for place in reply.buffers if isinstance(place, tuple)]
        if lease is None:
            if not isinstance(reply.header, bytes):
                raise KerasMPError("a batch came without the slot that holds it")
            return Loaded(self._unpickle(pickle.loads, reply.header), reply.failures)
        return Loaded(self._unpickle(lease.decode, reply.header, places), reply.failures)

    def _unpickle(self, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return load(*arguments, **options)
        except Exception as error:
            raise KerasMPError(
                f"{self.name} came from its worker, but cannot be unpickled here: {type(error).__name__}: {error}. "
                "Return arrays, or objects of classes that this process can import too."
            ) from error

    def position(self) -> int:
        """Position of the sample that the worker is at, `NOT_STARTED` or `SAMPLES_DONE`."""
        control = None if self.lease is None else self.lease.control
        return NOT_STARTED if control is None or control.place != self.place else control.position

    def sample_since(self) -> float:
        """When that sample began, in seconds of `time.monotonic`."""
        return 0.0 if self.lease is None else self.lease.control.sample_since

    def leave_out(self, position: int, kind: str, faults: Sequence[str]) -> None:
        """Goes on without a sample, which is listed as failed."""
        how = "took too long in a worker" if kind == "BatchTimeout" else "ended its worker"
        message = f"{how} {len(faults)} times: {'; '.join(faults)}"
        failure = self.task.failed_sample(self.request, position, kind, message)
        self.request = self.request._replace(failed=(*self.request.failed, (position, failure)))

    @property
    def is_finished(self) -> bool:
        """Whether the worker was done with this batch, though its reply has not come."""
        return self.lease is not None and self.lease.control.place > self.place

    @property
    def name(self) -> str:
        """The batch, in words."""
        return f"batch {self.request.batch} of epoch {self.request.epoch}"


class Fault(NamedTuple):
    """The end of a worker that was at a batch.

    Attributes:
        kind: "WorkerCrashed", "BatchTimeout", or "unstarted" where nothing shows that the batch was the cause.
        position: of the sample that is blamed; None: the batch as a whole.
        text: what happened.
    """

    kind: str
    position: int | None
    text: str


def _is_plain(item: Any) -> bool:
    return type(item) in _PLAIN_TYPES or (type(item) in (tuple, list) and all(map(_is_plain, item)))


@dataclasses.dataclass
class Bundle:
    """Jobs that a worker does one after the other, in one slot: one message there, one back."""

    number: int
    jobs: list[Job] = dataclasses.field(default_factory=list)
    lease: Lease | None = None
