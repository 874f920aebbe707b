"""Keras's own ways to load a PyDataset: in the training thread, on threads, in its process pool."""

from typing import Any

import keras

from benchmarks.loaders import Feed
from benchmarks.work import Work


class Wrapped(keras.utils.PyDataset):
    """The work as a stock PyDataset."""

    def __init__(self, work: Work, workers: int, use_multiprocessing: bool) -> None:
        # Keras's default of 10, unless so many workers would starve on it.
        super().__init__(workers, use_multiprocessing, max_queue_size=max(10, 2 * workers))
        self._work = work

    def __len__(self) -> int:
        return len(self._work)

    def __getitem__(self, index: int) -> Any:
        return self._work[index]


def in_process(work: Work, workers: int, epochs: int) -> Feed:
    return Feed(Wrapped(work, 1, False))


def threads(work: Work, workers: int, epochs: int) -> Feed:
    return Feed(Wrapped(work, workers, False))


def processes(work: Work, workers: int, epochs: int) -> Feed:
    return Feed(Wrapped(work, workers, True))
