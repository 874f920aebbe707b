"""Shared memory for what a dataset reads: filled once by the parent, mapped by every worker.

What a worker writes there goes to private copies of the pages it touches; what nobody writes to is in memory once.
"""

from __future__ import annotations

import mmap
import os
import pickle
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from keras_mp.memory.files import create_memory_file, map_file, read_into

_PIECE_BYTES = 1 << 18  # compared at once


# Those that are in use. Only whole operations on a set of Python's, which no other thread interrupts, and no lock.
_segments: set[weakref.ref[Segment]] = set()


class Segment:
    """Memory that the parent fills once and every worker maps: the large arrays of a source."""

    def __init__(self, buffers: Sequence[pickle.PickleBuffer], places: Sequence[tuple[int, int]], size: int) -> None:
        self._set_up(create_memory_file(), size)
        try:
            os.ftruncate(self.fd, size)
            for buffer, (offset, _) in zip(buffers, places, strict=True):
                _write_all(self.fd, buffer.raw(), offset)
        except OSError:
            self.close()
            raise

    @classmethod
    def holding(cls, buffers: Sequence[pickle.PickleBuffer], places: Sequence[tuple[int, int]], size: int) -> Segment:
        """A segment of these bytes: on the memory of one that has them already, say of another part of a source.

        Raises:
            OSError: there is no memory or descriptor for it.
        """
        for reference in tuple(_segments):
            other = reference()
            if size and other is not None and other.size == size and (again := other._duplicate()) is not None:
                if again.holds(buffers, places, size):
                    return again
                again.close()
        return cls(buffers, places, size)

    def _set_up(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._view: npt.NDArray[np.uint8] | None = None
        _segments.add(weakref.ref(self, _segments.discard))

    def _duplicate(self) -> Segment | None:
        """Another segment on the same memory; None if this one is being closed, on whatever thread."""
        fd, view = self.fd, self._view
        if fd < 0:
            return None
        try:
            duplicate = os.dup(fd)
        except OSError:
            return None
        if self.fd != fd:  # closed meanwhile, and `fd` may be the number of another file by now
            os.close(duplicate)
            return None
        again = object.__new__(Segment)
        again._set_up(duplicate, self.size)
        again._view = view
        return again

    def holds(self, buffers: Sequence[pickle.PickleBuffer], places: Sequence[tuple[int, int]], size: int) -> bool:
        """Whether filling a segment with these buffers would give this one's bytes again."""
        if size != self.size or not size:
            return size == self.size
        if self.fd < 0 or [buffer.raw().nbytes for buffer in buffers] != [length for _, length in places]:
            return False
        return all(
            self._has(np.frombuffer(buffer.raw(), dtype=np.uint8), offset)
            for buffer, (offset, length) in zip(buffers, places, strict=True)
            if length
        )

    def _has(self, data: npt.NDArray[np.uint8], offset: int) -> bool:
        """Whether these bytes lie there. It is read piece by piece: a mapping would need a descriptor more."""
        if self._view is not None and data.ctypes.data == self._view.ctypes.data + offset:
            return True
        ours = np.empty(min(data.nbytes, _PIECE_BYTES), dtype=np.uint8)
        for start in range(0, data.nbytes, _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            if read_into(self.fd, ours[: piece.nbytes], offset + start) != piece.nbytes:
                return False
            if not np.array_equal(ours[: piece.nbytes], piece):
                return False
        return True

    def view(self) -> npt.NDArray[np.uint8]:
        """The whole as read-only bytes; arrays made of them are known to `holds`, and need no comparison."""
        if self._view is None:
            self._view = map_segment(self.fd, self.size)
        return self._view

    def close(self) -> None:
        """Gives up the descriptor; workers keep their mappings."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
        self._view = None

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # of a loader that nobody closed, or that failed half-way
            self.close()


def map_segment(fd: int, size: int) -> npt.NDArray[np.uint8]:
    """A segment as read-only bytes."""
    return map_file(fd, size, access=mmap.ACCESS_READ)


def map_privately(fd: int, size: int) -> npt.NDArray[np.uint8]:
    """A segment as bytes that may be written to, without an effect on anybody else."""
    try:
        return map_file(fd, size, access=mmap.ACCESS_COPY)
    except OSError:  # a system that reserves memory for all that might be written has none left
        return map_segment(fd, size)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        written = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written
