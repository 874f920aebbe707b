"""Datasets of views: the same data on every engine (P2), arrays in memory once, and what is drawn by weights."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests import transforms

_IMAGES = np.random.default_rng(0).random((40, 4, 4, 1)).astype(np.float32)
_LABELS = np.arange(40) % 4


def _samples(dataset: Any) -> list[Any]:
    return [sample for batch in dataset for sample in np.asarray(batch).tolist()]


@pytest.mark.parametrize(
    "options",
    [{"workers": 0}, {"workers": 2}, {"workers": 2, "use_multiprocessing": False}],
    ids=["in-process", "processes", "threads"],
)
def test_views_are_sources(options: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "more.npy", np.arange(100, 130))
    more = np.load(tmp_path / "more.npy", mmap_mode="r")
    train, val = keras_mp.split(keras_mp.concat(range(20), np.arange(20, 40), more, list(range(40, 45))), 0.8)
    with (
        keras_mp.PoolDataset(train, batch_size=8, shuffle=True, seed=1, **options) as first,
        keras_mp.PoolDataset(val, batch_size=8, **options) as second,
    ):
        for _ in range(2):
            assert sorted([*_samples(first), *_samples(second)]) == [*range(45), *range(100, 130)]
    windows = keras_mp.zip(keras_mp.windows(more, 5, 5), range(6))
    with keras_mp.PoolDataset(windows, batch_size=6, **options) as cut:
        x, y = cut[0]
    assert x.tolist() == np.arange(100, 130).reshape(6, 5).tolist()
    assert y.tolist() == list(range(6))


def test_fit_on_parts_of_arrays() -> None:
    train, val = keras_mp.split(keras_mp.zip(_IMAGES, _LABELS), 0.75, stratify=_LABELS)
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(4)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with (
        keras_mp.PoolDataset(train, batch_size=10, shuffle=True, workers=0) as fitted,
        keras_mp.PoolDataset(val, batch_size=10, workers=0) as tested,
    ):
        history = model.fit(fitted, validation_data=tested, epochs=2, verbose=0).history
        assert len(history["val_loss"]) == 2
        ((_, labels),) = tested
        counts = np.bincount(labels, minlength=4)
        assert counts.sum() == 10
        assert set(counts) <= {2, 3}


def _memory_files() -> set[tuple[int, int]]:
    """Inode and size in bytes of every memory file of 1 MiB or more that this process holds."""
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if "memfd:keras_mp" in os.readlink(f"/proc/self/fd/{fd}"):
                status = os.fstat(fd)
                found.add((status.st_ino, status.st_size))
        except OSError:  # the descriptor that listed them
            continue
    return {(number, size) for number, size in found if size >= 1 << 20}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="memory files are listed in /proc")
def test_a_large_array_is_in_memory_once_for_all_parts_of_it(pool: keras_mp.WorkerPool) -> None:
    array = np.arange(3 << 20, dtype=np.uint8).reshape(3 << 5, -1)
    train, rest = keras_mp.split(keras_mp.zip(array, range(len(array))), 0.5)
    val, test = keras_mp.split(rest, 0.5)
    again = keras_mp.concat(train, val, train)
    seen: list[int] = []
    datasets = [keras_mp.PoolDataset(part, pool=pool, batch_size=8) for part in (train, val, test, again)]
    try:
        for dataset in datasets:
            for rows, numbers in itertools.islice(dataset, 2):
                np.testing.assert_array_equal(rows, array[numbers])
                seen += numbers.tolist()
        sources = {(inode, size) for inode, size in _memory_files() if size == array.nbytes}
        assert len(sources) == 1
        assert len(set(seen)) >= 32
        datasets[0].close()
        np.testing.assert_array_equal(datasets[1][0][0], array[datasets[1][0][1]])
    finally:
        for dataset in datasets:
            dataset.close()


def test_an_array_of_a_view_is_not_compared_again(pool: keras_mp.WorkerPool) -> None:
    """It has been handed over, like an array that is the source itself."""
    array = np.zeros((4, 1 << 18), np.uint8)
    with keras_mp.PoolDataset(keras_mp.concat(array, array), pool=pool, batch_size=8) as dataset:
        assert not dataset[0].any()
        array[:] = 1
        assert not any(batch.any() for batch in dataset)
    assert array.all()


def test_mixing_by_weights() -> None:
    common, rare = range(1000), range(1000, 1010)
    mixed = keras_mp.concat(common, rare)
    weights = np.repeat([0.75 / len(common), 0.25 / len(rare)], [len(common), len(rare)])
    order = keras_mp.weighted(weights, 4000)
    with keras_mp.PoolDataset(mixed, transforms.with_random, order=order, seed=1, workers=2) as dataset:
        epochs = [list(dataset) for _ in range(2)]
    values = [np.concatenate([batch["value"] for batch in epoch]) for epoch in epochs]
    for drawn in values:
        assert abs((drawn >= 1000).mean() - 0.25) < 0.04
    assert values[0].tolist() != values[1].tolist()
    own = np.concatenate([batch["own"] for epoch in epochs for batch in epoch])
    assert len(set(own)) == len(own) == 8000  # a sample that comes again is augmented anew


def test_balanced_classes_on_shards() -> None:
    labels = np.array([0] * 95 + [1] * 5)
    whole = keras_mp.PoolDataset(labels, order=keras_mp.balanced(labels), batch_size=10, seed=0, workers=0)
    parts = [_samples(whole.shard(2, index)) for index in range(2)]
    assert len(parts[0]) == len(parts[1]) == 50
    assert sum(map(sum, parts)) == 50


def test_a_failure_names_the_sample_of_the_view() -> None:
    with (
        keras_mp.PoolDataset(keras_mp.concat([1, 2], [7]), transforms.fail_on_seven, workers=0) as dataset,
        pytest.raises(ValueError, match=r"transform failed on sample 2 \(7\), batch 0 of epoch 0: .*seven is broken"),
    ):
        dataset[0]


def test_python_s_zip_stays_python_s() -> None:
    names: dict[str, Any] = {}
    exec("from keras_mp import *", names)
    assert "zip" not in names
    assert names["concat"] is keras_mp.concat
    assert [*names["__builtins__"]["zip"]([1], [2])] == [(1, 2)]
