"""Samples in a folder that outlives the process: a database of SQLite's, which several processes add to at once.

SQLite, and not a memory-mapped store: what is damaged in the file is an error there, and in a mapping a signal that
ends the process. A sample is added in one transaction, and has a check sum, so one that is half written or damaged is
not there. Each thread of each process has a connection of its own, none of which crosses a fork.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading

import numpy as np
import numpy.typing as npt

from keras_mp.errors import KerasMPError

_NAME = "samples.sqlite"
_APPLICATION = 0x6B6D7031  # says that the file is ours
_FORMAT = 1
_PAGE_BYTES = 1 << 14
_PATIENCE_S = 30.0  # for others that write
_SUM_BYTES = 16


class DiskStore:
    """One process's access to the samples of a folder.

    Args:
        folder: where they are.
        nbytes: bytes of the file at most; None: as many as there is room for.
    """

    def __init__(self, folder: str, nbytes: int | None) -> None:
        self.folder = folder
        self._limit = nbytes
        self._set_up()

    def _set_up(self) -> None:
        self._own = threading.local()
        self._connections: list[sqlite3.Connection] = []

    def __getstate__(self) -> tuple[str, int | None]:
        return self.folder, self._limit

    def __setstate__(self, state: tuple[str, int | None]) -> None:
        self.folder, self._limit = state
        self._set_up()

    def check(self) -> str:
        """Makes the folder, if it is not there; why nothing can be added, if nothing can.

        Raises:
            KerasMPError: it cannot be used at all; the message says what to do.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise KerasMPError(
                f"cache={self.folder!r} cannot be made a folder: {error}. Pass a folder that this process may write to"
            ) from error
        try:
            connection = self._open()
            refusal = ""
            if not self._is_read_only:
                with contextlib.closing(connection.cursor()) as cursor:
                    cursor.execute("BEGIN IMMEDIATE")
                    cursor.execute("ROLLBACK")
            else:
                refusal = "it is read-only"
        except sqlite3.Error as error:
            raise KerasMPError(
                f"the cache in {self.folder!r} cannot be used: {error}. Delete its file {_NAME!r}, or pass another "
                "folder that this process may write to, and that has room"
            ) from error
        finally:
            self.close()
        return refusal

    @property
    def _is_read_only(self) -> bool:
        return bool(getattr(self._own, "is_read_only", False))

    def _open(self) -> sqlite3.Connection:
        """This thread's connection.

        Raises:
            sqlite3.Error: the file is damaged, or cannot be opened.
            KerasMPError: it is not a cache of this version.
        """
        if getattr(self._own, "process", 0) == os.getpid():
            return self._own.connection  # type: ignore[no-any-return]
        path = os.path.join(self.folder, _NAME)
        read_only = os.path.exists(path) and not (os.access(path, os.W_OK) and os.access(self.folder, os.W_OK))
        uri = f"file:{path.replace('%', '%25').replace('?', '%3f').replace('#', '%23')}"
        connection = sqlite3.connect(
            uri + ("?immutable=1" if read_only else ""),
            _PATIENCE_S,
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._prepare(connection, read_only)
        except BaseException:
            connection.close()
            raise
        self._own.connection, self._own.process, self._own.is_read_only = connection, os.getpid(), read_only
        self._connections.append(connection)
        return connection

    def _prepare(self, connection: sqlite3.Connection, read_only: bool) -> None:
        if not read_only:
            connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            if self._limit is not None:
                connection.execute(f"PRAGMA max_page_count={max(1, self._limit // _PAGE_BYTES)}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    connection.execute(f"PRAGMA application_id={_APPLICATION}")
                    connection.execute(f"PRAGMA user_version={_FORMAT}")
                    connection.execute("CREATE TABLE samples (key BLOB PRIMARY KEY, sum BLOB, data BLOB)")
            finally:
                connection.execute("COMMIT")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) != (_APPLICATION, _FORMAT):
            raise KerasMPError(
                f"{os.path.join(self.folder, _NAME)!r} is no cache of this version of keras_mp (format {_FORMAT}): it "
                f"says application {application:#x}, format {version}. Delete it, or pass another folder as cache="
            )
        connection.execute("SELECT key FROM samples LIMIT 1").fetchone()

    def get(self, key: bytes) -> npt.NDArray[np.uint8] | None:
        """A copy of the bytes kept under `key`, or None."""
        try:
            found = self._open().execute("SELECT sum, data FROM samples WHERE key=?", (key,)).fetchone()
        except (sqlite3.Error, KerasMPError):  # it is damaged, which `put` will say
            return None
        if found is None or not isinstance(found[1], bytes) or _check_sum(key, found[1]) != found[0]:
            return None
        return np.frombuffer(bytearray(found[1]), np.uint8)

    def put(self, key: bytes, data: bytes) -> str:
        """Keeps bytes under `key`; why not, if that is so."""
        try:
            connection = self._open()
            if self._is_read_only:
                return "it is read-only"
            connection.execute("INSERT OR REPLACE INTO samples VALUES (?, ?, ?)", (key, _check_sum(key, data), data))
        except sqlite3.Error as error:
            if "full" in str(error):
                return f"it is full: {error}"
            return f"{error}; delete the file {os.path.join(self.folder, _NAME)!r} if it is damaged"
        except KerasMPError as error:
            return str(error)
        return ""

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        with contextlib.suppress(OSError):
            return sum(entry.stat().st_size for entry in os.scandir(self.folder) if entry.name.startswith(_NAME))
        return 0

    def close(self) -> None:
        """Closes the connections of this process; whoever needs one opens it again."""
        connections, self._connections = self._connections, []
        self._own = threading.local()
        for connection in connections:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def _check_sum(key: bytes, data: bytes) -> bytes:
    digest = hashlib.blake2b(key, digest_size=_SUM_BYTES)
    digest.update(data)
    return digest.digest()
