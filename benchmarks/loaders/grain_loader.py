"""Grain's `mp_prefetch`. The epochs are one repeated dataset, so that its workers start once and not once an epoch."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from benchmarks.loaders import Feed
from benchmarks.tars import BATCH_SIZE, decode, read, tars_of
from benchmarks.work import Work


def mp_prefetch(work: Work, workers: int, epochs: int) -> Feed:
    _parse_flags()
    # One reading thread a process: the work holds the GIL or fills memory, and more threads only get in its way.
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    data = grain.MapDataset.source(work).repeat(epochs).to_iter_dataset(read)
    return Feed(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)), spans_epochs=True)


def interleave(work: Work, workers: int, epochs: int) -> Feed:
    """Tar files interleaved, each an `IterDataset`, as the documentation of `InterleaveIterDataset` shows."""
    _parse_flags()
    files: Any = grain.MapDataset.source(tars_of(work).paths).repeat(epochs).map(_Tar)
    samples: Any = grain.experimental.InterleaveIterDataset(files, cycle_length=4)
    data = samples.map(decode).batch(BATCH_SIZE)
    return Feed(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)), spans_epochs=True)


class _Tar(grain.IterDataset[Any]):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def __iter__(self) -> Any:
        return _TarIterator(self._path)


class _TarIterator(grain.DatasetIterator[Any]):
    """An iterator whose place can be kept, as Grain wants of each."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._samples: Iterator[Any] = read(path)
        self._taken = 0

    def __next__(self) -> Any:
        sample = next(self._samples)
        self._taken += 1
        return sample

    def get_state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]
        self._samples = itertools.islice(read(self._path), self._taken, None)


def _parse_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # Grain's workers are started with the parsed flags
