"""Export to `tf.data`: the only module that imports tensorflow.

A Python call takes the next batch that the read-ahead has ready and hands TensorFlow the arrays, which it aliases,
because they are aligned and have the dtype it expects. The parallel work is done by then, in the workers, so nothing
here needs TensorFlow's own parallel map. Of small batches, for which such a call is the greater part of the work, it
takes as many as are ready.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np

from keras_mp.checks import check_count, usable_cores
from keras_mp.errors import KerasMPError
from keras_mp.loading.collate import holds_strings, with_tuples
from keras_mp.plan.batching import ENDLESS

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        "to_tf_dataset() needs TensorFlow; install it with: pip install 'keras-mp[tensorflow]'"
    ) from error

# One call into Python takes this many batches at most, and bytes.
_MOST_TOGETHER = 8
_BYTES_TOGETHER = 1 << 20


class _Spec:
    """The structure of a batch and what each leaf must be."""

    def __init__(self, spec: Any) -> None:
        self.structure = spec
        self.leaves: list[tuple[str, tf.TensorSpec]] = []
        for path, leaf in _walk(spec):
            if leaf is None:
                continue
            if not isinstance(leaf, tf.TensorSpec):
                raise TypeError(f"element_spec{path} must be a tf.TensorSpec, got {leaf!r}")
            self.leaves.append((path, leaf))

    def convert(self, batch: Any) -> list[np.ndarray[Any, Any]]:
        """The batch's leaves, in order.

        Raises:
            ValueError: a leaf, or the structure, is not what the spec says.
        """
        found = [(path, leaf) for path, leaf in _walk(batch) if leaf is not None]
        if [path for path, _ in found] != [path for path, _ in self.leaves]:
            raise ValueError(
                f"a batch has the leaves {[p or 'batch' for p, _ in found]}, but the element_spec has "
                f"{[p or 'batch' for p, _ in self.leaves]}; give every batch the same structure"
            )
        return [self._check(path, leaf, spec) for (path, leaf), (_, spec) in zip(found, self.leaves, strict=True)]

    @staticmethod
    def _check(path: str, leaf: Any, spec: tf.TensorSpec) -> np.ndarray[Any, Any]:
        array = np.asarray(leaf)
        dtype = _tf_dtype(array)
        if dtype != spec.dtype or not spec.shape.is_compatible_with(array.shape):
            raise ValueError(
                f"batch{path} contradicts the element_spec: expected shape {tuple(spec.shape)} and dtype "
                f"{spec.dtype.name}, received shape {array.shape} and dtype {array.dtype}; make all batches alike, "
                "pass collate=keras_mp.pad(), which knows which axes vary, or element_spec= with None for these axes"
            )
        if array.dtype.kind == "U":
            array = array.astype(object)  # TensorFlow encodes objects by UTF-8, but these by ASCII
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return array

    def nothing(self) -> list[np.ndarray[Any, Any]]:
        """Leaves of the right dtypes, for a batch that nobody will look at."""
        return [np.empty(0, leaf.dtype.as_numpy_dtype) for _, leaf in self.leaves]

    def pack(self, tensors: Sequence[tf.Tensor]) -> Any:
        """The tensors in the structure of the spec, with the shapes it promises."""
        for tensor, (_, spec) in zip(tensors, self.leaves, strict=True):
            tensor.set_shape(spec.shape)
        return _fill(self.structure, iter(tensors))


class Exported(Protocol):
    """What is asked of a dataset."""

    def __len__(self) -> int: ...

    @property
    def batches_per_epoch(self) -> int | None: ...

    @property
    def is_endless(self) -> bool: ...

    @property
    def batch_axis(self) -> int | None: ...

    def looks(self) -> list[Any]: ...

    def stream(
        self, epochs: int, claim: bool, together: int, convert: Callable[[Any], Any]
    ) -> Generator[list[Any]]: ...


def export(dataset: Exported, epochs: int, prefetch: int | None, element_spec: Any) -> tf.data.Dataset:
    """See `PoolDataset.to_tf_dataset`."""
    if prefetch is not None and prefetch != tf.data.AUTOTUNE:
        prefetch = check_count(prefetch, "prefetch", 0)
    together = 1
    if element_spec is None:
        looks = [with_tuples(batch) for batch in dataset.looks()]
        together = _together(looks[0])
        element_spec = _spec_of(looks, dataset.batch_axis)
    spec = _Spec(with_tuples(element_spec))
    dtypes = [leaf.dtype for _, leaf in spec.leaves]
    per_epoch = dataset.batches_per_epoch
    endless = dataset.is_endless
    if endless and epochs > 1:
        raise ValueError(f"epochs must be 1 for a dataset that never ends, got {epochs}")
    resumed = per_epoch is not None and len(dataset) != per_epoch
    streams: dict[int, Generator[Any]] = {}
    numbers = itertools.count()
    plain = tf.autograph.experimental.do_not_convert  # nothing in these functions needs AutoGraph's rewriting

    def opened() -> Iterator[tuple[int, int]]:
        """Yields a new stream's number and length, once; TensorFlow drops this generator when its iterator is gone."""
        number = next(numbers)
        count = ENDLESS if per_epoch is None else per_epoch * (epochs - 1) + len(dataset)
        stream = streams[number] = dataset.stream(epochs, True, together, spec.convert)
        try:
            yield number, count
        finally:
            del streams[number]
            stream.close()

    def take(number: np.int64) -> list[np.ndarray[Any, Any]]:
        """The leaves of the next batch."""
        (leaves,) = next(streams[int(number)])
        return cast("list[np.ndarray[Any, Any]]", leaves)

    def take_some(number: np.int64) -> list[Any]:
        """How many batches are ready (0: no more), and their leaves, filled up with the last batch again."""
        taken: list[Any] = next(streams[int(number)], [])
        filled = taken + [taken[-1] if taken else spec.nothing()] * (together - len(taken))
        return [np.int64(len(taken)), *(leaf for leaves in filled for leaf in leaves)]

    def one_by_one(count: tf.Tensor, *leaves: tf.Tensor) -> tf.data.Dataset:
        starts = range(0, len(leaves), len(dtypes))
        single = [tf.data.Dataset.from_tensors(spec.pack(leaves[start : start + len(dtypes)])) for start in starts]
        return functools.reduce(tf.data.Dataset.concatenate, single).take(tf.ensure_shape(count, ()))

    def batches(number: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        calls = tf.data.Dataset.range(count)
        if together == 1 and (per_epoch is not None or endless):
            return calls.map(plain(lambda _: spec.pack(tf.numpy_function(take, [number], dtypes))))
        some = calls.map(plain(lambda _: tuple(tf.numpy_function(take_some, [number], [tf.int64, *dtypes * together]))))
        return some.take_while(plain(lambda count, *_: tf.ensure_shape(count, ()) > 0)).flat_map(plain(one_by_one))

    scalar = tf.TensorSpec((), tf.int64)
    streamed = tf.data.Dataset.from_generator(opened, output_signature=(scalar, scalar)).flat_map(plain(batches))
    if endless or (per_epoch is not None and not resumed):  # else the first iteration may be shorter than the others
        cardinality = tf.data.INFINITE_CARDINALITY if per_epoch is None else per_epoch * epochs
        streamed = streamed.apply(tf.data.experimental.assert_cardinality(cardinality))
    streamed = streamed.prefetch(tf.data.AUTOTUNE if prefetch is None else prefetch)
    # The call that waits for a batch keeps a thread busy; on threads of their own, it is none of the training's. And
    # there is nothing here to tune, while the tuner's records cost more than a small batch.
    options = tf.data.Options()
    options.threading.private_threadpool_size = usable_cores() + 1
    options.autotune.enabled = False
    return streamed.with_options(options)


def with_string_tensors(batch: Any) -> Any:
    """The batch with arrays of strings made tensors: Keras takes no others for strings."""
    leaves = [leaf for _, leaf in _walk(batch) if leaf is not None]
    return _fill(batch, iter([tf.constant(leaf, tf.string) if holds_strings(leaf) else leaf for leaf in leaves]))


def _together(batch: Any) -> int:
    """How many batches of this size one call into Python may take."""
    nbytes = sum(np.asarray(leaf).nbytes for _, leaf in _walk(batch) if leaf is not None)
    return max(1, min(_MOST_TOGETHER, _BYTES_TOGETHER // max(1, nbytes)))


def _spec_of(looks: Sequence[Any], axis: int | None) -> Any:
    """The spec of some batches: axes in which they differ are unknown, and so is the batch axis if it is not `axis`.

    Raises:
        ValueError: they differ in structure, or a leaf in its number of axes.
        KerasMPError: TensorFlow does not know a dtype.
    """
    leaves = [[(path, np.asarray(leaf)) for path, leaf in _walk(batch) if leaf is not None] for batch in looks]
    for other in leaves[1:]:
        if [(path, array.ndim) for path, array in other] != [(path, array.ndim) for path, array in leaves[0]]:
            found = [[f"batch{path} of {array.ndim} axes" for path, array in some] for some in (leaves[0], other)]
            raise ValueError(
                f"a batch has {found[0]}, another {found[1]}; give every batch the same structure, and every leaf the "
                "same number of axes"
            )

    def leaf_spec(path: str, arrays: Sequence[np.ndarray[Any, Any]]) -> tf.TensorSpec:
        # A leaf of another length than the batch is of `batch_transform`'s making, and may vary.
        lengths = [set(lengths) for lengths in zip(*(array.shape for array in arrays), strict=True)]
        shape = [each.pop() if len(each) == 1 else None for each in lengths]
        if shape and shape[0] != axis:
            shape[0] = None
        try:
            return tf.TensorSpec(shape, _tf_dtype(arrays[0]))
        except TypeError as error:
            raise KerasMPError(
                f"batch{path} has dtype {arrays[0].dtype}, which TensorFlow does not know: {error}"
            ) from None

    grouped = zip(*leaves, strict=True)
    return _fill(looks[0], iter([leaf_spec(group[0][0], [array for _, array in group]) for group in grouped]))


def _tf_dtype(array: np.ndarray[Any, Any]) -> tf.DType:
    return tf.string if array.dtype.kind in "USO" else tf.as_dtype(array.dtype)


def _walk(nest: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(nest, dict):
        for key in nest:
            yield from _walk(nest[key], f"{path}[{key!r}]")
    elif isinstance(nest, list | tuple):
        for index, value in enumerate(nest):
            yield from _walk(value, f"{path}[{index}]")
    else:
        yield path, nest


def _fill(nest: Any, leaves: Iterator[Any]) -> Any:
    """The structure of `nest` with its leaves (but for None) taken from `leaves`."""
    if isinstance(nest, dict):
        return {key: _fill(value, leaves) for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        parts = [_fill(value, leaves) for value in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return None if nest is None else next(leaves)
