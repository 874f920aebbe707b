"""`workers="auto"`: the number that the model asks for, the same data. And how much is in flight."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mp
from keras_mp.engines.readahead import Limit
from keras_mp.sizing import MARGIN, useful_workers
from keras_mp.workers.tuning import Search, Window
from tests.census import eventually


def _simulated(search: Search, workers: int, service_s: float, step_s: float, cpu_share: float, cores: int) -> int:
    """The number that a search comes to with workers and a consumer that behave as the model says."""
    for _ in range(30):
        if search.is_over:
            break
        useful = min(workers, cores / cpu_share)
        cycle_s = max(step_s, service_s / useful)
        window = Window(workers, 100, 100 * cycle_s, 100 * (cycle_s - step_s), service_s, cpu_share)
        workers = search.next_count(window)
    assert search.is_over
    return workers


@given(st.integers(1, 32), st.floats(0.001, 2.0), st.floats(0.001, 0.5), st.floats(0.02, 1.0), st.integers(1, 64))
def test_the_search_ends_where_more_do_not_help_and_fewer_would_wait(
    start: int, service_s: float, step_s: float, cpu_share: float, cores: int
) -> None:
    found = _simulated(Search(cores), start, service_s, step_s, cpu_share, cores)
    most = min(128, useful_workers(service_s, cpu_share * service_s, cores) or 128)
    assert 1 <= found <= max(most, start)
    if found < most:
        wait = 1 - step_s / max(step_s, service_s / found)
        assert wait <= 0.06 or 2 * found >= most  # twice as many were tried, and hardly helped
    assert found <= max(start, 2 * MARGIN * service_s / step_s + 1)


def _sleep(value: float, rng: np.random.Generator) -> npt.NDArray[Any]:
    time.sleep(0.005)
    return value + rng.random(3)


def test_it_finds_workers_enough_and_changes_no_data() -> None:
    source = np.arange(2400.0)
    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "seed": 3}
    with keras_mp.PoolDataset(source, _sleep, workers="auto", **options) as dataset:
        batches = []
        for batch in dataset:  # 20 ms of sleep a batch, and a step of 4 ms: 5 to 6 workers on a quiet machine
            time.sleep(0.004)
            batches.append(batch)
        assert "found by itself" in repr(dataset)
        assert f"workers={dataset.stats().workers} " in repr(dataset)
        found = dataset.stats().workers
        assert 1 <= found <= 128
        assert len(list(itertools.islice(dataset, 100))) == 100
        assert dataset.stats().workers == found
        assert dataset.stats().restarts == 0
    with keras_mp.PoolDataset(source, _sleep, workers=0, **options) as plain:
        for ours, theirs in zip(batches[:40], plain, strict=False):
            np.testing.assert_array_equal(ours, theirs)


def _double(value: float) -> float:
    time.sleep(0.0005)
    return 2 * value


def test_a_pool_grows_and_shrinks_while_it_works() -> None:
    with (
        keras_mp.WorkerPool(1) as pool,
        keras_mp.PoolDataset(np.arange(8000.0), _double, batch_size=8, pool=pool, max_queue_size=200) as data,
    ):
        batches = iter(data)
        seen = [next(batches) for _ in range(100)]
        pool.resize(3)
        seen += [next(batches) for _ in range(500)]
        assert eventually(lambda: len(data.stats().pids) == 3)
        pool.resize(1)
        for batch in batches:
            seen.append(batch)
            if len(data.stats().pids) == 1:
                break
        assert next(batches, None) is not None  # it did not wait for the end of the work
        data.set_epoch(0)
        seen = [*seen, *itertools.islice(data, len(seen), None)]
        assert (pool.workers, data.stats().workers, data.stats().restarts) == (1, 1, 0)
        np.testing.assert_array_equal(np.concatenate(seen), 2 * np.arange(8000.0))
        with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
            pool.resize(0)


@pytest.mark.parametrize("options", [{"pool": "keras"}, {"use_multiprocessing": False}])
def test_auto_is_for_processes_of_ones_own(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="workers='auto' is for worker processes of the dataset's own"):
        keras_mp.PoolDataset(range(8), workers="auto", **options)


def test_another_word_is_no_number_of_workers() -> None:
    with pytest.raises(TypeError, match="workers must be an int, None or 'auto', got 'all'"):
        keras_mp.PoolDataset(range(8), workers="all")  # type: ignore[arg-type]


_small = st.integers(0, 8)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 1000), st.integers(0, 2000), _small, _small)
def test_bytes_lower_the_number_of_batches_in_flight_but_not_below_one(
    batches: int, at_first: int, nbytes: int, size: int, bundles: int, bundle_size: int
) -> None:
    limit = Limit(batches, at_first, nbytes, bundles)
    assert limit.depth(None, bundle_size) == min(batches, at_first)
    depth = limit.depth(size, bundle_size)
    assert 1 <= depth <= max(batches, bundles * bundle_size)
    assert depth == 1 or depth * size <= nbytes


@pytest.mark.parametrize("given_size", [12, None])
def test_more_tiny_batches_are_in_flight_where_no_number_is_given(
    given_size: int | None, running_pool: keras_mp.WorkerPool
) -> None:
    ahead = []
    with keras_mp.PoolDataset(range(600), batch_size=1, max_queue_size=given_size, pool=running_pool) as data:
        for taken, _ in enumerate(data, 1):
            if taken % 20 == 0:
                assert eventually(lambda: data.stats().queued + data.stats().running == 0)
                ahead.append(data.stats().loaded_batches - taken)
    assert max(ahead) <= (given_size or 32)
    assert given_size or max(ahead) > 12


def _megabyte(index: int) -> npt.NDArray[Any]:
    return np.full(1 << 20, index, np.uint8)


@pytest.mark.parametrize(("nbytes", "most"), [(3 << 20, 3), (None, 10)])
def test_large_batches_are_bounded_by_their_bytes(nbytes: int | None, most: int) -> None:
    with keras_mp.PoolDataset(range(40), _megabyte, batch_size=1, workers=2, max_queue_bytes=nbytes) as data:
        batches = iter(data)
        taken = [int(next(batches)[0, 0]) for _ in range(3)]
        assert eventually(lambda: data.stats().queued + data.stats().running == 0)
        assert data.stats().loaded_batches == 3 + most
        taken += [int(batch[0, 0]) for batch in batches]
        assert taken == list(range(40))


def test_a_copy_with_a_number_of_workers_has_that_number_and_as_much_in_flight_as_they_need() -> None:
    original = keras_mp.PoolDataset(range(80), _megabyte, batch_size=1, workers="auto")
    with original, original.with_workers(6) as data:
        batches = iter(data)
        for _ in range(3):
            next(batches)
        assert eventually(lambda: data.stats().queued + data.stats().running == 0)
        assert data.stats().loaded_batches == 3 + 12
        for _ in batches:
            pass
        assert data.stats().workers == 6
        assert "found by itself" not in repr(data)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2 GiB"])
def test_bad_bounds(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_queue_bytes must be"):
        keras_mp.PoolDataset(range(8), max_queue_bytes=value)
