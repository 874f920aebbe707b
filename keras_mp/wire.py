"""Messages between parent and worker: pickle protocol 5 with the payload out of band, in frames on a socket.

A frame is a length and a pickle, and stays small: arrays lie in shared memory and only their places travel. Pickles
are read from nobody but our own worker on the socket it inherited (P7).

How functions and classes of the user's travel is `pickling`'s affair. `numpy.memmap` is sent as the place in its file,
never as its bytes.
"""

from __future__ import annotations

import array
import collections
import io
import math
import os
import pickle
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_mp.errors import KerasMPError
from keras_mp.pickling import CodePickler

ALIGNMENT = 64  # TensorFlow aliases host memory only at multiples of EIGEN_MAX_ALIGN_BYTES

_LENGTH = struct.Struct("<Q")
_MAX_FDS = 4
_RECV_BYTES = 1 << 16
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # for programs that let SIGPIPE end them

Buffers = list[pickle.PickleBuffer]


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def dump_result(value: Any, buffers: Buffers) -> bytes:
    """Pickles what user code returned; contiguous array memory is appended to `buffers` instead of being copied."""
    try:
        return pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    except Exception:  # of a class that exists only by value, say one the user defined in `__main__`
        buffers.clear()
        stream = io.BytesIO()
        CodePickler(stream, buffers.append).dump(value)
        return stream.getvalue()


def dump_user_object(value: Any, name: str, buffers: Buffers | None = None) -> bytes:
    """Pickles a source or function of the user's.

    Raises:
        KerasMPError: it cannot be pickled; the message names `name` and the way out.
    """
    stream = io.BytesIO()
    try:
        _UserPickler(stream, buffers.append if buffers is not None else None).dump(value)
    except Exception as error:
        raise KerasMPError(
            f"{name} cannot be sent to worker processes: {type(error).__name__}: {error}\n"
            f"Received {name}={short_repr(value)}. Create what cannot be pickled (open files, locks, database handles, "
            "generators) inside the transform, at its first call in the worker; or use workers=0 or "
            "use_multiprocessing=False, which send nothing."
        ) from error
    return stream.getvalue()


class _UserPickler(CodePickler):
    def reducer_override(self, obj: Any) -> Any:
        keras = sys.modules.get("keras")
        if keras is not None and isinstance(obj, type) and obj is keras.utils.PyDataset:
            # A class defined in a script or notebook travels by value; its base need not cost the worker keras.
            return _py_dataset_stand_in, ()
        if isinstance(obj, np.memmap):
            place = _memmap_place(obj)
            if place is not None:
                return _open_memmap, place
            return np.asarray(obj).__reduce_ex__(5)
        return super().reducer_override(obj)


class PyDatasetStandIn:
    """Stands for `keras.utils.PyDataset` as a base class in a worker, where only `[i]` is called."""

    workers = 1
    use_multiprocessing = False
    max_queue_size = 10

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self)  # type: ignore[arg-type]  # the subclass has it

    def on_epoch_begin(self) -> None:
        """Called in the training process only."""

    def on_epoch_end(self) -> None:
        """Called in the training process only."""


def _py_dataset_stand_in() -> type:
    keras = sys.modules.get("keras")
    return PyDatasetStandIn if keras is None else keras.utils.PyDataset


def _memmap_place(array: np.memmap[Any, Any]) -> tuple[Any, ...] | None:
    """Where in which file `array` lies, or None if its bytes cannot be found there."""
    if array.filename is None or array.mode == "c" or not array.size:
        return None  # mode "c" holds private changes that the file does not have
    root = array
    while isinstance(root.base, np.memmap):
        root = root.base
    # A slice keeps its parent's `offset`, so the true one comes from the addresses.
    start = root.offset + (array.ctypes.data - root.ctypes.data)
    if min(array.strides, default=0) < 0:
        return None
    return os.path.abspath(array.filename), start, array.dtype, array.shape, array.strides


def _open_memmap(path: str, start: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    data: np.memmap[Any, Any] = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(span,))
    return np.ndarray(shape, dtype, buffer=data, strides=strides)


def short_repr(value: Any, limit: int = 200) -> str:
    """`repr` on one line of at most `limit` characters, with an array's shape and dtype in its place; never fails."""
    try:
        text = _describe(value, nested=False)
    except Exception as error:  # a repr of the user's that fails must not hide the failure being reported
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _describe(value: Any, nested: bool) -> str:
    if hasattr(type(value), "__array__") and not isinstance(value, np.generic):
        name = "array" if isinstance(value, np.ndarray) else type(value).__name__
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{name} of shape {tuple(shape)}, dtype {getattr(value, 'dtype', None)}"
    if nested:
        return repr(value)
    if type(value) is dict:
        return f"{{{', '.join(f'{key!r}: {_describe(part, True)}' for key, part in value.items())}}}"
    if type(value) is list:
        return f"[{', '.join(_describe(part, True) for part in value)}]"
    if type(value) is tuple:
        return f"({', '.join(_describe(part, True) for part in value)}{',' * (len(value) == 1)})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=False)
        return f"{type(value).__name__}({', '.join(f'{name}={_describe(part, True)}' for name, part in parts)})"
    return repr(value)


def place_buffers(buffers: Sequence[pickle.PickleBuffer], start: int = 0) -> tuple[list[tuple[int, int]], int]:
    """Lays `buffers` out one after the other, each aligned: their (offset, bytes), and the end."""
    places, end = [], start
    for buffer in buffers:
        offset = align(end)
        size = buffer.raw().nbytes
        places.append((offset, size))
        end = offset + size
    return places, end


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
    prefix, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_FDS, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
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

    def send(self, message: Any, fds: Sequence[int] = ()) -> bool:
        """Sends one frame; `fds` travel with its length prefix, and may be closed afterwards.

        Returns:
            Whether all has been sent; else call `flush` when there is room.

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


def nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Bytes of an array of this shape and dtype."""
    return math.prod(shape) * dtype.itemsize
