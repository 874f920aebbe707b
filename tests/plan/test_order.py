"""`order=`: weighted and curriculum sampling in place of a permutation."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests import transforms


def weighted(epoch: int, rng: np.random.Generator) -> Any:
    """Draws from ten samples, the last nine times as often as the others together."""
    return rng.choice(10, size=25, p=[0.1 / 9] * 9 + [0.9])


def growing(epoch: int, rng: np.random.Generator) -> Any:
    return [min(index, 2 + epoch) for index in range(8)]


def dataset(order: Any, workers: int = 0) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(range(10), transforms.with_random, batch_size=4, seed=2, order=order, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_what_the_callable_says(workers: int) -> None:
    rng_free = [list(growing(epoch, np.random.default_rng())) for epoch in range(2)]
    with dataset(growing, workers) as train:
        assert len(train) == 2
        for epoch in range(2):
            assert [int(v) for batch in train for v in batch["value"]] == rng_free[epoch]


def test_weights_draw_anew_each_epoch_and_alike_with_the_same_seed() -> None:
    def epochs() -> list[list[int]]:
        with dataset(weighted) as train:
            assert len(train) == 7
            return [[int(v) for batch in train for v in batch["value"]] for _ in range(2)]

    first, second = epochs()
    assert [first, second] == epochs()
    assert first != second
    assert first.count(9) > 15


def test_a_sample_that_comes_again_gets_other_random_numbers() -> None:
    with dataset(weighted, 2) as train, dataset(weighted) as alone:
        batches, again = list(train), list(alone)
    for part in ("own", "python", "legacy"):
        drawn = np.concatenate([batch[part] for batch in batches])
        assert len(set(drawn)) == len(drawn) == 25
        np.testing.assert_array_equal(drawn, np.concatenate([batch[part] for batch in again]))


def test_the_first_time_a_sample_comes_it_is_as_without_an_order() -> None:
    with dataset(lambda epoch, rng: [5, 5, 1]) as ordered, dataset(None) as plain:
        (batch,) = ordered
        whole = np.concatenate([part["own"] for part in plain])
    assert batch["own"][0] == whole[5]
    assert batch["own"][2] == whole[1]
    assert batch["own"][1] != whole[5]


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (lambda epoch, rng: [0, 10], "outside 0..9"),
        (lambda epoch, rng: [-1], "outside 0..9"),
        (lambda epoch, rng: [], "non-empty"),
        (lambda epoch, rng: [0.5], "integers"),
        ("by size", "callable"),
    ],
)
def test_a_wrong_order_is_refused_at_construction(order: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        dataset(order)


def test_an_epoch_of_another_length_is_refused() -> None:
    with dataset(lambda epoch, rng: range(4 + epoch)) as train:
        list(train)
        with pytest.raises(ValueError, match="same number of batches in every epoch"):
            list(train)


def test_an_order_and_shuffle_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="order="):
        keras_mp.PoolDataset(range(4), order=growing, shuffle=True)


class Ordered:
    """An order that cannot be hashed, as a dataclass cannot."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, epoch: int, rng: np.random.Generator) -> Any:
        self.calls.append(epoch)
        return rng.permutation(10)


@dataclasses.dataclass
class Rotated:
    by: int

    def __call__(self, epoch: int, rng: np.random.Generator) -> Any:
        return [(index + self.by * (epoch + 1)) % 10 for index in range(10)] + [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_order_need_not_be_hashable(workers: int) -> None:
    order = Rotated(3)
    with dataset(order, workers) as train:
        for epoch in range(2):
            expected = order(epoch, np.random.default_rng())
            assert [int(v) for batch in train for v in batch["value"]] == expected
        parts = [train.shard(2, index) for index in range(2)]
        again = pickle.loads(pickle.dumps(train))
        expected = order(2, np.random.default_rng())
        assert [int(v) for batch in again for v in batch["value"]] == expected
        batches = [[int(v) for v in batch["value"]] for part in parts for batch in part]
        assert sorted(v for batch in batches for v in batch) == sorted(expected)
        for part in parts:
            part.close()


def test_an_order_is_computed_once_an_epoch() -> None:
    order = Ordered()
    with dataset(order) as train:
        for _ in range(3):
            list(train)
    assert order.calls == [0, 1, 2]


def test_samples_batches_shuffles_and_orders_draw_from_streams_of_their_own() -> None:
    """The first numbers of every generator that a run hands out, and the permutations made by those it does not."""
    drawn: list[tuple[float, ...]] = []

    def draw(value: Any, rng: np.random.Generator) -> Any:
        permutations.append(copy.deepcopy(rng).permutation(10).tolist())
        drawn.append(tuple(rng.random(2)))
        return value

    def order(epoch: int, rng: np.random.Generator) -> Any:
        drawn.append(tuple(rng.random(2)))
        return [*range(10), *range(10)]

    seeds = [0, 1, 2, 3, 7, 7 + (3 << 32), 1 << 64]
    epochs = 5
    for seed in seeds:
        permutations: list[list[int]] = []
        options: dict[str, Any] = {"batch_transform": draw, "batch_size": 4, "workers": 0, "seed": seed}
        with keras_mp.PoolDataset(range(10), draw, order=order, **options) as train:
            for _ in range(epochs):
                list(train)
        assert len(permutations) == epochs * 25
        with keras_mp.PoolDataset(range(10), shuffle=True, workers=0, seed=seed, batch_size=10) as shuffled:
            for _ in range(epochs):
                assert next(iter(shuffled)).tolist() not in permutations
                shuffled.set_epoch(shuffled.epoch + 1)
    assert len(set(drawn)) == len(drawn) == len(seeds) * epochs * 26
