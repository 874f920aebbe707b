"""P5: no failure goes by unseen, however the dataset is consumed, and none is counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests import transforms
from tests.census import eventually
from tests.support import python_path

_TOLD = "keras_mp: 2 of 20 samples failed in epoch"


def picky(value: Any) -> Any:
    if value in (7, 11):
        raise ValueError(f"{value} is broken")
    return np.float32(value)


class MultiLine:
    def __repr__(self) -> str:
        return "two\nlines"


def dataset(**options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(np.arange(20.0), picky, batch_size=5, **{"on_error": "skip", "workers": 0, **options})


_CONSUME: dict[str, Callable[[Any], Any]] = {
    "iteration": list,
    "export": lambda train: list(train.to_tf_dataset()),
    "export, left early": lambda train: list(train.to_tf_dataset().take(3)),
    "export of two epochs": lambda train: list(train.to_tf_dataset(epochs=2)),
}


@pytest.mark.parametrize("how", _CONSUME)
@pytest.mark.parametrize("workers", [0, 2])
def test_each_failure_is_listed_once_and_told(how: str, workers: int) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        with dataset(workers=workers) as train:
            _CONSUME[how](train)
            assert eventually(
                lambda: len(told) >= (2 if "two epochs" in how else 1)
            )  # at the end of the epoch, not at close
            failures = [failure for failure in train.failures if failure.epoch == 0]
    assert sorted((f.index, f.type, f.message) for f in failures) == [
        (7, "ValueError", "7.0 is broken"),
        (11, "ValueError", "11.0 is broken"),
    ]
    assert all("picky" in failure.traceback for failure in failures)
    texts = [str(warning.message) for warning in told]
    epochs = 2 if "two epochs" in how else 1
    assert [text.partition(" and were")[0] for text in texts] == [f"{_TOLD} {epoch}" for epoch in range(epochs)]


def test_close_tells_what_was_not_told() -> None:
    train = dataset()
    assert train[1].tolist() == [5, 6, 8, 9]
    with pytest.warns(RuntimeWarning, match="1 of 20 samples failed in epoch 0"):
        train.close()
    train.close()


@pytest.mark.parametrize(("limit", "raises"), [(1, True), (2, False), (0.05, True), (0.1, False), (0, True)])
def test_the_limit_counts_an_epoch_s_failures(limit: float, raises: bool) -> None:
    train = dataset(max_failures=limit, on_error="replace")
    if raises:
        with pytest.raises(keras_mp.TooManyFailures, match="max_failures") as caught:
            list(train)
        assert "is broken" in str(caught.value)
    else:
        for epoch in range(2):
            with pytest.warns(RuntimeWarning, match=f"in epoch {epoch}"):
                assert [len(batch) for batch in train] == [5, 5, 5, 5]


def test_keras_own_processes_warn_on_stderr() -> None:
    """They are children that `failures` hears nothing from."""
    code = (
        "import keras, keras_mp\n"
        "from tests import transforms\n"
        "train = keras_mp.PoolDataset(range(20), transforms.fail_on_seven, batch_size=5, on_error='skip', workers=1,"
        " pool='keras')\n"
        "model = keras.Sequential([keras.layers.Identity()])\n"
        "model.predict(train, verbose=0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "sample 7 (7), batch 1 of epoch 0: ValueError: seven is broken" in done.stderr


def test_a_pool_that_contradicts_the_other_arguments_is_refused() -> None:
    with keras_mp.WorkerPool(2) as pool:
        for options in ({"workers": 3}, {"use_multiprocessing": False}, {"workers": 0}):
            with pytest.raises(ValueError, match="leave"):
                keras_mp.PoolDataset(range(4), transforms.with_random, pool=pool, **options)
        keras_mp.PoolDataset(range(4), transforms.with_random, pool=pool, workers=2).close()


def needs_more(sample: Any) -> Any:
    raise ValueError("too small")


@pytest.mark.parametrize(
    ("source", "item"),
    [
        (np.zeros((4, 64, 64, 3), np.uint8), "array of shape (64, 64, 3), dtype uint8"),
        ([(np.zeros((30, 30)), 7)] * 4, "(array of shape (30, 30), dtype float64, 7)"),
        (
            [{"image": np.zeros((2, 2), np.float32), "name": "tile 7"}],
            "{'image': array of shape (2, 2), dtype float32, ",
        ),
        ([transforms.Pair(np.zeros(3), 1)], "Pair(x=array of shape (3,), dtype float64, y=1)"),
        ([[np.zeros(2)]], "[array of shape (2,), dtype float64]"),
        ([np.zeros(())], "array(0.)"),
        ([MultiLine()], "two lines"),
        ([np.float32(7)], "7.0"),
        ([{"a": 1, "b": [1, 2]}], "{'a': 1, 'b': [1, 2]}"),
        (["one\ntwo"], "'one\\ntwo'"),
    ],
)
def test_an_item_is_one_line_and_an_array_its_shape(source: Any, item: str) -> None:
    with keras_mp.PoolDataset(source, needs_more, workers=0) as train, pytest.raises(keras_mp.SampleError) as caught:
        list(train)
    assert item in caught.value.failure.item
    assert "\n" not in caught.value.failure.describe()
