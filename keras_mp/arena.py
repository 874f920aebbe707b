"""Shared memory for batches: slots that they are built in, and leases on them.

A *slot* is one anonymous memory file. The parent creates it, lends it to a worker for one batch, and hands the finished
arrays to the consumer without a copy; they stand on a *lease*, and when the last of them is gone the lease returns the
slot to its arena (P6). The files have no name, so nothing is left behind whoever is killed when (P4).

Layout of a slot: 64 bytes of control words, then the buffers, each at a multiple of 64 bytes. A worker that needs more
room extends the file and tells the parent its new size in the reply. The control words say which of the batches in the
slot the worker is at, at which sample of it and since when, for the parent to read should the worker die.

NOTE (no lock in a finaliser): a lease may die on any thread, also inside the allocator while a lock is held, so giving
a slot back is one `deque.append` and nothing else.
"""

from __future__ import annotations

import collections
import errno
import mmap
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp import wire

CONTROL_BYTES = 64

# Before Python 3.13 each mapping costs a descriptor of its own.
_KEEP_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
# Control words: the place of the batch in the slot, the position of the sample in the batch, and when it began (ns of
# the monotonic clock, which all processes share).
_PLACE, _POSITION, _SINCE = 0, 1, 2
NOT_STARTED = -1  # a position before the first sample

# A slot is kept for reuse if it is likely to be needed: as many as have lately been in use together, so that steady
# state creates none; but of those that a consumer has held and let go only a few, as it may have held a great many.
_RECENT_LEASES = 128  # more than are in flight at once, as an epoch begins with none
_LET_GO_TOGETHER = 4  # TensorFlow returns arrays several at a time
_SPARE_SLOTS, _SPARE_BYTES = 8, 16 << 20  # and some more where they weigh little


def create_memory_file() -> int:
    """A new anonymous memory file's descriptor.

    Raises:
        OSError: no descriptor or memory is left.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("keras_mp", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # already unlinked: macOS has no memfd
        return os.dup(file.fileno())


def round_to_page(size: int) -> int:
    """The next multiple of the page size."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Slot:
    """The parent's side of one slot."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.fd = create_memory_file()
        self.size = mmap.PAGESIZE
        self.retired = False
        self.in_flight = False  # lent, and its batches have not been taken yet
        self._map: npt.NDArray[np.uint8] | None = None
        try:
            os.ftruncate(self.fd, self.size)
            self.memory()
        except OSError:
            self.close()
            raise

    def memory(self) -> npt.NDArray[np.uint8]:
        """The whole slot as bytes, mapped anew after the worker has extended it."""
        if self._map is None or self._map.nbytes < self.size:
            if self.fd < 0:  # mmap would take it for anonymous memory
                raise OSError(errno.EBADF, "the slot has been closed")
            self._map = map_file(self.fd, self.size)
        return self._map

    def write(self, data: bytes) -> None:
        """Puts `data` behind the control words (a request too long for the socket)."""
        needed = CONTROL_BYTES + len(data)
        if needed > self.size:
            os.ftruncate(self.fd, round_to_page(needed))
            self.size = round_to_page(needed)
        self.memory()[CONTROL_BYTES:needed] = np.frombuffer(data, dtype=np.uint8)

    def close(self) -> None:
        """Gives up the descriptor; the memory itself lives on in arrays that still stand on it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
        self._map = None

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # of an arena that nobody closed
            self.close()


class Lease:
    """The right to a slot, and the base of every array in it. The slot goes back when the last of them is gone."""

    def __init__(self, slot: Slot, freed: collections.deque[Slot]) -> None:
        self.slot = slot
        self._freed = freed
        self._memory = slot.memory()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        self.remap()
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": self._memory.shape,
            "data": (self._memory.ctypes.data, False),
        }

    def __del__(self) -> None:
        # NumPy's own views would collapse to the map below; only this object knows that the consumer is done.
        self.slot.in_flight = False
        if not self.slot.retired:
            self._freed.append(self.slot)

    def remap(self) -> None:
        """Maps what the worker has added. Once done, the batch needs the slot's descriptor no more.

        Raises:
            OSError: memory is refused.
        """
        if self._memory.nbytes < self.slot.size:
            self._memory = self.slot.memory()

    def restart(self) -> None:
        """Forgets how far a worker had got."""
        control = _control_words(self._memory)
        control[_POSITION] = NOT_STARTED
        control[_PLACE] = 0

    def progress(self) -> tuple[int, int]:
        """How far the worker is: the place in the slot of the batch it is at, and the position of the sample there."""
        control = _control_words(self._memory)
        return control[_PLACE], control[_POSITION]

    def sample_since(self) -> float:
        """When the sample in progress began, in seconds of `time.monotonic`."""
        return _control_words(self._memory)[_SINCE] / 1e9

    def decode(self, header: bytes | tuple[int, int], places: Sequence[tuple[int, int]]) -> Any:
        """Unpickles a batch whose buffers lie at `places` (offset, bytes); its arrays alias the slot.

        Args:
            header: the pickle itself, or where in the slot it lies.
            places: where the out-of-band buffers lie.
        """
        memory = np.asarray(self)
        if not isinstance(header, bytes):
            header = memory[header[0] : header[0] + header[1]].tobytes()
        return pickle.loads(header, buffers=[memory[offset : offset + size] for offset, size in places])


class Arena:
    """The slots of one dataset, created as they are needed: waiting for a free one could deadlock under TensorFlow."""

    def __init__(self) -> None:
        self._freed: collections.deque[Slot] = collections.deque()
        self._numbers = 0
        self.slots: dict[int, Slot] = {}
        self._retired: list[int] = []
        self._in_use = _RecentMost()
        self._in_flight = _RecentMost()
        self._closed = False

    def acquire(self) -> Lease:
        """A lease on a free slot, the most recently used one first, because its pages are still warm.

        Raises:
            OSError: memory or descriptors are refused.
        """
        try:
            slot = self._freed.pop()
        except IndexError:
            slot = Slot(self._numbers)
            self._numbers += 1
            self.slots[slot.number] = slot
        lease = Lease(slot, self._freed)
        lease.restart()
        slot.in_flight = True
        self._in_use.add(self.lent)
        self._in_flight.add(sum(slot.in_flight for slot in self.slots.values()))
        return lease

    @property
    def lent(self) -> int:
        """How many slots are in use."""
        return len(self.slots) - len(self._freed)

    def retire(self, slot: Slot) -> None:
        """Never lends `slot` again, as something may still write to it. Arrays in it stay valid."""
        slot.retired = True
        if self.slots.pop(slot.number, None) is not None:
            self._retired.append(slot.number)
        slot.close()

    def trim(self) -> list[int]:
        """Closes free slots that are not likely to be needed; returns the numbers of slots for workers to forget."""
        dropped, self._retired = self._retired, []
        needed = min(self._in_use.most, self._in_flight.most + _LET_GO_TOGETHER)
        if self._closed or len(self.slots) <= needed:
            return dropped
        held = self.lent - sum(slot.in_flight for slot in self.slots.values())
        needed = min(self._in_use.most, needed + 2 * held)
        while self._freed:
            slot = self._freed[0]
            if len(self.slots) <= needed + min(_SPARE_SLOTS, _SPARE_BYTES // slot.size):
                break
            self._freed.popleft()
            del self.slots[slot.number]
            slot.close()
            dropped.append(slot.number)
        return dropped

    def close(self) -> None:
        """Closes every descriptor. Arrays still held by the consumer stay valid: their mapping is their own."""
        if self._closed:
            return
        self._closed = True
        for slot in list(self.slots.values()):
            slot.close()
        self.slots.clear()

    @property
    def nbytes(self) -> int:
        """Size of all slots, in bytes; pages never written take no memory."""
        return sum(slot.size for slot in list(self.slots.values()))


class _RecentMost:
    """The greatest of the last numbers: of the window that is being filled, and the one before."""

    def __init__(self) -> None:
        self._count = self._now = self._before = 0

    def add(self, number: int) -> None:
        self._count += 1
        if self._count % _RECENT_LEASES == 0:
            self._before, self._now = self._now, number
        elif number > self._now:
            self._now = number

    @property
    def most(self) -> int:
        """That number."""
        return max(self._now, self._before)


class _Mapping:
    """A part of a slot, as a worker has it mapped."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.start = start
        self.memory = map_file(fd, size, offset=start)
        self.unheld()

    def unheld(self) -> None:
        """Says that nobody has an array in it now: every one of them would refer to `memory`."""
        self._references = sys.getrefcount(self.memory)

    @property
    def is_held(self) -> bool:
        """Whether somebody has."""
        return sys.getrefcount(self.memory) > self._references

    def holds(self, offset: int, size: int) -> bool:
        """Whether this part of the slot lies in it."""
        return self.start <= offset and offset + size <= self.start + self.memory.nbytes


class SlotMemory:
    """The worker's side of one slot: hands out aligned arrays in it, and knows which arrays lie in it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = 0
        self._end = CONTROL_BYTES
        self._maps: list[_Mapping] = []
        self._control: memoryview | None = None

    def begin(self, size: int) -> None:
        """Starts anew in a slot that is now `size` bytes long, in one mapping.

        Raises:
            OSError: memory is refused.
        """
        if self.size != size or len(self._maps) != 1:
            self.size, self._control = 0, None
            self._maps.clear()
            self._maps.append(_Mapping(self._fd, 0, size))
            self.size = size
            self._control = _control_words(self._maps[0].memory)
            self._maps[0].unheld()
        self._end = CONTROL_BYTES

    @property
    def is_held(self) -> bool:
        """Whether anybody still has an array in the slot."""
        return any(mapping.is_held for mapping in self._maps)

    def note_batch(self, place: int) -> None:
        """Records that the batches before `place` in this slot are ready."""
        if self._control is not None:
            self._control[_POSITION] = NOT_STARTED
            self._control[_PLACE] = place

    def note_sample(self, position: int) -> None:
        """Records which sample is being processed."""
        if self._control is not None:
            self._control[_SINCE] = time.monotonic_ns()
            self._control[_POSITION] = position

    def read(self, size: int) -> bytes:
        """The `size` bytes behind the control words, also of a slot that could not be mapped."""
        return os.pread(self._fd, size, CONTROL_BYTES)

    def take(self, size: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """The next `size` bytes, aligned: their offset and the memory.

        Raises:
            OSError: the slot cannot grow.
        """
        offset = wire.align(self._end)
        mapping = self._maps[-1]
        if offset + size > self.size:
            # Arrays handed out earlier point into the old mapping, so the new room gets a mapping of its own.
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            new_size = round_to_page(offset + size + size // 8)
            os.ftruncate(self._fd, new_size)
            mapping = _Mapping(self._fd, start, new_size - start)
            self._maps.append(mapping)
            self.size = new_size
        self._end = offset + size
        return offset, mapping.memory[offset - mapping.start : offset - mapping.start + size]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Like `np.empty`, in the slot.

        Raises:
            OSError: the slot cannot grow.
        """
        _, memory = self.take(wire.nbytes(shape, dtype))
        return memory.view(dtype).reshape(shape) if memory.nbytes else np.empty(shape, dtype)

    def put(self, buffer: pickle.PickleBuffer) -> tuple[int, int]:
        """Where `buffer` lies in the slot: (offset, bytes). It is copied there only if it lies elsewhere.

        Raises:
            OSError: the slot cannot grow.
        """
        data = np.frombuffer(buffer.raw(), dtype=np.uint8) if buffer.raw().nbytes else np.empty(0, np.uint8)
        address = data.ctypes.data
        for mapping in self._maps:
            base = mapping.memory.ctypes.data
            if base <= address and address + data.nbytes <= base + mapping.memory.nbytes:
                offset = mapping.start + address - base
                if offset % wire.ALIGNMENT == 0 and data.nbytes:
                    return offset, data.nbytes
        offset, target = self.take(data.nbytes)
        target[...] = data
        return offset, data.nbytes

    def copy(self, place: tuple[int, int]) -> tuple[int, int]:
        """Copies what lies at `place` (offset, bytes) to a place of its own.

        Raises:
            OSError: the slot cannot grow.
        """
        data = self._at(place)
        offset, target = self.take(place[1])
        target[...] = data
        return offset, place[1]

    def bytes_at(self, place: tuple[int, int]) -> bytes:
        """What lies at `place`."""
        return self._at(place).tobytes()

    def _at(self, place: tuple[int, int]) -> npt.NDArray[np.uint8]:
        offset, size = place
        for mapping in self._maps:
            if mapping.holds(offset, size):
                return mapping.memory[offset - mapping.start : offset - mapping.start + size]
        raise ValueError(f"{place} lies in no mapping of the slot")

    def close(self) -> None:
        """Gives up the descriptor and the mappings; arrays that somebody holds stay valid."""
        os.close(self._fd)
        self._maps.clear()
        self._control = None


def map_file(fd: int, size: int, **options: int) -> npt.NDArray[np.uint8]:
    """A file in memory as bytes; `options` are those of `mmap`."""
    return np.frombuffer(mmap.mmap(fd, size, **options, **_KEEP_NO_DESCRIPTOR), dtype=np.uint8)


def _control_words(memory: npt.NDArray[np.uint8]) -> memoryview:
    return memory.data[:CONTROL_BYTES].cast("q")
