"""Memory files: anonymous memory with a descriptor, mapped by parent and worker; and where things lie in them."""

from __future__ import annotations

import errno
import math
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.memory.system import missing_for_workers

ALIGNMENT = 64  # TensorFlow aliases host memory only at multiples of EIGEN_MAX_ALIGN_BYTES

# Before Python 3.13 each mapping costs a descriptor of its own.
_KEEP_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def create_memory_file(name: str = "keras_mp") -> int:
    """A new anonymous memory file's descriptor; `name` is for whoever looks at the process from outside.

    Raises:
        OSError: no descriptor or memory is left, or the system has no such files.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    if missing := missing_for_workers():
        raise OSError(errno.ENOSYS, missing)
    with tempfile.TemporaryFile() as file:  # already unlinked: macOS has no memfd
        return os.dup(file.fileno())


def create_roll() -> int:
    """A new anonymous file that several processes may read at once, through one position, each getting its own part.

    POSIX.1-2017 asks that of regular files (XSH 2.9.7). Linux keeps it for what was opened, but not for a memory file
    as it was created: so this is one that was opened once more.

    Raises:
        OSError: no descriptor or memory is left.
    """
    fd = create_memory_file("keras_mp-roll")
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # macOS, or nothing at /proc
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    finally:
        os.close(fd)


class Descriptor:
    """A file descriptor that is closed when nobody has it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Closes it. May be called twice."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def round_to_page(size: int) -> int:
    """The next multiple of the page size."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def map_file(fd: int, size: int, **options: int) -> npt.NDArray[np.uint8]:
    """A file in memory as bytes; `options` are those of `mmap`."""
    return np.frombuffer(mmap.mmap(fd, size, **options, **_KEEP_NO_DESCRIPTOR), dtype=np.uint8)


def read_into(fd: int, memory: npt.NDArray[np.uint8], offset: int) -> int:
    """Reads bytes of a file from `offset` on, as many as `memory` has room for; returns how many came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [memory.data], offset)
    data = os.pread(fd, memory.nbytes, offset)  # macOS before 11
    memory[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Bytes of an array of this shape and dtype."""
    return math.prod(shape) * dtype.itemsize


def place_buffers(buffers: Sequence[pickle.PickleBuffer], start: int = 0) -> tuple[list[tuple[int, int]], int]:
    """Lays `buffers` out one after the other, each aligned: their (offset, bytes), and the end."""
    places, end = [], start
    for buffer in buffers:
        offset = align(end)
        size = buffer.raw().nbytes
        places.append((offset, size))
        end = offset + size
    return places, end
