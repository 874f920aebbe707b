"""Shared memory for batches: slots that they are built in, and leases on them.

A *slot* is one anonymous memory file. The parent creates it, lends it to a worker for one batch, and hands the finished
arrays to the consumer without a copy; they stand on a *lease*, and when the last of them is gone the lease returns the
slot to its pool (P6). The files have no name, so nothing is left behind whoever is killed when (P4).

Layout of a slot: 64 bytes of control words, then the buffers, each at a multiple of 64 bytes. A worker that needs more
room extends the file and tells the parent its new size in the reply. The control words say which of the batches in the
slot the worker is at, at which sample of it and since when, for the parent to read should the worker die.

What may not happen here: waiting. Memory that the system refuses is an OSError, for the caller to say of which batch.

NOTE (no lock in a finaliser): a lease may die on any thread, also inside the allocator while a lock is held, so giving
a slot back is one `deque.append` and nothing else.
"""

from __future__ import annotations

import collections
import errno
import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.memory.control import CONTROL_BYTES, ControlWords
from keras_mp.memory.files import create_memory_file, map_file, round_to_page

# A slot is kept for reuse if it is likely to be needed: as many as have lately been in use together, so that steady
# state creates none; but of those that a consumer has held and let go only a few, as it may have held a great many.
_RECENT_LEASES = 128  # more than are in flight at once, as an epoch begins with none
_LET_GO_TOGETHER = 4  # TensorFlow returns arrays several at a time
_SPARE_SLOTS, _SPARE_BYTES = 8, 16 << 20  # and some more where they weigh little


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
        """The whole slot as bytes, mapped anew after the worker has extended it.

        Raises:
            OSError: the mapping is refused.
        """
        if self._map is None or self._map.nbytes < self.size:
            if self.fd < 0:  # mmap would take it for anonymous memory
                raise OSError(errno.EBADF, "the slot has been closed")
            self._map = map_file(self.fd, self.size)
        return self._map

    def write(self, data: bytes) -> None:
        """Puts `data` behind the control words: requests too long for the socket.

        Raises:
            OSError: the slot cannot grow.
        """
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
        if getattr(self, "fd", -1) >= 0:  # of a pool that nobody closed
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

    @property
    def control(self) -> ControlWords:
        """What the worker is at."""
        return ControlWords(self._memory)

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


class SlotPool:
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
        lease.control.begin_batch(0)
        slot.in_flight = True
        self._in_use.add(self.lent)
        self._in_flight.add(sum(slot.in_flight for slot in self.slots.values()))
        return lease

    @property
    def free(self) -> int:
        """How many slots nobody uses."""
        return len(self._freed)

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
