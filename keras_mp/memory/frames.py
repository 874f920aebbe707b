"""Messages between parent and worker, in frames on a socket.

A frame is a length and a pickle, and stays small: arrays lie in shared memory and only their places travel. Pickles
are read from nobody but our own worker on the socket it inherited (P7).
"""

from __future__ import annotations

import array
import collections
import os
import pickle
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

_LENGTH = struct.Struct("<Q")
_MAX_FDS = 4
_RECV_BYTES = 1 << 16
_CLOSE_AT_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # macOS has neither of the two
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # for programs that let SIGPIPE end them


def frame(message: Any) -> bytes:
    """The bytes that carry `message`."""
    body = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(body)) + body


def send_bytes(sock: socket.socket, frames: bytes, fds: Sequence[int] = ()) -> None:
    """Sends frames; `fds` travel with the length prefix of the first."""
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = sock.sendmsg([frames[: _LENGTH.size]], ancillary, _NO_SIGNAL)
        frames = frames[sent:]
    sock.sendall(frames, _NO_SIGNAL)


def send(sock: socket.socket, message: Any, fds: Sequence[int] = ()) -> None:
    """Sends one frame; `fds` travel with its length prefix."""
    send_bytes(sock, frame(message), fds)


def receive(sock: socket.socket) -> tuple[Any, list[int]] | None:
    """Blocks for one frame: the message and the descriptors that came with it. None when the peer is gone."""
    prefix, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_FDS, _CLOSE_AT_EXEC)
    for fd in fds if not _CLOSE_AT_EXEC else ():
        os.set_inheritable(fd, False)
    if not prefix:
        return None
    rest = _exactly(sock, _LENGTH.size - len(prefix))
    if rest is None:
        return None
    body = _exactly(sock, _LENGTH.unpack(prefix + rest)[0])
    return None if body is None else (pickle.loads(body), fds)


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    parts, got = [], 0
    while got < count:
        part = sock.recv(min(count - got, 1 << 20))
        if not part:
            return None
        parts.append(part)
        got += len(part)
    return b"".join(parts)


class FrameWriter:
    """Puts frames on a non-blocking socket. What there is no room for waits here: a peer that sleeps blocks nobody.

    Not thread-safe.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: collections.deque[tuple[memoryview, list[int]]] = collections.deque()

    @property
    def is_waiting(self) -> bool:
        """Whether something has not been sent yet: call `flush` when there is room."""
        return bool(self._waiting)

    def send(self, message: Any, fds: Sequence[int] = ()) -> bool:
        """Sends one frame; `fds` travel with its length prefix, and may be closed afterwards.

        Returns:
            Whether all has been sent.

        Raises:
            OSError: the peer is gone.
        """
        data, owed = memoryview(frame(message)), list(fds)
        if not self._waiting:
            data, owed = self._push(data, owed)
        if data:
            self._waiting.append((data, [os.dup(fd) for fd in owed]))
        return not data

    def flush(self) -> bool:
        """Sends what is waiting, as far as there is room; whether nothing is left.

        Raises:
            OSError: the peer is gone.
        """
        while self._waiting:
            data, fds = self._waiting[0]
            data, owed = self._push(data, fds)
            if not owed:
                _close(fds)
            if data:
                self._waiting[0] = data, owed
                return False
            self._waiting.popleft()
        return True

    def close(self) -> None:
        """Gives up what is waiting."""
        while self._waiting:
            _close(self._waiting.popleft()[1])

    def _push(self, data: memoryview, fds: list[int]) -> tuple[memoryview, list[int]]:
        """Sends what there is room for; what is left of the data, and the descriptors if they are still owed."""
        try:
            if fds:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                data = data[self._sock.sendmsg([data[: _LENGTH.size]], ancillary, _NO_SIGNAL) :]
                fds = []
            while data:
                data = data[self._sock.send(data, _NO_SIGNAL) :]
        except BlockingIOError:
            pass
        return data, fds


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class FrameReader:
    """Takes frames off a non-blocking socket as their bytes come, so a sender that stops half-way blocks nobody."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()

    def frames(self) -> Iterator[Any]:
        """Yields every message that is complete now.

        Raises:
            EOFError: the peer closed the socket or died.
        """
        gone = False
        while True:
            try:
                part = self._sock.recv(max(_RECV_BYTES, self._missing()))
            except (BlockingIOError, TimeoutError):
                break
            except OSError:
                part = b""
            if not part:
                gone = True
                break
            self._data += part
            if len(part) < _RECV_BYTES:
                break
        while self._missing() == 0:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            message = pickle.loads(memoryview(self._data)[_LENGTH.size : end])
            del self._data[:end]
            yield message
        if gone:
            raise EOFError

    def _missing(self) -> int:
        """Bytes short of the first frame; 0 when it is complete. At most 1 MiB is asked for at once."""
        if len(self._data) < _LENGTH.size:
            return _LENGTH.size
        length: int = _LENGTH.unpack_from(self._data)[0]
        return min(max(0, _LENGTH.size + length - len(self._data)), 1 << 20)
