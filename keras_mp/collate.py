"""Samples into a batch: the default collate writes each leaf of each sample straight into its row of the batch.

A leaf is an array, a scalar, a string or anything NumPy can convert; dicts, tuples, named tuples and lists of arrays
are nests, kept as they are. A list of plain scalars is a leaf. In a worker the rows lie in shared memory (`empty`), so
a sample is copied once, while it is still in the cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]

_current = threading.local()


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> npt.NDArray[Any]:
    """Like `numpy.empty`, but inside a worker's batch function the memory is already the batch's own.

    A batch that is returned in such arrays crosses to the training process without a copy. Elsewhere it is
    `numpy.empty`.

    Args:
        shape: shape of the array.
        dtype: its dtype; object arrays always live in ordinary memory.

    Returns:
        Uninitialised array of that shape and dtype, C-contiguous.
    """
    shape = (int(shape),) if isinstance(shape, int | np.integer) else tuple(int(n) for n in shape)
    kind = np.dtype(dtype)
    allocate: Allocate | None = getattr(_current, "allocate", None)
    if allocate is None or kind.hasobject or any(n < 0 for n in shape):
        return np.empty(shape, kind)
    return allocate(shape, kind)


@contextlib.contextmanager
def allocating(allocate: Allocate | None) -> Iterator[None]:
    """Makes `empty` on this thread use `allocate`."""
    before = getattr(_current, "allocate", None)
    _current.allocate = allocate
    try:
        yield
    finally:
        _current.allocate = before


class Samples:
    """Collects samples for a `collate` function of the user's."""

    def __init__(self, capacity: int, collate: Callable[[list[Any]], Any]) -> None:
        self._rows: list[Any] = [None] * capacity
        self._collate = collate

    def put(self, row: int, sample: Any) -> None:
        """Makes `sample` the batch's row `row`."""
        self._rows[row] = sample

    def repeat(self, row: int, target: int) -> None:
        """Uses row `row` as row `target` too."""
        self._rows[target] = self._rows[row]

    def finish(self, count: int) -> Any:
        """The batch of the first `count` rows."""
        return self._collate(self._rows[:count])


class Stack:
    """The default collate: the first sample fixes the structure and the shapes, every sample fills its row."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._root: _Node | None = None

    def put(self, row: int, sample: Any) -> None:
        """Writes `sample` into row `row` of every leaf.

        Raises:
            ValueError, TypeError: the sample's structure, a leaf's shape or its type differs from the first sample's.
        """
        if sample is None:
            raise TypeError("the transform returned None; did it forget to return the sample?")
        root = self._root or _build(sample, self._capacity, "")
        root.put(row, sample)
        self._root = root  # only now: a first sample that fails half-way fixes nothing

    def repeat(self, row: int, target: int) -> None:
        """Copies row `row` to row `target`."""
        if self._root is not None:
            self._root.repeat(row, target)

    def finish(self, count: int) -> Any:
        """The batch of the first `count` rows: arrays of shape (count, *sample shape), in the samples' structure."""
        return None if self._root is None else self._root.finish(count)


class _Node:
    """One place in the samples' structure; this base is the place of a None."""

    def __init__(self, path: str) -> None:
        self.path = path

    def put(self, row: int, value: Any) -> None:
        if value is not None:
            raise ValueError(f"{_name(self.path)} is None in the first sample of the batch, but {_kind(value)} here")

    def repeat(self, row: int, target: int) -> None:
        pass

    def finish(self, count: int) -> Any:
        return None


class _Nest(_Node):
    def __init__(self, path: str, children: dict[Any, _Node], like: Any) -> None:
        super().__init__(path)
        self._children = children
        self._like = type(like)
        self._is_map = isinstance(like, Mapping)

    def put(self, row: int, value: Any) -> None:
        same_kind = isinstance(value, Mapping) if self._is_map else isinstance(value, tuple | list)
        keys = (set(value) if self._is_map else set(range(len(value)))) if same_kind else None
        if keys != self._children.keys():
            has = _kind(value) if keys is None else f"keys {list(value) if self._is_map else len(value)}"
            raise ValueError(
                f"{_name(self.path)} has {has}, but the first sample of the batch has "
                f"{list(self._children) if self._is_map else f'{len(self._children)} parts'}"
            )
        for key, child in self._children.items():
            child.put(row, value[key])

    def repeat(self, row: int, target: int) -> None:
        for child in self._children.values():
            child.repeat(row, target)

    def finish(self, count: int) -> Any:
        done = {key: child.finish(count) for key, child in self._children.items()}
        if self._is_map:
            return done
        if hasattr(self._like, "_fields"):
            return self._like(*done.values())
        return (list if issubclass(self._like, list) else tuple)(done.values())


class _Leaf(_Node):
    def __init__(self, path: str, first: npt.NDArray[Any], capacity: int) -> None:
        super().__init__(path)
        self._shape = first.shape
        self._rows = empty((capacity, *first.shape), first.dtype.newbyteorder("="))

    def put(self, row: int, value: Any) -> None:
        array = value if type(value) is np.ndarray else _as_leaf(value, self.path)
        if array.shape != self._shape:
            raise ValueError(
                f"{_name(self.path)} has shape {array.shape}, but {self._shape} in the first sample of the batch; make "
                "the shapes equal in `transform`, or pass `collate=` to pad them"
            )
        if array.dtype != self._rows.dtype:
            self._widen(array.dtype)
        self._rows[row, ...] = array  # with the ellipsis, a 0-d array of objects gives its object

    def _widen(self, dtype: np.dtype[Any]) -> None:
        try:
            common = np.result_type(dtype, self._rows.dtype).newbyteorder("=")
        except TypeError as error:
            raise TypeError(f"{_name(self.path)} has dtype {dtype}, but {self._rows.dtype} before: {error}") from None
        if common.kind in "USO" and dtype.kind != self._rows.dtype.kind:
            raise TypeError(
                f"{_name(self.path)} has dtype {dtype}, but {self._rows.dtype} in the samples before it; convert them "
                "to one type in `transform`"
            )
        if common != self._rows.dtype:
            wider = empty(self._rows.shape, common)
            wider[...] = self._rows
            self._rows = wider

    def repeat(self, row: int, target: int) -> None:
        self._rows[target] = self._rows[row]

    def finish(self, count: int) -> Any:
        return self._rows[:count]


def _build(sample: Any, capacity: int, path: str) -> _Node:
    if sample is None:
        return _Node(path)
    if isinstance(sample, Mapping):
        return _Nest(path, {k: _build(v, capacity, f"{path}[{k!r}]") for k, v in sample.items()}, sample)
    if isinstance(sample, tuple) or (isinstance(sample, list) and not _is_scalar_list(sample)):
        return _Nest(path, {k: _build(v, capacity, f"{path}[{k}]") for k, v in enumerate(sample)}, sample)
    return _Leaf(path, _as_leaf(sample, path), capacity)


def _is_scalar_list(value: list[Any]) -> bool:
    return bool(value) and all(
        _is_scalar_list(v) if isinstance(v, list) else isinstance(v, bool | int | float | complex | str | np.generic)
        for v in value
    )


def _as_leaf(value: Any, path: str) -> npt.NDArray[Any]:
    if isinstance(value, bytes):  # dtype "S" would drop trailing zero bytes
        array = np.empty((), dtype=object)
        array[()] = value
        return array
    array = np.asarray(value)
    if array.dtype.hasobject and not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
        raise TypeError(
            f"{_name(path)} is {_kind(value)}, which cannot be stacked; return arrays, scalars, strings or dicts and "
            "tuples of them, or pass `collate=`"
        )
    return array


def _name(path: str) -> str:
    return f"sample{path}"


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"
