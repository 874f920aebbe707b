"""Code that has changed in the training process reaches the workers; what has not changed is not sent again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import keras_mp
from keras_mp.loading.base import Loader
from keras_mp.loading.batch_loader import BatchLoader
from keras_mp.loading.loader import SampleLoader
from keras_mp.plan.request import Request
from keras_mp.workers.client import PoolClient

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def pool(running_pool: keras_mp.WorkerPool) -> keras_mp.WorkerPool:
    """One for all tests of this module."""
    return running_pool


class _Scale:
    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.table = np.arange(300_000.0)  # large enough to be shared

    def __call__(self, value: Any) -> Any:
        return value * self.strength + self.table[-1] - 299_999


def _first(client: PoolClient) -> Any:
    (job,) = client.submit([Request(0, 0, range(4))])
    return client.result(job).batch.tolist()


def test_a_change_reaches_the_workers_and_only_a_change_is_one(pool: keras_mp.WorkerPool) -> None:
    transform = _Scale(2.0)
    loader = SampleLoader([1.0, 2.0, 3.0, 4.0], transform)
    client = pool.client(loader)
    assert _first(client) == [2.0, 4.0, 6.0, 8.0]
    assert client.update(loader) is False
    transform.strength = 3.0
    assert client.update(loader) is True
    assert client.update(loader) is False
    for _ in range(4):
        assert _first(client) == [3.0, 6.0, 9.0, 12.0]
    loader.source[0] = 5.0
    assert client.update(loader) is True
    assert _first(client) == [15.0, 6.0, 9.0, 12.0]
    transform.table[-1] += 1
    assert client.update(loader) is True
    assert client.update(loader) is False
    assert _first(client) == [16.0, 7.0, 10.0, 13.0]
    client.close()


def test_closures_and_globals_count(pool: keras_mp.WorkerPool) -> None:
    strength = [2.0]
    loader = SampleLoader([1.0, 2.0, 3.0, 4.0], lambda value: value * strength[0])
    client = pool.client(loader)
    assert client.update(loader) is False
    strength[0] = 3.0
    assert client.update(loader) is True
    assert _first(client) == [3.0, 6.0, 9.0, 12.0]
    client.close()


class _Batches:
    def __init__(self, dtype: str) -> None:
        self.data = np.arange(8, dtype=dtype)
        self.large = np.zeros(1_000_003, np.uint8)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Array:
        return np.array([self.large.sum(), self.data.sum()])


@pytest.mark.parametrize("place", [0, 500_000, 1_000_002])
def test_one_byte_of_a_large_array_counts(place: int, pool: keras_mp.WorkerPool) -> None:
    source = _Batches("i4")
    source.large = np.zeros(3_000_003, np.uint8)
    loader: Loader = BatchLoader(source)
    client = pool.client(loader)
    assert client.update(loader) is False
    source.large[place] = 1
    assert client.update(loader) is True
    assert _first(client) == [1, 28]
    source.data = source.data.astype("f4")
    assert client.update(loader) is True
    source.large = source.large.copy()  # somewhere else, but the same
    assert client.update(loader) is False
    client.close()


def test_what_is_shared_needs_no_second_look(pool: keras_mp.WorkerPool) -> None:
    """A source that is in memory once has been handed over; a copy of it that differs is told from it."""
    array = np.arange(400_000.0).reshape(4, -1)
    client = pool.client(SampleLoader(array))
    shared = client.shared_view(array)
    assert shared is not None
    assert not shared.flags.writeable
    client.update(SampleLoader(shared))  # whether an array may be written to is part of it
    assert client.update(SampleLoader(shared)) is False
    changed = array.copy()
    changed[0, 0] = 7
    assert client.update(SampleLoader(changed)) is True
    (job,) = client.submit([Request(0, 0, range(4))])
    assert client.result(job).batch[0, 0] == 7
    assert shared[0, 0] == 0
    client.close()
