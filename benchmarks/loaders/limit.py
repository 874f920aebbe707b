"""The machine's limit: the same function in as many independent processes, each batch dropped where it was made.

Processes take the next index from a shared counter, so a slow batch keeps one process busy and no other.
"""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier

from benchmarks.loaders import Feed
from benchmarks.work import Work, touch


def _work(work: Work, epochs: int, counter: "Synchronized[int]", start: Barrier, end: Barrier) -> None:
    for _ in range(epochs):
        start.wait()
        while True:
            with counter.get_lock():
                index = counter.value
                counter.value += 1
            if index >= len(work):
                break
            touch(work[index])
        end.wait()


class _Epochs:
    """Iterates over the seconds of each epoch."""

    def __init__(self, work: Work, workers: int, epochs: int) -> None:
        context = multiprocessing.get_context("fork")
        self._epochs = epochs
        self._counter: Synchronized[int] = context.Value("q", 0)
        self._start, self._end = context.Barrier(workers + 1), context.Barrier(workers + 1)
        arguments = (work, epochs, self._counter, self._start, self._end)
        self._processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        for process in self._processes:
            process.start()

    def __iter__(self) -> Iterator[float]:
        for _ in range(self._epochs):
            self._counter.value = 0  # everybody waits at the start barrier now
            begin = time.perf_counter()
            self._start.wait()
            self._end.wait()
            yield time.perf_counter() - begin

    def close(self) -> None:
        for process in self._processes:
            process.join()


def run(work: Work, workers: int, epochs: int) -> Feed:
    data = _Epochs(work, workers, epochs)
    return Feed(data, spans_epochs=True, close=data.close)
