"""A sample as one run of bytes, from which it is made again with arrays of its own, which may be written to."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.memory import pickling
from keras_mp.memory.files import align, place_buffers

_HEAD = struct.Struct("<QQ")  # bytes of the pickle, and how many buffers follow it
_PLACE = struct.Struct("<QQ")  # offset and bytes of one


def encode(sample: Any) -> bytes:
    """The bytes of a sample.

    Raises:
        Exception: it cannot be pickled.
    """
    buffers: pickling.Buffers = []
    body = pickling.dump_result(sample, buffers)
    start = align(_HEAD.size + _PLACE.size * len(buffers) + len(body))
    places, end = place_buffers(buffers, start)
    data = bytearray(end)
    _HEAD.pack_into(data, 0, len(body), len(buffers))
    for number, place in enumerate(places):
        _PLACE.pack_into(data, _HEAD.size + number * _PLACE.size, *place)
    begin = _HEAD.size + _PLACE.size * len(buffers)
    data[begin : begin + len(body)] = body
    for buffer, (offset, size) in zip(buffers, places, strict=True):
        data[offset : offset + size] = buffer.raw()
    return bytes(data)


def decode(data: npt.NDArray[np.uint8]) -> Any:
    """The sample; its arrays lie in `data`, which nobody else may have."""
    memory = memoryview(data)  # type: ignore[arg-type]  # arrays are buffers
    body, count = _HEAD.unpack_from(memory, 0)
    places = [_PLACE.unpack_from(memory, _HEAD.size + number * _PLACE.size) for number in range(count)]
    begin = _HEAD.size + _PLACE.size * count
    return pickle.loads(memory[begin : begin + body], buffers=[memory[at : at + size] for at, size in places])
