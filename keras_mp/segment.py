"""Shared memory for what a dataset reads: filled once by the parent, mapped read-only by every worker."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from keras_mp.arena import create_memory_file, map_file


class Segment:
    """Read-only memory that the parent fills once and every worker maps: the large arrays of a source."""

    def __init__(self, buffers: Sequence[pickle.PickleBuffer], places: Sequence[tuple[int, int]], size: int) -> None:
        self.fd = create_memory_file()
        self.size = size
        try:
            os.ftruncate(self.fd, size)
            for buffer, (offset, _) in zip(buffers, places, strict=True):
                _write_all(self.fd, buffer.raw(), offset)
        except OSError:
            self.close()
            raise

    def holds(self, buffers: Sequence[pickle.PickleBuffer], places: Sequence[tuple[int, int]], size: int) -> bool:
        """Whether filling a segment with these buffers would give this one's bytes again."""
        if size != self.size or not size:
            return size == self.size
        memory = map_segment(self.fd, size)
        return all(
            np.array_equal(memory[offset : offset + length], np.frombuffer(buffer.raw(), dtype=np.uint8))
            for buffer, (offset, length) in zip(buffers, places, strict=True)
        )

    def close(self) -> None:
        """Gives up the descriptor; workers keep their mappings."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:  # of a task that nobody closed, or that failed half-way
            self.close()


def map_segment(fd: int, size: int) -> npt.NDArray[np.uint8]:
    """A segment as read-only bytes."""
    return map_file(fd, size, access=mmap.ACCESS_READ)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        written = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written
