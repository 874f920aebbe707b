"""Code in a worker may keep its batches and buffers: nobody overwrites them, and it overwrites nobody's (P6)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

import keras_mp
from keras_mp.loading.loader import SampleLoader
from keras_mp.plan.request import Request

Array = npt.NDArray[Any]
_BATCHES = 60


@pytest.fixture(scope="module")
def pool() -> Iterator[keras_mp.WorkerPool]:
    """One worker, which makes the batches in their order; of a wider scope than the census."""
    with keras_mp.WorkerPool(1) as made:
        keras_mp.PoolDataset([1], batch_size=1, pool=made)[0]
        yield made


class _Mix:
    """Adds the batch before, which it keeps in one of several ways."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.kept: Any = None

    def __call__(self, batch: Array) -> Array:
        before = 0 if self.kept is None else np.asarray(self.kept)[:1]
        mixed = batch + before
        if self.way == "itself":
            self.kept = batch
        elif self.way == "a view":
            self.kept = batch[::-1][1:]
        elif self.way == "a memoryview":
            self.kept = memoryview(batch)  # type: ignore[arg-type]  # its stub does not say so
        else:
            self.kept = batch.copy()
        return mixed


def _expected(number: int) -> int:
    return number + max(0, number - 1)


@pytest.mark.parametrize("rows", [3, 100_000])
@pytest.mark.parametrize("way", ["itself", "a view", "a memoryview", "a copy"])
def test_the_batch_before_is_what_it_was(way: str, rows: int, pool: keras_mp.WorkerPool) -> None:
    def widen(value: int) -> Array:
        return np.full(rows, value)

    client = pool.client(SampleLoader(range(_BATCHES), widen, batch_transform=_Mix(way)))
    got = []
    for number in range(_BATCHES):
        (job,) = client.submit([Request(0, number, [number, number])])
        batch = client.result(job).batch
        got.append(batch.copy())
        batch[...] = -1  # the consumer's own
        del batch, job  # nothing is held by the time that the next one is made
    assert [int(batch[0, 0]) for batch in got] == [_expected(number) for number in range(_BATCHES)]
    assert all((batch == batch[0, 0]).all() for batch in got)
    client.close()


class _Source:
    """Batches built in a buffer from `keras_mp.empty` that is used again and again."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.buffer: Array | None = None

    def __len__(self) -> int:
        return _BATCHES

    def __getitem__(self, index: int) -> Array:
        if self.buffer is None:
            self.buffer = keras_mp.empty((self.rows, 2), np.int64)
        self.buffer[...] = index
        return self.buffer


@pytest.mark.parametrize("rows", [3, 100_000])
def test_a_buffer_may_be_used_again(rows: int, pool: keras_mp.WorkerPool) -> None:
    with keras_mp.parallelize(_Source(rows), pool=pool) as dataset:
        held = list(dataset)
        assert [int(batch[0, 0]) for batch in held] == list(range(_BATCHES))
        assert all((batch == number).all() for number, batch in enumerate(held))


def test_code_that_keeps_its_batches_costs_no_more_memory_than_that(pool: keras_mp.WorkerPool) -> None:
    samples = np.repeat(np.arange(_BATCHES), 2)

    def widen(value: int) -> Array:
        return np.full(500_000, value)  # 8 MB a batch

    options: dict[str, Any] = {"batch_size": 2, "pool": pool, "max_queue_size": 2}
    with keras_mp.PoolDataset(samples, widen, batch_transform=_Mix("itself"), **options) as dataset:
        for _ in range(3):
            for _ in dataset:
                pass
        assert dataset.stats()["slots"] < 8
        gc.collect()
        (worker,) = (psutil.Process(pid) for pid in dataset.stats()["pids"])
        files = [mapping for mapping in worker.memory_maps(grouped=False) if "memfd:keras_mp" in mapping.path]
        assert len(files) < 16


def test_ordinary_code_uses_its_slots_again(pool: keras_mp.WorkerPool) -> None:
    def double(batch: Array) -> Array:
        made: Array = keras_mp.empty(batch.shape, batch.dtype)
        np.multiply(batch, 2, out=made)
        return made

    options: dict[str, Any] = {"batch_size": 2, "pool": pool, "max_queue_size": 2}
    with keras_mp.PoolDataset(np.zeros((40, 50_000)), batch_transform=double, **options) as dataset:
        addresses = set()
        for _ in range(5):
            for batch in dataset:
                addresses.add(batch.ctypes.data)
        assert len(addresses) < 10
