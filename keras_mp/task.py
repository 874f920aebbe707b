"""What a pool is asked to do: tasks (one dataset's loader, packed for the workers), jobs (one batch each), and bundles
(jobs that one worker does in one go)."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp import wire
from keras_mp.arena import NOT_STARTED, Arena, Lease
from keras_mp.errors import KerasMPError, PoolClosed
from keras_mp.loading import Loaded, Loader, Request
from keras_mp.messages import Done, Failed, Load, error_of
from keras_mp.segment import Segment, map_segment

# Buffers from this size on are kept apart, so that an epoch that changes only an index array does not copy the images.
_LARGE_BYTES = 1 << 20

# Batches that take less than this are handed out several at a time, and the next ones before these are done: the way
# there and back would cost more than a batch. Others are handed out one by one, so that none waits behind a slow one.
_SHORT_LOAD_S, _SHORT_BUNDLE = 0.002, 4
# And of these one worker makes more than a consumer can take, so that it costs nothing to leave the others idle.
_TINY_LOAD_S, _TINY_BUNDLE = 0.00015, 8
_BUNDLE_BYTES = 1 << 20  # as one batch that is kept keeps the slot of them all

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
        self.update(loader)

    def update(self, loader: Loader) -> None:
        """Packs a new state of the loader; large arrays that have not changed stay where they are.

        Raises:
            KerasMPError: something in it cannot be pickled.
        """
        buffers: wire.Buffers = []
        try:
            body = wire.dump_user_object(loader, "dataset", buffers)
        except KerasMPError:
            for field in dataclasses.fields(loader):  # type: ignore[arg-type]  # say which part it is
                wire.dump_user_object(getattr(loader, field.name), field.name)
            raise
        is_large = [buffer.raw().nbytes >= _LARGE_BYTES for buffer in buffers]
        large = [buffer for buffer, big in zip(buffers, is_large, strict=True) if big]
        small = [pickle.PickleBuffer(body)] + [buffer for buffer, big in zip(buffers, is_large, strict=True) if not big]
        small_places, small_size = wire.place_buffers(small)
        large_places, large_size = wire.place_buffers(large)
        before, segment = self._large, None
        try:
            if before is None or not before.holds(large, large_places, large_size):
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
            addresses = [np.frombuffer(buffer.raw(), np.uint8).ctypes.data for buffer in large]
            self._large_places = dict(zip(addresses, large_places, strict=True))
            self._message = Load(
                task=self.number,
                version=self.version,
                pickle=small_places[0],
                small=small_places[1:],
                large=large_places,
                order=is_large,
                sizes=(small_size, large_size),
            )
            if self.closed:
                self._close_segments()

    def load_message(self) -> tuple[Load, list[int]]:
        """The message that gives a worker this task, and the descriptors that go with it, valid until the next call.

        Raises:
            PoolClosed: the task has been closed.
        """
        with self._lock:
            while self._retired:
                self._retired.pop().close()
            if self._message is None or self._small is None or self._large is None:
                raise PoolClosed("the dataset has been closed")
            return self._message, [self._small.fd, self._large.fd]

    def shared_view(self, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """A large array of the loader's as it lies in shared memory, read-only; None if it does not lie there whole.

        Who uses it in place of the array lets that go: the data is then in memory once, for parent and workers.
        """
        place = self._large_places.get(array.ctypes.data)
        if place is None or place[1] != array.nbytes or not array.flags.c_contiguous or self._large is None:
            return None
        memory = map_segment(self._large.fd, self._large.size)
        return np.ndarray(array.shape, array.dtype, buffer=memory[place[0] : place[0] + place[1]].data)

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
        """Gives up segments and slots; batches that the consumer holds stay valid."""
        with self._lock:
            if not self.closed:
                self.closed, self.closed_at = True, time.monotonic()
            self.arena.close()
            self._close_segments()

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
        self.faults: list[str] = []  # what became of the workers that had it
        self.crashes = 0
        self.timeouts = 0
        self.unstarted = 0  # workers that ended with no sign that this batch was the cause
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

    def sample_in_progress(self) -> int | None:
        """Source index of the sample that the worker was at, or None if it had not started on this batch."""
        place, position = (0, NOT_STARTED) if self.lease is None else self.lease.progress()
        begun = place == self.place and 0 <= position < len(self.request.samples)
        return int(self.request.samples[position]) if begun else None

    @property
    def is_finished(self) -> bool:
        """Whether the worker was done with this batch, though its reply has not come."""
        return self.lease is not None and self.lease.progress()[0] > self.place

    @property
    def name(self) -> str:
        """The batch, in words."""
        return f"batch {self.request.batch} of epoch {self.request.epoch}"


@dataclasses.dataclass
class Bundle:
    """Jobs that a worker does one after the other, in one slot: one message there, one back."""

    number: int
    jobs: list[Job] = dataclasses.field(default_factory=list)
    lease: Lease | None = None
