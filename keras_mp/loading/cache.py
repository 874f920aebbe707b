"""What `load` gave, kept: in memory that all workers share, or in a folder. See `PoolDataset(cache=...)`.

A sample is kept under a key made of what it was made by and from: the code of `load`, the item of the source (with size
and time of change of the files that it names), and `cache_version`. So a changed function, item or file is not served
what was kept before.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from keras_mp.checks import available_memory, check_count
from keras_mp.errors import KerasMPError, short_repr
from keras_mp.memory.disk_store import DiskStore
from keras_mp.memory.encoding import decode, encode
from keras_mp.memory.files import Descriptor
from keras_mp.memory.fingerprint import combined, fingerprint
from keras_mp.memory.shared_store import SharedStore


class SampleCache:
    """The samples of one dataset, and of its shards; it travels to workers with the loader.

    Args:
        entries: samples in the source.
        nbytes: bytes at most. None: in memory, half of what is available; on disk, what there is room for.
        version: the user's, part of every key.
        folder: where samples are kept; None: in memory.
    """

    def __init__(self, entries: int, nbytes: int | None, version: Any, folder: str | None) -> None:
        self._entries = entries
        self._nbytes = available_memory() // 2 if nbytes is None and folder is None else nbytes
        self._version = version
        self._disk = None if folder is None else DiskStore(folder, nbytes)
        self._set_up()

    def _set_up(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._shared: SharedStore | None = None
        self._full = False  # so that this process need not encode what will be refused
        if self._disk is not None:
            weakref.finalize(self, self._disk.close).atexit = False  # `close` does that

    @classmethod
    def of(cls, cache: Any, nbytes: Any, version: Any, entries: int) -> SampleCache | None:
        """Checks a user's arguments.

        Raises:
            TypeError, ValueError: one is of the wrong kind or out of range.
            KerasMPError: the folder cannot be used.
        """
        if nbytes is not None:
            check_count(nbytes, "cache_bytes")
            if cache is None:
                raise ValueError(f"cache_bytes={nbytes} bounds a cache, but cache=None; pass cache='ram' or a folder")
        if not isinstance(version, int | str | None):
            raise TypeError(f"cache_version must be an int, a str or None, got {short_repr(version, 80)}")
        if cache is None:
            return None
        if not isinstance(cache, str | os.PathLike) or not os.fspath(cache) or isinstance(os.fspath(cache), bytes):
            raise TypeError(f"cache must be None, 'ram' or the path of a folder, got {short_repr(cache, 80)}")
        if cache == "ram":
            return cls(entries, nbytes, version, None)
        made = cls(entries, nbytes, version, os.path.abspath(os.fspath(cache)))
        made.check()
        return made

    def check(self) -> None:
        """Whether its folder can be used.

        Raises:
            KerasMPError: it cannot.
        """
        if self._disk is not None:
            self._disk.check()

    @property
    def is_in_memory(self) -> bool:
        """Whether it ends with the dataset."""
        return self._disk is None

    def namespace(self, load: Callable[..., Any] | None, source: Any) -> bytes:
        """What is part of the keys of all samples: the code of `load`, or without one the source.

        Raises:
            KerasMPError: the folder's samples could not be told from those of a changed `load` or source.
        """
        made_by = source if load is None else load
        try:
            mark = fingerprint(made_by)
        except KerasMPError as error:
            if self._disk is not None and self._version is None:
                name = "the source" if load is None else "load"
                raise KerasMPError(
                    f"cache={self._disk.folder!r} cannot tell whether {name} changes: {error}. Pass cache_version=, "
                    f"and another one whenever {name} changes; or a plain function as load="
                ) from error
            mark = type(made_by).__qualname__.encode()
        return combined(mark, fingerprint(self._version))

    def key(self, namespace: bytes, index: int, item: Any, has_item: bool) -> bytes:
        """The key of a sample.

        Raises:
            KerasMPError: the item has no fingerprint.
        """
        try:
            return combined(namespace, fingerprint(item) if has_item else index.to_bytes(8, "little"))
        except KerasMPError:
            if self._disk is None or self._version is not None:
                return combined(namespace, index.to_bytes(8, "little"), b"index")
            raise

    # -- samples -------------------------------------------------------------------------------------------------

    def get(self, index: int, key: bytes) -> tuple[Any] | None:
        """The sample, with arrays of its own, in a tuple; None: it is not kept."""
        if self._disk is not None:
            data = self._disk.get(key)
        else:
            shared = self._shared  # held: the dataset may be closed while a thread is here
            data = None if shared is None else shared.get(index, key)
        return None if data is None else (decode(data),)

    def put(self, index: int, key: bytes, sample: Any) -> str:
        """Keeps a sample; why not, if that is so.

        Raises:
            TypeError: it cannot be pickled.
        """
        shared = self._shared
        if self._full or (self._disk is None and shared is None):
            return ""
        try:
            data = encode(sample)
        except Exception as error:
            raise TypeError(
                f"cache= cannot keep a sample that cannot be pickled ({type(error).__name__}: {error}); give it as "
                "arrays, numbers and strings, or leave out cache="
            ) from error
        if self._disk is not None:
            refusal = self._disk.put(key, data)
        else:
            refusal = "" if shared is None else shared.put(index, key, data)
        self._full = bool(refusal)
        return f"the cache {self.place} takes no more samples: {refusal}" if refusal else ""

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"in memory (cache_bytes={self._nbytes})" if self._disk is None else f"in {self._disk.folder!r}"

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        if self._disk is not None:
            return self._disk.nbytes
        return 0 if self._shared is None else self._shared.nbytes

    # -- its life ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Somebody begins to load; whoever does must call `close` some time.

        Raises:
            KerasMPError: there is no shared memory for it.
        """
        with self._lock:
            if self._disk is None and self._shared is None:
                try:
                    self._shared = SharedStore(self._entries, self._nbytes or 0)
                except OSError as error:
                    raise KerasMPError(
                        f"no shared memory for cache='ram': {error}. Lower cache_bytes={self._nbytes}, free memory or "
                        "file descriptors (ulimit -n), or pass a folder as cache="
                    ) from error
                self._full = False
            self._users += 1

    def close(self) -> None:
        """Gives up the memory, or the connections, once nobody loads any more."""
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            if self._disk is not None:
                self._disk.close()
            self._shared = None  # its descriptors go with the last thread that is still at it

    def descriptors(self) -> list[Descriptor]:
        """Copies, which are the caller's, of what a worker needs to `attach`.

        Raises:
            OSError: there is no descriptor left.
        """
        return [] if self._shared is None else self._shared.duplicates()

    def attach(self, fds: Sequence[int]) -> None:
        """Uses the memory behind these descriptors, which are this object's from now on."""
        self._shared = SharedStore(self._entries, self._nbytes or 0, fds)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_entries", "_nbytes", "_version", "_disk")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __copy__(self) -> SampleCache:
        return self  # of one dataset and its shards there is one
