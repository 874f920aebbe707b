"""The samples of a batch, padded: collected first, as only the last one shows how long the batch is.

Each is then written into its row of an array in shared memory (`empty`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.loading.collate import NO_SAMPLE, as_leaf, empty, parts_of, type_in_words
from keras_mp.loading.padding import Padding
from keras_mp.loading.paths import Path, describe_path, pick, unused_keys


class PaddedRows:
    """Collects the samples of one batch, whose first one fixes the structure, and pads them when all are there.

    Samples are kept as they are given until then. One that lies in memory which an earlier one lay in shows that the
    user's code fills the same memory again: then all are copied, and the first one always is.

    Args:
        capacity: rows in the batch at most.
        padding: how to pad.
        like: the sample that fixes the structure; None: the first one.
        stretch: see `Request`.
    """

    def __init__(self, capacity: int, padding: Padding, like: Any = None, stretch: int = 0) -> None:
        self._capacity, self._padding, self._stretch = capacity, padding, stretch
        self._samples: list[Any] = [None] * capacity
        self._leaves: list[dict[Path, Any]] = [{}] * capacity
        self._like = like
        self._spec = None if like is None else _spec_of(dict(_leaves_of(like)))
        self._basis = "the first sample of the batch" if like is None else "most samples of the batch"
        self._rows_at: dict[int, int] = {}  # rows by the address of an array that is kept
        self._is_memory_reused = False
        self._kept: list[Any] = []  # what was copied, so that its address is not given to another

    @staticmethod
    def spec_of(sample: Any) -> Any:
        """What must be alike in the samples of a batch, as something hashable: structure, axes and kinds of leaves.

        Raises:
            TypeError: the sample cannot be padded at all.
        """
        return frozenset(_spec_of(dict(_leaves_of(sample))).items())

    def restarted(self, like: Any) -> PaddedRows:
        """One for the same batch, in which the sample `like` fixes the structure."""
        return PaddedRows(self._capacity, self._padding, like, self._stretch)

    def put(self, row: int, sample: Any) -> None:
        """Makes `sample` the batch's row `row`.

        Raises:
            ValueError, TypeError: its structure, a leaf's number of axes or its kind differs from the first sample's;
                a leaf is longer than `max_length`.
        """
        if sample is None:
            raise TypeError(NO_SAMPLE)
        leaves = dict(_leaves_of(sample))
        spec = _spec_of(leaves)
        if self._spec is None:
            self._check_arguments(sample, leaves)
        else:
            spec = _merged(spec, self._spec, self._basis)
        for path, leaf in leaves.items():
            for number, axis in enumerate(self._padding.axes_of(path, np.ndim(leaf))):
                if axis.most is not None and leaf.shape[number] > axis.most:
                    raise ValueError(
                        f"{describe_path(path)} has shape {leaf.shape}, longer in axis {number} than "
                        f"max_length={axis.most} of keras_mp.pad; cut it in `transform`, or raise max_length"
                    )
        if self._spec is None:
            self._like = sample
        self._spec = spec
        self._samples[row], self._leaves[row] = sample, leaves
        self._own(row, leaves)

    def _check_arguments(self, sample: Any, leaves: dict[Path, Any]) -> None:
        """Whether what `pad` was told fits these samples."""
        for name in ("value", "multiple_of", "max_length"):
            if unused := unused_keys(getattr(self._padding, name), leaves):
                raise ValueError(
                    f"{name} of keras_mp.pad has the path {unused[0]!r}, but samples have the leaves "
                    f"{[describe_path(path) for path in leaves]}; give keys of dicts, or positions in tuples"
                )
            given = getattr(self._padding, name)
            if isinstance(given, tuple) and len(given) not in map(np.ndim, leaves.values()):
                raise ValueError(
                    f"{name}={given!r} of keras_mp.pad is for leaves of {len(given)} axes, but samples have "
                    f"{[f'{describe_path(path)} of {np.ndim(leaf)} axes' for path, leaf in leaves.items()]}; give one "
                    "entry (an int or None) for each axis"
                )
        self._masks(sample, leaves)

    def _own(self, row: int, leaves: dict[Path, Any]) -> None:
        arrays = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, np.ndarray) and leaf.nbytes}
        addresses = [array.ctypes.data for array in arrays.values()]
        if not self._is_memory_reused and any(self._rows_at.get(address, row) != row for address in addresses):
            self._is_memory_reused = True
            for other in set(self._rows_at.values()) - {row}:
                self._copy(other)
        self._rows_at |= dict.fromkeys(addresses, row)
        if self._is_memory_reused or not self._kept:
            self._kept.append(arrays)
            self._copy(row)

    def _copy(self, row: int) -> None:
        self._leaves[row] = {
            path: leaf.copy() if isinstance(leaf, np.ndarray) else leaf for path, leaf in self._leaves[row].items()
        }
        self._samples[row] = _rebuilt(self._samples[row], self._leaves[row].__getitem__)

    def row(self, row: int) -> Any:
        """The sample in row `row`, not padded."""
        return self._samples[row]

    def finish(self, count: int) -> Any:
        """The batch of the first `count` rows: arrays of shape (count, *longest), in the samples' structure."""
        if self._like is None:
            return None
        padded = {path: self._padded(path, count) for path in self._leaves[0]}
        batch = _rebuilt(self._like, padded.__getitem__)
        for name, path in self._masks(self._like, self._leaves[0]):
            (batch if len(path) == 1 else batch[0])[name] = self._mask(path, padded[path], count)
        return batch

    def _padded(self, path: Path, count: int) -> Any:
        leaves = [self._leaves[row][path] for row in range(count)]
        if leaves[0] is None:
            return None
        shapes = np.array([leaf.shape for leaf in leaves], dtype=np.int64).reshape(count, -1)
        axes = self._padding.axes_of(path, shapes.shape[1])
        shape = tuple(
            axis.stretched(int(lengths.max()), bool((lengths != lengths[0]).any()), self._stretch)
            for axis, lengths in zip(axes, shapes.T, strict=True)
        )
        dtype, value = _common_dtype(leaves), None
        if shape:
            dtype, value = _with_value(pick(self._padding.value, path, 0), dtype, leaves, path)
        rows = empty((count, *shape), dtype)
        for row, leaf in zip(rows, leaves, strict=True) if shape else ():
            if leaf.shape == shape:
                row[...] = leaf
            elif leaf.shape[1:] == shape[1:]:
                row[: len(leaf)] = leaf
                row[len(leaf) :] = value
            else:
                row[...] = value
                row[tuple(map(slice, leaf.shape))] = leaf
        if not shape:
            for number, leaf in enumerate(leaves):
                rows[number, ...] = leaf
        return rows

    def _masks(self, sample: Any, leaves: dict[Path, Any]) -> list[tuple[str, Path]]:
        """Names of the masks, and of which leaf each is."""
        mask = self._padding.mask
        if mask is None:
            return []
        first: Path = ()
        if not isinstance(sample, Mapping):
            parts = parts_of(sample)
            if not parts or not isinstance(parts[0], Mapping):
                raise TypeError(
                    f"mask={mask!r} of keras_mp.pad adds a leaf to samples that are dicts, or (dict, ...), but "
                    f"this one is {type_in_words(sample)}; return a dict from `transform`, or leave out mask="
                )
            first, sample = (0,), parts[0]
        known = [path for path in leaves if path[: len(first)] == first and len(path) == len(first) + 1]
        known = [path for path in known if np.ndim(leaves[path])]
        wanted = {mask: None} if isinstance(mask, str) else mask
        masks = []
        for name, key in wanted.items():
            path = (known[0] if known else None) if key is None else (*first, key)
            if name in sample or path not in known:
                raise ValueError(
                    f"mask={mask!r} of keras_mp.pad cannot be made: samples have "
                    + (f"a leaf {name!r} already" if name in sample else f"no leaf with an axis at {key!r}")
                    + f"; they have the keys {list(sample)}"
                )
            masks.append((name, path))
        return masks

    def _mask(self, path: Path, padded: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
        """True where the batch holds data: bool, shape (count, *lengths)."""
        lengths = max(1, padded.ndim - 2)
        mask = empty(padded.shape[: 1 + lengths], np.bool_)
        mask[...] = False
        for row in range(count):
            mask[row][tuple(map(slice, self._leaves[row][path].shape[:lengths]))] = True
        return mask


# What an empty list holds: fits any other dtype. (NumPy's own choice is float64, which would make floats of ints.)
_ANY = np.dtype("V1")
_KINDS = {"U": " of str", "S": " of bytes", "O": " of objects", "": "", "?": ""}

_Kind = tuple[int, str]  # number of axes, -1 for None; "U", "S", "O", "?" (anything), or "" for numbers


def _is_leaf_list(nest: Any) -> bool:
    """Whether a list is a leaf that `parts_of` would take apart."""
    return isinstance(nest, list) and all(isinstance(part, bytes) for part in nest)


def _leaves_of(nest: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves with their paths, as arrays, or None."""
    if _is_leaf_list(nest):
        yield path, np.array(nest, dtype=object if nest else _ANY)
    elif (parts := parts_of(nest)) is not None:
        for key, part in parts.items():
            yield from _leaves_of(part, (*path, key))
    else:
        yield path, None if nest is None else as_leaf(nest, describe_path(path))


def _rebuilt(nest: Any, leaf: Callable[[Path], Any], path: Path = ()) -> Any:
    """The structure of `nest` with leaves of others; mappings become dicts."""
    parts = None if _is_leaf_list(nest) else parts_of(nest)
    if parts is None:
        return leaf(path)
    built = {key: _rebuilt(part, leaf, (*path, key)) for key, part in parts.items()}
    if isinstance(nest, Mapping):
        return built
    if hasattr(nest, "_fields"):
        return type(nest)(*built.values())
    return (list if isinstance(nest, list) else tuple)(built.values())


def _spec_of(leaves: dict[Path, Any]) -> dict[Path, _Kind]:
    return {path: _kind_of(leaf) for path, leaf in leaves.items()}


def _kind_of(leaf: Any) -> _Kind:
    if leaf is None:
        return -1, ""
    return leaf.ndim, "?" if leaf.dtype == _ANY else leaf.dtype.kind if leaf.dtype.kind in "USO" else ""


def _merged(spec: dict[Path, _Kind], first: dict[Path, _Kind], basis: str) -> dict[Path, _Kind]:
    """What both specs say together.

    Raises:
        ValueError: they contradict each other.
    """
    if spec.keys() != first.keys():
        raise ValueError(
            f"the sample has the leaves {[describe_path(path) for path in spec]}, but {basis} has "
            f"{[describe_path(path) for path in first]}; give every sample the same structure"
        )
    merged = {}
    for path, (ndim, kind) in spec.items():
        other_ndim, other_kind = first[path]
        if ndim != other_ndim or (kind != other_kind and "?" not in (kind, other_kind)):
            raise ValueError(
                f"{describe_path(path)} has {_in_words(ndim, kind)}, but {_in_words(other_ndim, other_kind)} in "
                f"{basis}; keras_mp.pad makes lengths equal, but neither numbers of axes nor types"
            )
        merged[path] = ndim, other_kind if kind == "?" else kind
    return merged


def _in_words(ndim: int, kind: str) -> str:
    return "no value (None)" if ndim < 0 else f"{ndim} ax{'is' if ndim == 1 else 'es'}{_KINDS[kind]}"


def _common_dtype(leaves: list[Any]) -> np.dtype[Any]:
    dtypes = {leaf.dtype for leaf in leaves if leaf.dtype != _ANY}
    return np.result_type(*dtypes).newbyteorder("=") if dtypes else np.dtype(np.float64)


def _with_value(value: Any, dtype: np.dtype[Any], leaves: list[Any], path: Path) -> tuple[np.dtype[Any], Any]:
    """The dtype of a leaf's array, and the padding value in it.

    Raises:
        ValueError: no array of such leaves can hold the value.
    """
    is_zero = isinstance(value, int) and not isinstance(value, bool) and value == 0
    if dtype.kind == "O":
        first = next((item for leaf in leaves for item in leaf.flat), None)
        return dtype, type(first)() if is_zero and isinstance(first, str | bytes) else value
    if dtype.kind in "US":
        kind = str if dtype.kind == "U" else bytes
        if is_zero or isinstance(value, kind):
            value = kind() if is_zero else value
            return np.result_type(dtype, np.array(value).dtype), value
    elif dtype.kind in "Mm" and is_zero:
        return dtype, np.zeros((), dtype)
    elif not isinstance(value, str | bytes):
        cast = _cast(value, dtype)
        if cast is not None:
            return dtype, cast
    raise ValueError(
        f"{describe_path(path)} has dtype {dtype}, which cannot hold value={value!r} of keras_mp.pad; give another "
        "value, by leaf in a dict of paths, or convert the leaf in `transform`"
    )


def _cast(value: Any, dtype: np.dtype[Any]) -> Any:
    """`value` in `dtype`; None if it is another value there. Floats are rounded."""
    with np.errstate(all="ignore"):
        try:
            cast = np.array(value).astype(dtype)
        except (OverflowError, TypeError, ValueError):
            return None
    if dtype.kind in "biu":
        return cast if cast == value else None
    if np.isfinite(np.complex128(value)) and not np.isfinite(np.complex128(cast)):
        return None
    return cast if dtype.kind == "c" or np.isrealobj(np.array(value)) else None
