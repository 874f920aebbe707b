"""Shared memory for batches: slots that they are built in, and leases on them.

A *slot* is one anonymous memory file. The parent creates it, lends it to a worker for one batch, and hands the finished
arrays to the consumer without a copy; they stand on a *lease*, and when the last of them is gone the lease returns the
slot to its arena (P6). The files have no name, so nothing is left behind whoever is killed when (P4).

Layout of a slot: 64 bytes of control words, then the buffers, each at a multiple of 64 bytes. A worker that needs more
room extends the file and tells the parent its new size in the reply. The control words say which of the batches in the
slot the worker is at, and at which sample of it, for the parent to read should the worker die.

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
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp import wire

CONTROL_BYTES = 64

# Before Python 3.13 each mapping costs a descriptor of its own.
_KEEP_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_PLACE, _POSITION = 0, 1  # control words: of the batch in the slot, and of the sample in the batch
NOT_STARTED = -1  # a position before the first sample

# Free slots kept for reuse beyond those in use: enough that steady state creates none, few enough to give memory back
# after a consumer that held many batches has let them go.
_SPARE_SLOTS = 8


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
        return lease

    def trim(self) -> list[int]:
        """Closes free slots beyond what is in use plus a reserve; returns their numbers, for workers to forget."""
        dropped = []
        in_use = len(self.slots) - len(self._freed)
        while len(self._freed) > (0 if self._closed else in_use + _SPARE_SLOTS):
            slot = self._freed.popleft()
            del self.slots[slot.number]
            slot.close()
            dropped.append(slot.number)
        return dropped

    def close(self) -> None:
        """Closes every descriptor. Arrays still held by the consumer stay valid: their mapping is their own."""
        if self._closed:
            return
        self._closed = True
        for slot in self.slots.values():
            slot.close()
        self.slots.clear()

    @property
    def nbytes(self) -> int:
        """Size of all slots, in bytes; pages never written take no memory."""
        return sum(slot.size for slot in list(self.slots.values()))


class SlotMemory:
    """The worker's side of one slot: hands out aligned arrays in it, and knows which arrays lie in it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = 0
        self._end = CONTROL_BYTES
        self._maps: list[tuple[int, npt.NDArray[np.uint8]]] = []
        self._control: memoryview | None = None

    def begin(self, size: int) -> None:
        """Starts anew in a slot that is now `size` bytes long, in one mapping.

        Raises:
            OSError: memory is refused.
        """
        if self.size != size or len(self._maps) != 1:
            self.size, self._control = 0, None
            self._maps.clear()
            self._maps.append((0, map_file(self._fd, size)))
            self.size = size
            self._control = _control_words(self._maps[0][1])
        self._end = CONTROL_BYTES

    def note_batch(self, place: int) -> None:
        """Records that the batches before `place` in this slot are ready."""
        if self._control is not None:
            self._control[_POSITION] = NOT_STARTED
            self._control[_PLACE] = place

    def note_sample(self, position: int) -> None:
        """Records which sample is being processed."""
        if self._control is not None:
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
        start, memory = self._maps[-1]
        if offset + size > self.size:
            # Arrays handed out earlier point into the old mapping, so the new room gets a mapping of its own.
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            new_size = round_to_page(offset + size + size // 8)
            os.ftruncate(self._fd, new_size)
            memory = map_file(self._fd, new_size - start, offset=start)
            self._maps.append((start, memory))
            self.size = new_size
        self._end = offset + size
        return offset, memory[offset - start : offset - start + size]

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
        for start, memory in self._maps:
            base = memory.ctypes.data
            if base <= address and address + data.nbytes <= base + memory.nbytes:
                offset = start + address - base
                if offset % wire.ALIGNMENT == 0 and data.nbytes:
                    return offset, data.nbytes
        offset, target = self.take(data.nbytes)
        target[...] = data
        return offset, data.nbytes

    def close(self) -> None:
        """Gives up the descriptor and the mappings."""
        os.close(self._fd)
        self._maps.clear()
        self._control = None


def map_file(fd: int, size: int, **options: int) -> npt.NDArray[np.uint8]:
    """A file in memory as bytes; `options` are those of `mmap`."""
    return np.frombuffer(mmap.mmap(fd, size, **options, **_KEEP_NO_DESCRIPTOR), dtype=np.uint8)


def _control_words(memory: npt.NDArray[np.uint8]) -> memoryview:
    return memory.data[:CONTROL_BYTES].cast("q")
