"""Batches that are used in the process that loads them: what the user's code still holds must not reach their consumer.

A `PyDataset` may fill and return the same array each time, a `batch_transform` may keep the batch before. On its way
out of a worker process a batch is copied anyway. Here an array is copied if anybody but the batch refers to it, to the
array that it is a view of, or to the dict, list or tuple that it is in, going by their reference counts, or if its
memory is not NumPy's own. Most batches are fresh, and are passed on as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_mp.loading.base import Loaded, Loader, ignore_position
from keras_mp.loading.loader import SampleLoader
from keras_mp.loading.randomness import Seeder
from keras_mp.loading.timing import StageTimes
from keras_mp.plan.request import Request


def load_in_process(loader: Loader, request: Request) -> Loaded:
    """Loads a batch in this thread, while no other thread loads, and leaves the random generators as they were."""
    if not loader.runs_user_code:
        return load_timed(loader, request, None)
    with loader.generators.restored():
        return owned(load_timed(loader, request, loader.generators.seed), loader)[0]


def load_timed(
    loader: Loader, request: Request, seed: Seeder | None, report_position: Callable[[int], None] = ignore_position
) -> Loaded:
    """Loads a batch, and says what it took."""
    times = StageTimes(loader.slowest, request.traced)
    loaded = loader.load(request, report_position, seed, times)
    return loaded._replace(work=times.result(), nbytes=_nbytes(loaded.batch))


def owned(loaded: Loaded, loader: Loader) -> tuple[Loaded, list[int]]:
    """The batch, with copies in place of the arrays that somebody else holds; and the addresses of those arrays."""
    if isinstance(loader, SampleLoader) and loader.stacks and loader.batch_transform is None:
        return loaded, []  # our own collate made it
    copied: list[int] = []
    batch = _owned([loaded.batch], 0, _ONE + 1, False, copied)  # `loaded` is one more that refers to it
    return loaded._replace(batch=batch), copied


def _nbytes(nest: Any) -> int:
    if isinstance(nest, dict):
        return sum(map(_nbytes, nest.values()))
    if isinstance(nest, list | tuple):
        return sum(map(_nbytes, nest))
    return int(getattr(nest, "nbytes", 0))


def _owned(container: Any, key: Any, max_references: int, is_held: bool, copied: list[int]) -> Any:
    """`container[key]`, or a copy of it if it `is_held` by somebody else or has more than `max_references`."""
    is_held = is_held or _count_references(container, key) > max_references
    value = container[key]
    kind = type(value)
    if kind is dict:
        return {name: _owned(value, name, _ONE, is_held, copied) for name in value}
    if kind is list or kind is tuple:
        return kind([_owned(value, index, _ONE, is_held, copied) for index in range(len(value))])
    if isinstance(value, np.ndarray):
        if not is_held and _owns_memory(value):
            return value
        copied.append(value.__array_interface__["data"][0])
        return value.copy(order="K")
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_owned(value, index, _ONE, is_held, copied) for index in range(len(value)))
    return value


def _count_references(container: Any, key: Any) -> int:
    return sys.getrefcount(container[key])


_ONE = _count_references([object()], 0)  # the count, in this Python, where only the container refers to it


def _owns_memory(array: Any) -> bool:
    """Whether the memory is that of NumPy arrays to which nobody else refers, or cannot be written to."""
    while array.base is not None:
        if type(array.base) is bytes:
            return True
        if type(array.base) is not np.ndarray or sys.getrefcount(array.base) > _ONE:
            return False
        array = array.base
    return bool(array.flags.owndata)
