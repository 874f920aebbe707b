"""Orders that draw: by weights and balanced, from (seed, epoch) alone; what they refuse."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mp
from keras_mp.plan.batching import Batching
from tests.support import assert_refused


def _drawn(order: Any, length: int, epoch: int = 0, seed: int = 0) -> list[int]:
    plan = Batching(length, 10**6, seed=seed, order=order)
    drawn: list[int] = plan.samples(epoch, 0).tolist()
    return drawn


def test_samples_come_in_proportion_to_their_weights() -> None:
    weights = [0, 1, 2, 0, 5, 0]
    counts = np.bincount(_drawn(keras_mp.weighted(weights, 80_000), 6), minlength=6)
    expected = np.array(weights) / 8 * 80_000
    assert (counts[expected == 0] == 0).all()
    assert (abs(counts - expected) <= 6 * np.sqrt(expected)).all()


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=20).filter(any), st.integers(1, 50), st.integers(0, 5))
def test_a_weight_of_zero_is_never_drawn(weights: list[float], length: int, epoch: int) -> None:
    drawn = _drawn(keras_mp.weighted(weights, length), len(weights), epoch)
    assert len(drawn) == length
    assert all(weights[index] > 0 for index in drawn)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.none() | st.integers(1, 100), st.integers(0, 5))
def test_balanced_classes_have_equal_shares(labels: list[str], length: int | None, epoch: int) -> None:
    drawn = _drawn(keras_mp.balanced(labels, length), len(labels), epoch)
    assert len(drawn) == (length or len(labels))
    counts = [sum(labels[index] == label for index in drawn) for label in sorted(set(labels))]
    assert max(counts) - min(counts) <= 1


def test_samples_of_a_class_come_alike_and_classes_are_mixed() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    drawn = np.array(_drawn(keras_mp.balanced(labels, 40_000), 100))
    counts = np.bincount(drawn, minlength=100)
    assert abs(counts[:90] - 20_000 / 90).max() < 6 * np.sqrt(20_000 / 90)
    assert abs(counts[90:] - 2000).max() < 6 * np.sqrt(2000)
    assert abs((np.diff(labels[drawn]) != 0).mean() - 0.5) < 0.03
    short = [set(labels[_drawn(keras_mp.balanced(labels, 1), 100, epoch)]) for epoch in range(40)]
    assert {0} in short  # who has one sample more is drawn as well
    assert {1} in short


@pytest.mark.parametrize("order", [keras_mp.weighted([1, 2, 3], 30), keras_mp.balanced([0, 0, 1], 30)], ids=repr)
def test_draws_depend_on_seed_and_epoch_alone(order: Any) -> None:  # P2
    again = pickle.loads(pickle.dumps(order))
    assert _drawn(order, 3, 2) == _drawn(again, 3, 2)
    assert len({tuple(_drawn(order, 3, epoch, seed)) for epoch in range(5) for seed in range(5)}) == 25


_CASES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "weight nan": (
        lambda: keras_mp.weighted([1, float("nan")], 2),
        ValueError,
        ["weights must be finite", "weights[1] is nan"],
    ),
    "weight inf": (lambda: keras_mp.weighted([float("inf")], 2), ValueError, ["weights[0] is inf"]),
    "weight negative": (lambda: keras_mp.weighted([1, -2], 2), ValueError, ["at least 0, but weights[1] is -2.0"]),
    "weights 0": (lambda: keras_mp.weighted([0, 0], 2), ValueError, ["weights are all 0, got [0, 0]"]),
    "weights empty": (lambda: keras_mp.weighted([], 2), ValueError, ["weights is empty"]),
    "weights 2-d": (lambda: keras_mp.weighted([[1, 2]], 2), ValueError, ["weights must be 1-d", "argmax"]),
    "weights str": (lambda: keras_mp.weighted("12", 2), ValueError, ["weights must be 1-d", "'12'"]),
    "weights strs": (lambda: keras_mp.weighted(["1"], 2), TypeError, ["weights must be numbers, got ['1']"]),
    "weights None": (lambda: keras_mp.weighted(None, 2), ValueError, ["weights must be 1-d", "None"]),  # type: ignore[arg-type]
    "weighted length": (lambda: keras_mp.weighted([1], 0), ValueError, ["length must be at least 1, got 0"]),
    "weighted float": (lambda: keras_mp.weighted([1], 2.5), TypeError, ["length must be an int, got 2.5"]),  # type: ignore[arg-type]
    "labels one-hot": (
        lambda: keras_mp.balanced([[0, 1]]),
        ValueError,
        ["labels must be 1-d", "labels.argmax(axis=1)"],
    ),
    "labels ragged": (lambda: keras_mp.balanced([[0], [1, 2]]), ValueError, ["labels must be 1-d"]),
    "labels empty": (lambda: keras_mp.balanced([]), ValueError, ["labels is empty"]),
    "labels nan": (lambda: keras_mp.balanced([0.0, float("nan")]), ValueError, ["labels[1] is nan"]),
    "labels mixed": (
        lambda: keras_mp.balanced(np.array([1, None, "a"], object)),
        TypeError,
        ["labels must be numbers or strings, all of one kind"],
    ),
    "balanced length": (lambda: keras_mp.balanced([1], -1), ValueError, ["length must be at least 1, got -1"]),
    "weights of another source": (
        lambda: keras_mp.PoolDataset(range(10), order=keras_mp.weighted([1] * 9, 5)),
        ValueError,
        ["order= was made of 9 weights, but the source has 10 samples"],
    ),
    "labels of another source": (
        lambda: keras_mp.PoolDataset(range(10), order=keras_mp.balanced([1, 2] * 6)),
        ValueError,
        ["order= was made of 12 labels, but the source has 10 samples"],
    ),
}


@pytest.mark.parametrize(("make", "kind", "texts"), _CASES.values(), ids=_CASES)
def test_bad_arguments(make: Callable[[], Any], kind: type[Exception], texts: list[str]) -> None:
    assert_refused(make, kind, texts)
