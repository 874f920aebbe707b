"""`stats()`: what it counts, on every engine."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import keras_mp
from tests.census import eventually

_ENGINES: dict[str, dict[str, Any]] = {
    "processes": {"workers": 2},
    "threads": {"workers": 2, "use_multiprocessing": False},
    "in-process": {"workers": 0},
}


def _slow_at_seven(row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    time.sleep(0.3 if row[0] == 7 else 0.001)
    return row * 2


@pytest.mark.parametrize("engine", _ENGINES)
def test_it_counts_batches_samples_bytes_and_names_the_slowest_sample(engine: str) -> None:
    source = np.arange(40.0)[:, None] + np.zeros(4)
    with keras_mp.PoolDataset(source, _slow_at_seven, batch_size=8, **_ENGINES[engine]) as dataset:
        assert dataset.stats() == dataclasses.replace(dataset.stats(), batches=0, samples=0, elapsed_s=0.0)
        assert len(list(dataset)) == 5
        stats = dataset.stats()
    assert (stats.batches, stats.loaded_batches, stats.samples, stats.bytes) == (5, 5, 40, source.nbytes)
    transform = stats.stages["transform"]
    assert transform.slowest[0].index == 7 and transform.slowest[0].seconds >= 0.3
    assert [sample.seconds for sample in transform.slowest] == sorted(
        (sample.seconds for sample in transform.slowest), reverse=True
    )
    assert transform.total_s >= 0.3 + 39 * 0.001
    assert transform.mean_s == pytest.approx(transform.total_s / 5)
    assert sum(stage.total_s for stage in stats.stages.values()) <= stats.work_s
    assert stats.cpu_s < stats.work_s
    assert 0 < stats.wait_s <= stats.elapsed_s
    assert 0 < stats.worker_busy_fraction <= 1
    assert stats["batches"] == stats.batches
    with pytest.raises(KeyError):
        stats["bathces"]


def test_a_difference_has_what_came_between() -> None:
    with keras_mp.PoolDataset(np.arange(40.0), _double, batch_size=8, workers=2) as dataset:
        list(dataset)
        before = dataset.stats()
        assert dataset.stats(since=before).batches == 0
        list(dataset)
        between = dataset.stats(since=before)
        now = dataset.stats()
    assert (between.batches, between.samples, between.epoch) == (5, 40, 2)
    assert between.work_s == pytest.approx(now.work_s - before.work_s)
    assert between.pids == before.pids
    for busy, total, earlier in zip(between.busy_s, now.busy_s, before.busy_s, strict=True):
        assert earlier > 0 and busy == pytest.approx(total - earlier)
    assert between.stages["transform"].total_s < now.stages["transform"].total_s
    assert all(0 <= busy <= ready for busy, ready in zip(between.busy_s, between.ready_s, strict=True))
    with pytest.raises(TypeError, match="since must be what stats"):
        dataset.stats(since={})  # type: ignore[arg-type]


def _double(value: float) -> float:
    return 2 * value


def _hang_once(value: float, rng: np.random.Generator) -> float:
    time.sleep(60 if value == 3 else 0)
    return value


def _fail_at_three(value: float) -> float:
    if value == 3:
        raise ValueError("three")
    return value


def test_failures_retries_restarts_and_timeouts_are_counted() -> None:
    with keras_mp.PoolDataset(
        np.arange(8.0), _fail_at_three, batch_size=4, workers=1, on_error="skip", retries=2
    ) as dataset:
        with pytest.warns(RuntimeWarning, match="1 of 8 samples failed"):
            list(dataset)
        assert (dataset.stats().failures, dataset.stats().retries) == (1, 2)
    with keras_mp.PoolDataset(np.arange(8.0), _hang_once, batch_size=4, workers=1, timeout=0.5) as dataset:
        with pytest.raises(keras_mp.BatchTimeout):
            list(dataset)
        assert eventually(lambda: dataset.stats().restarts == 2)
        assert dataset.stats().timeouts == 2
    with keras_mp.PoolDataset(np.arange(8.0), batch_size=4, workers=1) as dataset:
        list(dataset)
        os.kill(dataset.stats().pids[0], signal.SIGKILL)
        assert eventually(lambda: dataset.stats().restarts == 1)
        assert dataset.stats().timeouts == 0


def test_numbers_of_a_pool_are_of_all_its_datasets_and_those_of_a_dataset_its_own() -> None:
    with keras_mp.WorkerPool(1) as pool:
        one = keras_mp.PoolDataset(np.arange(8.0), _double, batch_size=4, pool=pool)
        two = keras_mp.PoolDataset(np.arange(80.0), _double, batch_size=4, pool=pool)
        list(one)
        list(two)
        assert (one.stats().samples, two.stats().samples) == (8, 80)
        assert one.stats().pids == two.stats().pids
        assert one.stats().pool_busy_s >= two.stats().work_s * 0.9
        one.close()
        two.close()


def test_it_is_frozen() -> None:
    with keras_mp.PoolDataset(np.arange(8.0), workers=0) as dataset, pytest.raises(dataclasses.FrozenInstanceError):
        dataset.stats().batches = 3  # type: ignore[misc]
