"""What tf.data offers for a Python function, and the recipe that preprocesses everything in a pool first."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.folders import Folder
from benchmarks.loaders import Feed
from benchmarks.work import Work


def _signature(batch: Any) -> Any:
    return tf.nest.map_structure(lambda leaf: tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype), batch)


def from_generator(work: Work, workers: int, epochs: int) -> Feed:
    def generate() -> Iterator[Any]:
        for index in range(len(work)):
            yield work[index]

    data = tf.data.Dataset.from_generator(generate, output_signature=_signature(work[0]))
    return Feed(data.prefetch(tf.data.AUTOTUNE))


def mapped(work: Work, workers: int, epochs: int) -> Feed:
    signature = _signature(work[0])
    specs = tf.nest.flatten(signature)

    def flat(index: Any) -> list[Any]:
        return list(tf.nest.flatten(work[int(index)]))

    def load(index: Any) -> Any:
        leaves = tf.numpy_function(flat, [index], [spec.dtype for spec in specs])
        for leaf, spec in zip(leaves, specs, strict=True):
            leaf.set_shape(spec.shape)
        return tf.nest.pack_sequence_as(signature, leaves)

    data = tf.data.Dataset.range(len(work)).map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return Feed(data.prefetch(tf.data.AUTOTUNE))


def from_directory(work: Work, workers: int, epochs: int) -> Feed:
    """Keras's function, and a Python function behind it as its users write it."""
    if not isinstance(work, Folder):
        raise TypeError(f"keras-dir loads folders, not {type(work).__name__}")
    size = None if work.augment else work.batch_size
    data = keras.utils.image_dataset_from_directory(work.folder, batch_size=size, shuffle=False, verbose=False)
    if work.augment:
        augment = work.augment

        def augmented(image: Any, label: Any) -> Any:
            result = tf.numpy_function(augment, [image], tf.float32)
            result.set_shape(image.shape)
            return result, label

        data = data.map(augmented, num_parallel_calls=tf.data.AUTOTUNE).batch(work.batch_size)
    return Feed(data.prefetch(tf.data.AUTOTUNE))


class _Recipe:
    """Each epoch: all batches through `Pool.map`, one big array, `from_tensor_slices().batch().prefetch()`.

    The pool is kept from epoch to epoch, which is kinder to the recipe than the usual `with Pool()` around it.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self._work = work
        self._pool = multiprocessing.get_context("fork").Pool(workers)

    def __iter__(self) -> Iterator[Any]:
        batches = self._pool.map(self._work.__getitem__, range(len(self._work)))
        size = len(tf.nest.flatten(batches[0])[0])
        everything = tf.nest.map_structure(lambda *leaves: np.concatenate(leaves), *batches)
        del batches
        return iter(tf.data.Dataset.from_tensor_slices(everything).batch(size).prefetch(tf.data.AUTOTUNE))

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


def recipe(work: Work, workers: int, epochs: int) -> Feed:
    data = _Recipe(work, workers)
    return Feed(data, close=data.close)
