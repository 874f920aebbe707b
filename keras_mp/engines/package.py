"""A loader on its way to workers that are not ours: packed once, and placed where each of them finds it once.

A package is known by the dataset and by a number that counts the loader's states, not by its content, so that a task
carries a few bytes however large the source. Where it lies depends on the engine: in a memory file that processes of
this machine open, in the memory of a cluster's nodes, or, where neither is to be had, in the task that a worker without
it is sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keras_mp.errors import KerasMPError
from keras_mp.loading.base import Loader
from keras_mp.memory import files, pickling
from keras_mp.memory.segment import Segment, map_privately

Key = tuple[str, int]
Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(eq=False)
class Package:
    """A loader, pickled, its arrays out of band.

    Attributes:
        key: the dataset, and which state of its loader this is.
        body: the pickle.
        buffers: the bytes of the arrays, which may be the user's own memory.
        digest: of all bytes, as they were when it was packed.
    """

    key: Key
    body: bytes
    buffers: Sequence[Bytes]
    digest: bytes

    @classmethod
    def of(cls, loader: Loader, key: Key) -> Package:
        """Packs a loader as it is now.

        Raises:
            KerasMPError: it holds something that cannot be pickled; the message says which part.
        """
        buffers: pickling.Buffers = []
        body = loader.dump(buffers)
        arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        return cls(key, body, arrays, _digest(body, arrays))

    @property
    def is_unchanged(self) -> bool:
        """Whether the user has left the arrays as they were when it was packed."""
        return _digest(self.body, self.buffers) == self.digest

    def copied(self) -> Package:
        """The same, whatever the user does to the arrays from now on."""
        return dataclasses.replace(self, buffers=[buffer.copy() for buffer in self.buffers])

    def unpack(self) -> Loader:
        """The loader; its arrays stand on the buffers."""
        loader: Loader = pickle.loads(self.body, buffers=self.buffers)
        return loader


class Place(Protocol):
    """Where a package lies; travels with every task."""

    @property
    def is_held(self) -> bool:
        """Whether the dataset is still there, as far as can be known: what was made of the package is kept so long."""

    def open(self) -> Package | None:
        """The package that lies here; None if this process cannot get at it."""


@dataclasses.dataclass(frozen=True)
class InTask:
    """Place of a package that comes with the task itself."""

    package: Package
    is_held = True

    def open(self) -> Package:
        """The package."""
        return self.package


@dataclasses.dataclass(frozen=True)
class Nowhere:
    """Place of a package that no worker can get at by itself."""

    is_held = True

    def open(self) -> None:
        """None, always."""
        return


class NextKey:
    """The keys of one dataset's packages."""

    def __init__(self) -> None:
        self._dataset = uuid.uuid4().hex
        self._version = 0

    def __call__(self) -> Key:
        self._version += 1
        return self._dataset, self._version


class MemoryFile:
    """A package in memory that other processes of this machine map, under whoever started them.

    They open the descriptor of this process (`/proc/PID/fd/N`), which the kernel grants to processes of the same user.
    Elsewhere (no /proc, another machine or container) they cannot, say so, and are sent the package itself.
    """

    def __init__(self, package: Package) -> None:
        contents: list[Any] = [package.body, *package.buffers]
        parts = [pickle.PickleBuffer(content) for content in contents]
        places, size = files.place_buffers(parts)
        try:
            self._segment = Segment(parts, places, size)
        except OSError as error:
            raise KerasMPError(
                f"no shared memory for the dataset's source, {size} bytes: {error}. Free memory or file descriptors "
                "(ulimit -n), or pass what is read from disk sample by sample: paths, or a np.memmap."
            ) from error
        inode = os.stat(self._segment.fd).st_ino
        self.place = OpenElsewhere(package.key, package.digest, os.getpid(), self._segment.fd, inode, tuple(places))

    def package(self) -> Package:
        """The package as it was put here, whatever the user has done to the arrays since."""
        return self.place.packed(self._segment.view())

    def close(self) -> None:
        """Gives the memory up; processes that have mapped it keep it."""
        self._segment.close()


@dataclasses.dataclass(frozen=True)
class OpenElsewhere:
    """Place of a package in a memory file of another process.

    Attributes:
        key, digest: the package's.
        pid, fd, inode: the process, its descriptor, and the file that this is as long as the dataset is open.
        parts: offset and bytes of the pickle and of each array.
    """

    key: Key
    digest: bytes
    pid: int
    fd: int
    inode: int
    parts: tuple[tuple[int, int], ...]

    @property
    def is_held(self) -> bool:
        """Whether the process has the file open."""
        try:
            return os.stat(self._path).st_ino == self.inode
        except OSError:
            return False

    @property
    def _path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"

    def open(self) -> Package | None:
        """Maps the file, privately: what code of the user's writes there is its process's own."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if os.fstat(fd).st_ino != self.inode:  # the number has been used again
                return None
            offset, size = self.parts[-1]
            return self.packed(map_privately(fd, offset + size))
        except OSError:
            return None
        finally:
            os.close(fd)

    def packed(self, memory: Bytes) -> Package:
        """The package whose bytes lie in `memory`."""
        body, *buffers = [memory[offset : offset + size] for offset, size in self.parts]
        return Package(self.key, body.tobytes(), buffers, self.digest)


def _digest(body: bytes, arrays: Sequence[Any]) -> bytes:
    digest = hashlib.sha256(body)
    for array in arrays:
        digest.update(array)
    return digest.digest()
