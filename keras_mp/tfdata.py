"""Export to `tf.data`: the only module that imports tensorflow.

One Python call a batch: it takes the next batch that the read-ahead has ready and hands TensorFlow the arrays, which it
aliases, because they are aligned and have the dtype it expects. The parallel work is done by then, in the workers, so
nothing here needs TensorFlow's own parallel map.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_mp.checks import check_count
from keras_mp.errors import KerasMPError

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        "to_tf_dataset() needs TensorFlow; install it with: pip install 'keras-mp[tensorflow]'"
    ) from error

if TYPE_CHECKING:
    from keras_mp.loaded import LoadedDataset


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
                f"{spec.dtype.name}, received shape {array.shape} and dtype {array.dtype}; make all batches alike, or "
                "pass element_spec= with None for the axes that vary"
            )
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return array

    def pack(self, tensors: list[Any]) -> Any:
        """The tensors in the structure of the spec, with the shapes it promises."""
        for tensor, (_, spec) in zip(tensors, self.leaves, strict=True):
            tensor.set_shape(spec.shape)
        return _fill(self.structure, iter(tensors))


def export(dataset: LoadedDataset, epochs: int, prefetch: int | None, element_spec: Any) -> tf.data.Dataset:
    """See `PoolDataset.to_tf_dataset`."""
    if prefetch is not None and prefetch != tf.data.AUTOTUNE:
        prefetch = check_count(prefetch, "prefetch", 0)
    spec = _Spec(_tuples(element_spec) if element_spec is not None else _spec_of(dataset))
    resumed = len(dataset) != dataset._plan.num_batches
    total = epochs * dataset._plan.num_batches
    streams: dict[int, Generator[Any]] = {}
    numbers = itertools.count()
    plain = tf.autograph.experimental.do_not_convert  # nothing in these functions needs AutoGraph's rewriting

    def opened() -> Iterator[tuple[int, int]]:
        """Yields a new stream's number and length, once; TensorFlow drops this generator when its iterator is gone."""
        number = next(numbers)
        count = total - dataset._plan.num_batches + len(dataset)
        stream = streams[number] = dataset._stream(epochs)
        try:
            yield number, count
        finally:
            del streams[number]
            stream.close()

    def take(number: np.int64) -> list[np.ndarray[Any, Any]]:
        return spec.convert(next(streams[int(number)]))

    def batches(number: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        def batch(_: tf.Tensor) -> Any:
            return spec.pack(tf.numpy_function(take, [number], [leaf.dtype for _, leaf in spec.leaves]))

        return tf.data.Dataset.range(count).map(plain(batch))

    scalar = tf.TensorSpec((), tf.int64)
    streamed = tf.data.Dataset.from_generator(opened, output_signature=(scalar, scalar)).flat_map(plain(batches))
    if not resumed:  # else the first iteration is shorter than those after it
        streamed = streamed.apply(tf.data.experimental.assert_cardinality(total))
    return streamed.prefetch(tf.data.AUTOTUNE if prefetch is None else prefetch)


def _spec_of(dataset: LoadedDataset) -> Any:
    """The spec of the dataset's first batch, its batch axis unknown where batches differ."""
    axis = dataset._batch_axis
    batch = _tuples(dataset._peek())

    def leaf_spec(path: str, leaf: Any) -> tf.TensorSpec:
        array = np.asarray(leaf)
        try:
            # A leaf of another length than the batch is of `batch_transform`'s making, and may vary.
            first = axis if array.shape[:1] == (axis,) else None
            return tf.TensorSpec((first, *array.shape[1:]) if array.ndim else (), _tf_dtype(array))
        except TypeError as error:
            raise KerasMPError(
                f"batch{path} has dtype {array.dtype}, which TensorFlow does not know: {error}"
            ) from None

    return _fill(batch, iter([leaf_spec(path, leaf) for path, leaf in _walk(batch) if leaf is not None]))


def _tf_dtype(array: np.ndarray[Any, Any]) -> tf.DType:
    return tf.string if array.dtype.kind in "USO" else tf.as_dtype(array.dtype)


def _tuples(nest: Any) -> Any:
    """The nest with lists made tuples, as tf.data takes a list for a tensor."""
    if isinstance(nest, dict):
        return {key: _tuples(value) for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        parts = [_tuples(value) for value in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else tuple(parts)
    return nest


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
