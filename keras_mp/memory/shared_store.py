"""Samples in anonymous memory that all workers of a dataset read and add to, without a lock between them.

Two memory files. In the first a table, one row of 64 bytes for each sample, and behind it the data. The second is a
roll of tickets: whoever needs room *reads* from it, and what it gets are the numbers of units of room that are its own.
All processes share one file offset, as they have the descriptor from the parent, and the kernel moves that for one
reader after the other; so no unit is given twice, and a process that is killed takes no more with it than what it has
not filled. A row is written after its data, and has a check sum of its own, so a sample that is half written is not
there. Nothing has a name (P4, P7); when the descriptors are closed, all of it is gone.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from keras_mp.memory.files import Descriptor, create_memory_file, create_roll, read_into, round_to_page

_ROW = struct.Struct("<16sQQ")  # key, offset, bytes; then the check sum
_ROW_BYTES = 64
_TICKET_BYTES = 4
_MOST_TICKETS = 1 << 18
_LEAST_UNIT = 64
_REGION_BYTES = 1 << 20  # taken at once, for several small samples


class _Room(threading.local):
    """What a thread has taken and not filled: positions [start, end) in the data."""

    process = start = end = 0


class SharedStore:
    """One process's access to the samples.

    Args:
        entries: samples in the source.
        nbytes: bytes of data at most.
        fds: descriptors of the two files, which are this object's from now on; None: new ones.

    Raises:
        OSError: there is no memory or descriptor for it.
    """

    def __init__(self, entries: int, nbytes: int, fds: Sequence[int] | None = None) -> None:
        self._unit = max(_LEAST_UNIT, -(-nbytes // _MOST_TICKETS) // _LEAST_UNIT * _LEAST_UNIT + _LEAST_UNIT)
        self._region = min(_REGION_BYTES, nbytes // 256)
        self._base = round_to_page((entries + 1) * _ROW_BYTES)
        self._room = _Room()
        self.fds: tuple[int, ...] = ()
        if fds is not None:
            self.fds = tuple(fds)
            return
        try:
            self.fds = (create_memory_file("keras_mp-cache"),)
            self.fds = (*self.fds, create_roll())
            os.ftruncate(self.fds[0], self._base + nbytes)
            tickets = memoryview(np.arange(nbytes // self._unit, dtype=np.uint32).tobytes())
            while tickets:
                tickets = tickets[os.write(self.fds[1], tickets) :]
            os.lseek(self.fds[1], 0, os.SEEK_SET)
        except OSError:
            self.close()
            raise

    def get(self, index: int, key: bytes) -> npt.NDArray[np.uint8] | None:
        """A copy of the bytes kept for sample `index` under `key`, or None."""
        row = os.pread(self.fds[0], _ROW.size + 8, (index + 1) * _ROW_BYTES)
        if len(row) < _ROW.size + 8 or row[:16] != key or row[_ROW.size :] != _check_sum(row[: _ROW.size]):
            return None
        _, offset, size = _ROW.unpack_from(row)
        data = np.empty(size, np.uint8)
        done = 0
        while done < size:
            count = read_into(self.fds[0], data[done:], self._base + offset + done)
            if not count:
                return None
            done += count
        return data

    def put(self, index: int, key: bytes, data: bytes) -> str:
        """Keeps the bytes of sample `index` under `key`; why not, if there is no room."""
        offset = self._take(len(data))
        if offset is None:
            return "it is full"
        try:
            self._write(data, self._base + offset)
            row = _ROW.pack(key, offset, len(data))
            self._write(row + _check_sum(row), (index + 1) * _ROW_BYTES)
        except OSError as error:  # memory is refused
            return str(error)
        return ""

    def _write(self, data: bytes, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self.fds[0], rest[: 1 << 30], offset)
            rest, offset = rest[count:], offset + count

    def _take(self, size: int) -> int | None:
        """The position of so many bytes that are this thread's own."""
        room = self._room
        if room.process != os.getpid():  # this is a fork, and the room is its parent's
            room.process, room.start, room.end = os.getpid(), 0, 0
        if room.end - room.start < size:
            count = -(-max(size, self._region) // self._unit)
            tickets = os.read(self.fds[1], _TICKET_BYTES * count)
            if not tickets:
                return None
            first, taken = int.from_bytes(tickets[:_TICKET_BYTES], "little") * self._unit, len(tickets) // _TICKET_BYTES
            if first != room.end:
                room.start = first
            room.end = first + taken * self._unit
            if room.end - room.start < size:
                return None
        offset = room.start
        room.start += -(-size // _LEAST_UNIT) * _LEAST_UNIT
        return offset

    def duplicates(self) -> list[Descriptor]:
        """The descriptors once more.

        Raises:
            OSError: there is none left.
        """
        return [Descriptor(os.dup(fd)) for fd in self.fds]

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return os.lseek(self.fds[1], 0, os.SEEK_CUR) // _TICKET_BYTES * self._unit if self.fds else 0

    def close(self) -> None:
        """Gives up the descriptors."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fds", ()):
            self.close()


def _check_sum(row: bytes) -> bytes:
    return hashlib.blake2b(row, digest_size=8).digest()
