"""Samples into a batch: the default collate writes each leaf of each sample straight into its row of the batch.

A leaf is an array, a scalar, a string or anything NumPy can convert; dicts, tuples, named tuples and lists of arrays
are nests, kept as they are. A list of plain scalars is a leaf. In a worker the rows lie in shared memory (`empty`), so
a sample is copied once, while it is still in the cache. Nothing here knows of requests, epochs or random numbers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

NO_SAMPLE = "the transform returned None; did it forget to return the sample? (Without a transform, the source did.)"

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]


class _Current(threading.local):
    allocate: Allocate | None = None


_current = _Current()


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
    dtype = np.dtype(dtype)
    if _current.allocate is None or dtype.hasobject or any(n < 0 for n in shape):
        return np.empty(shape, dtype)
    return _current.allocate(shape, dtype)


@contextlib.contextmanager
def allocating(allocate: Allocate | None) -> Iterator[None]:
    """Makes `empty` on this thread use `allocate`; None: ordinary memory."""
    before, _current.allocate = _current.allocate, allocate
    try:
        yield
    finally:
        _current.allocate = before


def with_tuples(batch: Any) -> Any:
    """The batch with lists made tuples: TensorFlow takes a list for a tensor."""
    if isinstance(batch, dict):
        return {key: with_tuples(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [with_tuples(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def holds_strings(batch: Any) -> bool:
    """Whether a leaf of the batch is an array of strings, or of objects, which strings of bytes are."""
    if isinstance(batch, dict):
        return any(map(holds_strings, batch.values()))
    if isinstance(batch, list | tuple):
        return any(map(holds_strings, batch))
    return isinstance(batch, np.ndarray) and batch.dtype.kind in "USO"


class Samples:
    """Collects samples, in at most `capacity` rows, for a `collate` function of the user's."""

    def __init__(self, capacity: int, collate: Callable[[list[Any]], Any]) -> None:
        self._rows: list[Any] = [None] * capacity
        self._collate = collate

    def put(self, row: int, sample: Any) -> None:
        """Makes `sample` the batch's row `row`."""
        self._rows[row] = sample

    def row(self, row: int) -> Any:
        """The sample in row `row`."""
        return self._rows[row]

    def finish(self, count: int) -> Any:
        """The batch of the first `count` rows."""
        return self._collate(self._rows[:count])


class Stack:
    """The default collate: one sample fixes the structure and the shapes, every sample fills its row.

    Args:
        capacity: rows in the batch.
        like: the sample that fixes them; None: the first one.
    """

    def __init__(self, capacity: int, like: Any = None) -> None:
        self._capacity = capacity
        self._root: _Node | None = None if like is None else _node(like, capacity, "most samples of the batch")

    def put(self, row: int, sample: Any) -> None:
        """Writes `sample` into row `row` of every leaf.

        Raises:
            ValueError, TypeError: the sample's structure, a leaf's shape or its type differs from the first sample's.
        """
        if sample is None:
            raise TypeError(NO_SAMPLE)
        root = self._root or _node(sample, self._capacity, "the first sample of the batch")
        root.put(row, sample)
        self._root = root  # only now: a first sample that fails half-way fixes nothing

    def restarted(self, like: Any) -> Stack:
        """One for the same batch, in which the sample `like` fixes the structure and the shapes."""
        return Stack(self._capacity, like)

    @staticmethod
    def spec_of(sample: Any) -> Any:
        """What must be alike in the samples of a batch; see `spec_of`."""
        return spec_of(sample)

    def row(self, row: int) -> Any:
        """The sample in row `row`; its arrays are views of the batch."""
        return None if self._root is None else self._root.take(row)

    def finish(self, count: int) -> Any:
        """The batch of the first `count` rows: arrays of shape (count, *sample shape), in the samples' structure."""
        return None if self._root is None else self._root.take(slice(count))


def spec_of(sample: Any) -> Any:
    """What must be alike in the samples of a batch, as something hashable: structure, shapes and kinds of leaves.

    Raises:
        TypeError, ValueError: the sample cannot be stacked at all.
    """
    if sample is None:
        return None
    if (parts := parts_of(sample)) is not None:
        return isinstance(sample, Mapping), frozenset((key, spec_of(part)) for key, part in parts.items())
    leaf = as_leaf(sample, "sample")
    return leaf.shape, leaf.dtype.kind if leaf.dtype.kind in "USO" else ""


def leaves_of(nest: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a sample or a batch as they are, with their paths: `path`, and keys behind it."""
    parts = parts_of(nest)
    if parts is None:
        yield path, nest
        return
    for key, part in parts.items():
        yield from leaves_of(part, f"{path}[{key!r}]")


def copied(sample: Any) -> Any:
    """`sample` with arrays and containers of its own. Arrays in a mapped file come read-only, and not copied."""
    if isinstance(sample, np.ndarray):
        if not _is_mapped_file(sample):
            return sample.copy(order="K")
        view = sample.view()
        view.flags.writeable = False
        return view
    kind = type(sample)
    if kind is dict:
        return {key: copied(value) for key, value in sample.items()}
    if kind is list or kind is tuple:
        return kind([copied(value) for value in sample])
    if isinstance(sample, tuple) and hasattr(sample, "_make"):
        return sample._make(copied(value) for value in sample)
    return sample.copy() if kind is np.void else sample  # a row of a structured array is a view of it


def _is_mapped_file(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


class _Node:
    """One part of the samples' structure: a nest, a leaf, or, as this base, a None.

    Args:
        path: the part in a user's words, such as "sample['x'][0]".
        basis: the sample that fixed the structure, in words.
    """

    def __init__(self, path: str, basis: str) -> None:
        self.path = path
        self.basis = basis

    def put(self, row: int, value: Any) -> None:
        if value is not None:
            raise ValueError(f"{self.path} is None in {self.basis}, but {type_in_words(value)} here")

    def take(self, rows: int | slice) -> Any:
        return None


class _Nest(_Node):
    def __init__(self, path: str, basis: str, children: dict[Any, _Node], like: Any) -> None:
        super().__init__(path, basis)
        self._children = children
        self._type = type(like)
        self._is_map = isinstance(like, Mapping)

    def put(self, row: int, value: Any) -> None:
        if self._is_map:
            is_alike = isinstance(value, Mapping)
            fits = is_alike and value.keys() == self._children.keys()
        else:
            is_alike = isinstance(value, tuple | list)
            fits = is_alike and len(value) == len(self._children)
        if not fits:
            here = f"keys {list(value) if self._is_map else len(value)}" if is_alike else type_in_words(value)
            there = list(self._children) if self._is_map else f"{len(self._children)} parts"
            are_lists = is_alike and issubclass(self._type, list)
            remedy = (
                "; if they are lists of numbers, pass `collate=keras_mp.pad()`, which pads them" if are_lists else ""
            )
            raise ValueError(f"{self.path} has {here}, but {self.basis} has {there}{remedy}")
        for key, child in self._children.items():
            child.put(row, value[key])

    def take(self, rows: int | slice) -> Any:
        parts = {key: child.take(rows) for key, child in self._children.items()}
        if self._is_map:
            return parts
        if hasattr(self._type, "_fields"):
            return self._type(*parts.values())
        return (list if issubclass(self._type, list) else tuple)(parts.values())


class _Leaf(_Node):
    def __init__(self, path: str, basis: str, first: npt.NDArray[Any], capacity: int) -> None:
        super().__init__(path, basis)
        self._shape = first.shape
        self._rows = empty((capacity, *first.shape), first.dtype.newbyteorder("="))

    def put(self, row: int, value: Any) -> None:
        array = value if type(value) is np.ndarray else as_leaf(value, self.path)
        if array.shape != self._shape:
            raise ValueError(
                f"{self.path} has shape {array.shape}, but {self._shape} in {self.basis}; make the shapes equal in "
                "`transform`, or pass `collate=keras_mp.pad()`, which pads them"
            )
        if array.dtype != self._rows.dtype:
            self._widen(array.dtype)
        self._rows[row, ...] = array  # with the ellipsis, a 0-d array of objects gives its object

    def _widen(self, dtype: np.dtype[Any]) -> None:
        try:
            common = np.result_type(dtype, self._rows.dtype).newbyteorder("=")
        except TypeError as error:
            raise TypeError(f"{self.path} has dtype {dtype}, but {self._rows.dtype} before: {error}") from None
        if common.kind in "USO" and dtype.kind != self._rows.dtype.kind:
            raise TypeError(
                f"{self.path} has dtype {dtype}, but {self._rows.dtype} in the samples before it; convert them to one "
                "type in `transform`"
            )
        if common != self._rows.dtype:
            wider = empty(self._rows.shape, common)
            wider[...] = self._rows
            self._rows = wider

    def take(self, rows: int | slice) -> Any:
        return self._rows[rows, ...]  # of a row, an array too, and not a scalar


def _node(sample: Any, capacity: int, basis: str, path: str = "sample") -> _Node:
    if sample is None:
        return _Node(path, basis)
    if (parts := parts_of(sample)) is not None:
        children = {key: _node(part, capacity, basis, f"{path}[{key!r}]") for key, part in parts.items()}
        return _Nest(path, basis, children, sample)
    return _Leaf(path, basis, as_leaf(sample, path), capacity)


def parts_of(sample: Any) -> dict[Any, Any] | None:
    """A nest's parts by key or number; None for a leaf."""
    if isinstance(sample, Mapping):
        return dict(sample.items())
    is_nest = isinstance(sample, tuple) or (isinstance(sample, list) and not _is_scalar_list(sample))
    return dict(enumerate(sample)) if is_nest else None


def _is_scalar_list(value: list[Any]) -> bool:
    return bool(value) and all(
        _is_scalar_list(v) if isinstance(v, list) else isinstance(v, bool | int | float | complex | str | np.generic)
        for v in value
    )


def as_leaf(value: Any, path: str) -> npt.NDArray[Any]:
    """A leaf as an array.

    Raises:
        TypeError: it makes none; `path` is where it is, in words.
    """
    if isinstance(value, bytes):  # dtype "S" would drop trailing zero bytes
        array = np.empty((), dtype=object)
        array[()] = value
        return array
    try:
        array = np.asarray(value)
    except (RuntimeError, TypeError) as error:  # a tensor that needs a gradient, is on a GPU, or of bfloat16
        raise TypeError(
            f"{path} is {type_in_words(value)}, of which NumPy can make no array: {error}; convert it in `transform`"
        ) from error
    if hasattr(value, "toarray"):
        raise TypeError(
            f"{path} is {type_in_words(value)}, which is sparse and cannot be stacked; return an array of it from "
            "`transform`: sample.toarray() of a sparse array's row, sample.toarray()[0] of a sparse matrix's"
        )
    if array.dtype.hasobject and not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
        raise TypeError(
            f"{path} is {type_in_words(value)}, which cannot be stacked; return arrays, scalars, strings or dicts and "
            "tuples of them, or pass `collate=`"
        )
    return array


def type_in_words(value: Any) -> str:
    """Of which type a value is, in words."""
    return f"of type {type(value).__name__}"
