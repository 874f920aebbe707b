"""Objects on their way between parent and worker: pickle protocol 5 with the bytes of arrays out of band.

How functions and classes of the user's travel is the affair of `code`. `numpy.memmap` is sent as the place in its file,
never as its bytes. A lock travels as a new one that nobody holds. An open file does not travel at all.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.errors import KerasMPError, short_repr
from keras_mp.memory.code import CodePickler

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())

Buffers = list[pickle.PickleBuffer]

_CHECKED_BYTES = 1 << 20


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
        raise _refusal(value, name, error) from error
    return stream.getvalue()


def check_user_object(value: Any, name: str) -> None:
    """Pickles the first megabyte of a source or function of the user's, and keeps nothing: an error comes now.

    What holds a file or a connection shows it there; large data is not pickled once more for it.

    Raises:
        KerasMPError: as `dump_user_object`.
    """
    try:
        _UserPickler(_FirstBytes(_CHECKED_BYTES), lambda buffer: None).dump(value)
    except _EnoughBytes:
        return
    except Exception as error:
        raise _refusal(value, name, error) from error


def _refusal(value: Any, name: str, error: Exception) -> KerasMPError:
    return KerasMPError(
        f"{name} cannot be sent to worker processes: {type(error).__name__}: {error}\n"
        f"Received {name}={short_repr(value)}. What cannot be pickled (open files, database handles, generators), "
        "each worker can open for itself: keras_mp.PerWorker(open_function, *arguments), where open_function may be a "
        "class of yours; or use workers=0 or use_multiprocessing=False, which send nothing."
    )


class _EnoughBytes(Exception):
    """Ends the pickling."""


class _FirstBytes(io.BytesIO):
    """Forgets what is written to it, and ends the writing after so many bytes. A pickler writes every 64 KB."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self._left = nbytes

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise _EnoughBytes
        return len(data)


class _UserPickler(CodePickler):
    def reducer_override(self, obj: Any) -> Any:
        keras = sys.modules.get("keras")
        if keras is not None and isinstance(obj, type) and obj is keras.utils.PyDataset:
            # A class defined in a script or notebook travels by value; its base need not cost the worker keras.
            return _py_dataset_stand_in, ()
        torch = sys.modules.get("torch")
        if torch is not None and type(obj) is torch.Tensor and (memory := _tensor_memory(torch, obj)) is not None:
            return _make_tensor, (memory, str(obj.dtype).partition(".")[2], obj.requires_grad)
        if isinstance(obj, _LOCK):  # of whatever it protects, each worker has a copy, which nobody is at
            return threading.Lock, ()
        if isinstance(obj, _RLOCK):
            return threading.RLock, ()
        if isinstance(obj, io.TextIOWrapper) and obj not in (sys.stdout, sys.stderr):
            # cloudpickle would send all of its text, in which the places that `tell` gave are others.
            raise TypeError(f"cannot pickle the open file {getattr(obj, 'name', obj)!r}")
        if isinstance(obj, np.memmap):
            place = memmap_place(obj)
            if place is not None:
                return _open_memmap, place
            return np.asarray(obj).__reduce_ex__(5)
        if isinstance(obj, np.ndarray) and type(obj) is not np.ndarray and _is_pickled_by_numpy(type(obj)):
            # NumPy pickles the memory of a subclass, such as what pandas' to_records() gives, in band: to be copied.
            return _view, (obj.view(np.ndarray), type(obj))
        return super().reducer_override(obj)


def _tensor_memory(torch: Any, tensor: Any) -> npt.NDArray[Any] | None:
    """A tensor's memory as an array, which travels out of band as any; None of one that is not just an array."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    if not tensor.is_leaf or vars(tensor):
        return None
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype is torch.bfloat16:  # which NumPy has not
        plain = plain.view(torch.int16)
    try:
        array: npt.NDArray[Any] = plain.numpy()
    except (TypeError, RuntimeError):
        return None
    return array


def _make_tensor(array: npt.NDArray[Any], dtype: str, requires_grad: bool) -> Any:
    import torch

    return torch.from_numpy(array).view(getattr(torch, dtype)).requires_grad_(requires_grad)


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


def memmap_place(array: np.memmap[Any, Any]) -> tuple[Any, ...] | None:
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


def _is_pickled_by_numpy(kind: Any) -> bool:
    """Whether a subclass of `numpy.ndarray` adds nothing to how it is pickled."""
    names = ("__reduce_ex__", "__reduce__", "__setstate__")
    return all(getattr(kind, name) is getattr(np.ndarray, name) for name in names)


def _view(array: np.ndarray[Any, Any], kind: type) -> Any:
    return array.view(kind)


def _open_memmap(path: str, start: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    data: np.memmap[Any, Any] = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(span,))
    return np.ndarray(shape, dtype, buffer=data, strides=strides)
