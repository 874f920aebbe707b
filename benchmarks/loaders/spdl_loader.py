"""SPDL: a pipeline whose one stage runs in a pool of processes, which has the work from its start and stays."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from spdl.pipeline import PipelineBuilder

from benchmarks.loaders import Feed
from benchmarks.work import Work

_work: Any = None  # in a process of the pool


def _keep(work: Work) -> None:
    global _work
    _work = work


def _load(index: int) -> Any:
    return _work[index]


class _Pipelines:
    """A pipeline runs once, so each epoch has its own."""

    def __init__(self, work: Work, workers: int) -> None:
        self._batches, self._workers = len(work), workers
        self._executor = ProcessPoolExecutor(workers, initializer=_keep, initargs=(work,))

    def __iter__(self) -> Iterator[Any]:
        builder: Any = PipelineBuilder()
        stage = builder.add_source(range(self._batches)).pipe(
            _load, executor=self._executor, concurrency=self._workers, output_order="input"
        )
        pipeline = stage.add_sink(max(10, 2 * self._workers)).build(num_threads=1)
        with pipeline.auto_stop():
            yield from pipeline

    def close(self) -> None:
        self._executor.shutdown()


def pipeline(work: Work, workers: int, epochs: int) -> Feed:
    pipelines = _Pipelines(work, workers)
    return Feed(pipelines, close=pipelines.close)
