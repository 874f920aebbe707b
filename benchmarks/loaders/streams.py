"""What reads tar files: tf.data's interleave, PyTorch's IterableDataset, WebDataset."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.loaders import Feed
from benchmarks.tars import BATCH_SIZE, decode, read, tars_of
from benchmarks.work import Work


def interleave(work: Work, workers: int, epochs: int) -> Feed:
    """Files interleaved, images decoded by `map(numpy_function, AUTOTUNE)`."""
    import tensorflow as tf

    paths = tars_of(work).paths
    raw = (tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int64))

    def generate(path: bytes) -> Iterator[Any]:
        return read(path.decode())

    def decoded(image: Any, label: Any) -> Any:
        leaves = tf.numpy_function(lambda *sample: list(decode(sample)), [image, label], [tf.float32, tf.int64])
        leaves[0].set_shape((256, 256, 3))
        leaves[1].set_shape(())
        return tuple(leaves)

    files = tf.data.Dataset.from_tensor_slices(paths)
    samples = files.interleave(
        lambda path: tf.data.Dataset.from_generator(generate, args=(path,), output_signature=raw),
        cycle_length=4,
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    data = samples.map(decoded, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH_SIZE)
    return Feed(data.prefetch(tf.data.AUTOTUNE))


def iterable(work: Work, workers: int, epochs: int) -> Feed:
    """An `IterableDataset` that divides the files among the loader's workers, as its documentation shows."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    paths = tars_of(work).paths

    class Read(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            info = get_worker_info()
            own = paths if info is None else paths[info.id :: info.num_workers]
            return (decode(sample) for path in own for sample in read(path))

    data: Any = DataLoader(
        Read(), batch_size=BATCH_SIZE, num_workers=workers, persistent_workers=True, collate_fn=_stacked
    )
    return Feed(data)


def webdataset(work: Work, workers: int, epochs: int) -> Feed:
    """WebDataset's own reader, and its loader."""
    import webdataset

    data = webdataset.WebDataset(tars_of(work).paths, shardshuffle=False)
    data = data.to_tuple("jpg", "cls").map(_decoded).batched(BATCH_SIZE, collation_fn=_stacked)
    return Feed(webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=True))


def _decoded(sample: Any) -> Any:
    return decode((sample[0], int(sample[1])))


def _stacked(samples: Any) -> Any:
    import torch

    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*samples, strict=True))
