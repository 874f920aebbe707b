"""Windows of a time series: those of `keras.utils.timeseries_dataset_from_array`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mp


def _epoch(dataset: Any) -> list[list[np.ndarray[Any, Any]]]:
    return [[np.asarray(leaf) for leaf in (batch if isinstance(batch, tuple) else (batch,))] for batch in dataset]


@settings(max_examples=30)
@given(
    steps=st.integers(12, 60),
    length=st.integers(1, 8),
    stride=st.integers(1, 9),
    rate=st.integers(1, 3),
    start=st.one_of(st.none(), st.integers(0, 3)),
    cut=st.one_of(st.none(), st.integers(1, 3)),
    targets=st.one_of(st.none(), st.integers(1, 60)),
    features=st.sampled_from([(), (2,), (3, 2)]),
)
def test_windows_are_those_of_keras(
    steps: int,
    length: int,
    stride: int,
    rate: int,
    start: int | None,
    cut: int | None,
    targets: int | None,
    features: tuple[int, ...],
) -> None:
    end = None if cut is None else steps - cut
    used = (steps if end is None else end) - (start or 0)
    if used - (length - 1) * rate < 1:
        return
    data = np.random.default_rng(0).normal(size=(steps, *features))
    goals = None if targets is None else np.arange(max(targets, min(targets + (start or 0), steps)), dtype=np.float32)
    if goals is not None and len(goals) <= (start or 0):
        return
    if goals is not None and len(goals[start:end]) < min(len(goals), used - (length - 1) * rate):
        return  # Keras asks for targets that are not there
    arguments: dict[str, Any] = {"start_index": start, "end_index": end, "batch_size": 4}
    theirs = _epoch(keras.utils.timeseries_dataset_from_array(data, goals, length, stride, rate, **arguments))
    with keras_mp.timeseries_dataset_from_array(data, goals, length, stride, rate, workers=0, **arguments) as dataset:
        ours = _epoch(dataset)
    assert len(ours) == len(theirs)
    for batch, expected in zip(ours, theirs, strict=True):
        for leaf, other in zip(batch, expected, strict=True):
            assert leaf.dtype == other.dtype
            np.testing.assert_array_equal(leaf, other)


def test_one_window_at_a_time_and_a_transform() -> None:
    data = np.arange(10.0)
    with keras_mp.timeseries_dataset_from_array(
        data, data + 100, 3, batch_size=None, workers=0, transform=lambda sample: (sample[0] * 2, sample[1])
    ) as dataset:
        windows = list(dataset)
    assert len(windows) == len(dataset) == 8
    np.testing.assert_array_equal(windows[2][0], [4, 6, 8])
    assert windows[2][1] == 102


def test_a_shuffled_epoch_has_every_window_once() -> None:
    with keras_mp.timeseries_dataset_from_array(
        np.arange(50), None, 4, 2, shuffle=True, seed=1, batch_size=7, workers=0
    ) as dataset:
        first, second = (np.concatenate(list(dataset)) for _ in range(2))
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(0, 47, 2))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert (first - first[:, :1] == np.arange(4)).all()


def test_a_transform_that_writes_leaves_the_series_as_it_is() -> None:
    data = np.arange(10.0)

    def write(window: Any) -> Any:
        window[:] = -1
        return window

    with keras_mp.timeseries_dataset_from_array(data, None, 3, transform=write, workers=0) as dataset:
        (batch,) = dataset
    assert (batch == -1).all()
    np.testing.assert_array_equal(data, np.arange(10.0))


def test_a_memory_map_is_read_by_the_workers(tmp_path: Path, running_pool: keras_mp.WorkerPool) -> None:
    np.save(tmp_path / "series.npy", np.arange(1000, dtype=np.float32).reshape(500, 2))
    data = np.load(tmp_path / "series.npy", mmap_mode="r")
    with keras_mp.timeseries_dataset_from_array(data, data[:, 0], 10, 5, 2, pool=running_pool) as dataset:
        ((windows, targets),) = dataset
    np.testing.assert_array_equal(windows[3], data[15:35:2])
    np.testing.assert_array_equal(targets, np.arange(0, len(targets) * 10, 10))


_DATA = np.arange(20.0)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"data": 5.0}, TypeError, "data must be an array of numbers whose first axis is time, got shape"),
        ({"data": [None, None]}, TypeError, "data must be an array.*dtype object; pass a NumPy array"),
        ({"targets": "x"}, TypeError, "targets must be an array"),
        ({"targets": []}, ValueError, "targets has 0 entries, none of them at start_index=0"),
        ({"targets": [1, 2], "start_index": 4}, ValueError, "targets has 2 entries, none of them at start_index=4"),
        ({"sequence_length": 0}, ValueError, "sequence_length must be at least 1, got 0"),
        ({"sequence_length": 2.5}, TypeError, "sequence_length must be an int, got 2.5"),
        (
            {"sequence_length": 21},
            ValueError,
            "sequence_length=21 with sampling_rate=1 spans 21 steps, but there are 20",
        ),
        ({"sampling_rate": 7}, ValueError, "spans 22 steps, but there are 20; make the windows shorter"),
        ({"sampling_rate": 0}, ValueError, "sampling_rate must be at least 1, got 0"),
        ({"sampling_rate": 20}, ValueError, "sampling_rate must be below the length of the data, 20, got 20"),
        ({"sequence_stride": 0}, ValueError, "sequence_stride must be at least 1, got 0"),
        ({"sequence_stride": 20}, ValueError, "sequence_stride must be below the length of the data"),
        ({"start_index": -1}, ValueError, "start_index must be at least 0, got -1"),
        ({"start_index": 20}, ValueError, "start_index must be below the length of the data, 20, got 20"),
        ({"end_index": 0}, ValueError, "end_index must be at least 1, got 0"),
        ({"end_index": 20}, ValueError, "end_index must be below the length of the data"),
        ({"start_index": 6, "end_index": 6}, ValueError, "end_index must be above start_index, got start_index=6"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"format": "torch"}, ValueError, "format must be one of 'tf', 'grain', got 'torch'"),
        ({"batch_size": None, "collate": list}, ValueError, "collate=.* makes batches, but batch_size=None"),
        ({"transform": 3}, TypeError, "transform must be callable or None, got 3"),
        ({"unknown": 3}, TypeError, "unexpected keyword argument 'unknown'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    arguments = {"data": _DATA, "targets": None, "sequence_length": 4, **options}
    with pytest.raises(kind, match=words):
        keras_mp.timeseries_dataset_from_array(**arguments)
