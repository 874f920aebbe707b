"""Batches that do not leave the process: their consumer must not get memory that the user's code still holds.

A `PyDataset` may fill and return the same array each time, a `batch_transform` may keep the batch before. In a worker
process a batch is copied on its way out. Here an array is copied if anybody but the batch refers to it, to the array
that it is a view of, or to the dict, list or tuple that it is in, going by their reference counts, or if its memory is
not NumPy's own. Most batches are fresh, and are passed on as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from keras_mp.loading.loader import Loaded, Loader, SampleLoader


def owned(loaded: Loaded, loader: Loader) -> tuple[Loaded, list[int]]:
    """The batch, with copies in place of the arrays that somebody else holds; and where those lie in memory."""
    if isinstance(loader, SampleLoader) and loader.collate is None and loader.batch_transform is None:
        return loaded, []  # our own collate made it
    copied: list[int] = []
    batch = _owned([loaded.batch], 0, _ONE + 1, False, copied)  # `loaded` is one more that refers to it
    return Loaded(batch, loaded.failures), copied


def _owned(container: Any, key: Any, most: int, held: bool, copied: list[int]) -> Any:
    """`container[key]`, or a copy of it if it is `held` or has more than `most` references."""
    held = held or _references(container, key) > most
    value = container[key]
    kind = type(value)
    if kind is dict:
        return {name: _owned(value, name, _ONE, held, copied) for name in value}
    if kind is list or kind is tuple:
        return kind([_owned(value, place, _ONE, held, copied) for place in range(len(value))])
    if isinstance(value, np.ndarray):
        if not held and _stands_alone(value):
            return value
        copied.append(value.__array_interface__["data"][0])
        return value.copy(order="K")
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_owned(value, place, _ONE, held, copied) for place in range(len(value)))
    return value


def _references(container: Any, key: Any) -> int:
    return sys.getrefcount(container[key])


_ONE = _references([object()], 0)  # what that says, in this Python, where only the container refers to it


def _stands_alone(array: Any) -> bool:
    """Whether the memory is that of NumPy arrays to which nobody else refers, or cannot be written to."""
    while array.base is not None:
        if type(array.base) is bytes:
            return True
        if type(array.base) is not np.ndarray or sys.getrefcount(array.base) > _ONE:
            return False
        array = array.base
    return bool(array.flags.owndata)
