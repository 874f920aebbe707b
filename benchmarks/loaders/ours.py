"""keras_mp itself: `fit(dataset)` (or a plain loop over it), and the tf.data export."""

import dataclasses
import functools
from typing import Any

import keras  # noqa: F401 - keras_mp imports it on first use, and the peers' imports are not on the clock either

import keras_mp
from benchmarks.folders import Folder
from benchmarks.loaders import Feed
from benchmarks.loaders.clusters import dask_client
from benchmarks.tars import BATCH_SIZE, Tars, decode, read
from benchmarks.work import Fill, Samples, Work


def _augmented(augment: Any, sample: Any) -> Any:
    image, label = sample
    return augment(image), label


def _dataset(work: Work, workers: int, pool: Any = None, in_slot: bool = False) -> Any:
    options: dict[str, Any] = {"workers": workers, "pool": pool}
    if isinstance(work, Folder):
        transform = None if work.augment is None else functools.partial(_augmented, work.augment)
        return keras_mp.image_dataset_from_directory(
            work.folder, batch_size=work.batch_size, shuffle=False, verbose=False, transform=transform, **options
        )
    if isinstance(work, Tars):
        length = len(work) * BATCH_SIZE
        return keras_mp.StreamDataset(work.paths, read, decode, batch_size=BATCH_SIZE, length=length, **options)
    if isinstance(work, Samples):
        return keras_mp.PoolDataset(work.source, work.transform, batch_size=work.batch_size, **options)
    if in_slot and isinstance(work, Fill):
        work = dataclasses.replace(work, allocate=keras_mp.empty)
    return keras_mp.parallelize(work, **options)


def dataset(work: Work, workers: int, epochs: int) -> Feed:
    data = _dataset(work, workers)
    return Feed(data, close=data.close)


def in_slot(work: Work, workers: int, epochs: int) -> Feed:
    """The same for code that makes its arrays by `keras_mp.empty` in place of `np.empty`."""
    data = _dataset(work, workers, in_slot=True)
    return Feed(data, close=data.close)


def over_dask(work: Work, workers: int, epochs: int) -> Feed:
    """Over a cluster of as many processes on this machine."""
    client = dask_client(workers)
    data = _dataset(work, workers, client)

    def close() -> None:
        data.close()
        client.close()

    return Feed(data, close=close)


def over_ray(work: Work, workers: int, epochs: int) -> Feed:
    """Over a Ray that is started on this machine, with as many CPUs."""
    data = _dataset(work, workers, "ray")
    return Feed(data, close=data.close)


def export(work: Work, workers: int, epochs: int) -> Feed:
    data = _dataset(work, workers)
    return Feed(data.to_tf_dataset(epochs=epochs), spans_epochs=True, close=data.close)


def export_in_slot(work: Work, workers: int, epochs: int) -> Feed:
    data = _dataset(work, workers, in_slot=True)
    return Feed(data.to_tf_dataset(epochs=epochs), spans_epochs=True, close=data.close)
