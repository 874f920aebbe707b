"""A worker's side of a slot: arrays are built in it, so that they need not be copied there.

The parent owns the slot. A worker may extend the file, never shorten it, and never moves what it has handed out.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.memory.control import CONTROL_BYTES, ControlWords
from keras_mp.memory.files import ALIGNMENT, align, map_file, nbytes, round_to_page


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


class SlotWriter:
    """The worker's side of one slot: hands out aligned arrays in it, and knows which arrays lie in it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = 0
        self.end = CONTROL_BYTES  # of what is in use
        self._maps: list[_Mapping] = []
        self._control: ControlWords | None = None

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
            self._control = ControlWords(self._maps[0].memory)
            self._maps[0].unheld()
        self.end = CONTROL_BYTES

    @property
    def is_held(self) -> bool:
        """Whether anybody still has an array in the slot."""
        return any(mapping.is_held for mapping in self._maps)

    def begin_batch(self, number: int) -> None:
        """Records that batch `number` of those in this slot comes next."""
        if self._control is not None:
            self._control.begin_batch(number)

    def begin_sample(self, position: int) -> None:
        """Records which sample is being processed."""
        if self._control is not None:
            self._control.begin_sample(position)

    def read(self, size: int) -> bytes:
        """The `size` bytes behind the control words."""
        return os.pread(self._fd, size, CONTROL_BYTES)

    def take(self, size: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """The next `size` bytes, aligned: their offset and the memory.

        Raises:
            OSError: the slot cannot grow.
        """
        offset = align(self.end)
        mapping = self._maps[-1]
        if offset + size > self.size:
            # Arrays handed out earlier point into the old mapping, so the new room gets a mapping of its own.
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            new_size = round_to_page(offset + size + size // 8)
            os.ftruncate(self._fd, new_size)
            mapping = _Mapping(self._fd, start, new_size - start)
            self._maps.append(mapping)
            self.size = new_size
        self.end = offset + size
        return offset, mapping.memory[offset - mapping.start : offset - mapping.start + size]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Like `np.empty`, in the slot.

        Raises:
            OSError: the slot cannot grow.
        """
        _, memory = self.take(nbytes(shape, dtype))
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
                if offset % ALIGNMENT == 0 and data.nbytes:
                    return offset, data.nbytes
        offset, target = self.take(data.nbytes)
        target[...] = data
        return offset, data.nbytes

    def copy(self, place: tuple[int, int]) -> tuple[int, int]:
        """Copies what lies at `place` (offset, bytes) to a place of its own.

        Raises:
            OSError: the slot cannot grow.
        """
        offset, size = place
        mapping = next(mapping for mapping in self._maps if mapping.holds(offset, size))
        data = mapping.memory[offset - mapping.start : offset - mapping.start + size]
        offset, target = self.take(size)
        target[...] = data
        return offset, size

    def close(self) -> None:
        """Gives up the descriptor and the mappings; arrays that somebody holds stay valid."""
        os.close(self._fd)
        self._maps.clear()
        self._control = None
