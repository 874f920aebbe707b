"""Which samples make which batch: exactly once (P1), a function of seed and epoch alone (P2), fair on shards."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mp.plan import shuffle as shuffling
from keras_mp.plan.batching import Batching
from keras_mp.plan.shuffle import keyed_permutation


def _epoch(plan: Batching, epoch: int = 0) -> list[list[int]]:
    return [plan.samples(epoch, batch).tolist() for batch in range(plan.num_batches)]


def _flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


_LENGTHS = st.integers(1, 200)
_BATCH_SIZES = st.integers(1, 40)


@given(_LENGTHS, _BATCH_SIZES, st.booleans(), st.booleans(), st.integers(0, 2**40), st.integers(0, 5))
def test_each_sample_exactly_once(
    length: int, batch_size: int, shuffle: bool, drop: bool, seed: int, epoch: int
) -> None:  # P1
    plan = Batching(length, batch_size, shuffle, seed, drop)
    batches = _epoch(plan, epoch)
    taken = _flat(batches)
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(length))
    assert len(taken) == (length // batch_size * batch_size if drop else length)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert plan.num_batches == (length // batch_size if drop else math.ceil(length / batch_size))
    if not shuffle:
        assert taken == list(range(len(taken)))
    assert batches == _epoch(Batching(length, batch_size, shuffle, seed, drop), epoch)


@given(_LENGTHS, st.integers(2, 12), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 3))
def test_shards_are_disjoint_cover_the_epoch_and_have_as_many_batches(
    length: int, batch_size: int, shards: int, shuffle: bool, drop: bool, epoch: int
) -> None:  # P1
    plans = [Batching(length, batch_size, shuffle, 7, drop, shards, shard) for shard in range(shards)]
    assert len({plan.num_batches for plan in plans}) == 1
    whole = Batching(length, batch_size * shards, shuffle, 7, drop)
    assert plans[0].num_batches == whole.num_batches
    parts = [_epoch(plan, epoch) for plan in plans]
    taken = [index for part in parts for index in _flat(part)]
    assert len(set(taken)) == len(taken)
    assert set(taken) == set(_flat(_epoch(whole, epoch)))
    for step in range(whole.num_batches):
        sizes = [len(part[step]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        assert min(sizes) >= 1 or length < shards
        if drop:
            assert sizes == [batch_size] * shards
    joined = [[index for part in parts for index in part[step]] for step in range(whole.num_batches)]
    assert _flat(joined) == _flat(_epoch(whole, epoch))
    full = whole.num_batches - 2
    assert joined[: max(0, full)] == _epoch(whole, epoch)[: max(0, full)]


@pytest.mark.parametrize("batch", [-1, 4, 100])
def test_batches_out_of_range(batch: int) -> None:
    with pytest.raises(IndexError, match=f"batch {batch} is out of range for 4 batches"):
        Batching(10, 3).samples(0, batch)


def test_epochs_and_seeds_have_their_own_permutations() -> None:
    orders = {tuple(_flat(_epoch(Batching(50, 8, True, seed), epoch))) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_an_epoch_does_not_depend_on_the_batch_size() -> None:  # P2
    assert _flat(_epoch(Batching(50, 8, True, 3))) == _flat(_epoch(Batching(50, 7, True, 3)))


def test_a_billion_samples_take_no_memory() -> None:
    plan = Batching(10**9 + 7, 256, shuffle=True, seed=1)
    keyed_permutation(np.arange(2), 100, 0, 0)
    tracemalloc.start()
    try:
        seen = np.concatenate([plan.samples(3, batch) for batch in (0, 1, plan.num_batches - 2, plan.num_batches - 1)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert len(np.unique(seen)) == len(seen) == 3 * 256 + 7
    assert seen.max() > 9 * 10**8
    assert seen.min() < 10**8


@pytest.mark.parametrize("limit", [0, 10**9])
def test_both_ways_of_shuffling_keep_the_promises(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(shuffling, "_MATERIALISE_LIMIT", limit)
    plans = [Batching(103, 5, True, 9, False, 3, shard) for shard in range(3)]
    assert sorted(index for plan in plans for index in _flat(_epoch(plan, 2))) == list(range(103))


# -- an order of the user's ------------------------------------------------------------------------------------------


def test_order_replaces_the_permutation_and_may_repeat_samples() -> None:
    def order(epoch: int, rng: np.random.Generator) -> list[int]:
        return [epoch] * 3 + [int(index) for index in rng.integers(0, 10, 4)]

    plan = Batching(10, 2, seed=1, order=order)
    assert plan.num_batches == 4
    taken = _flat(_epoch(plan, 5))
    assert taken[:3] == [5, 5, 5]
    assert taken == _flat(_epoch(Batching(10, 2, seed=1, order=order), 5))  # P2
    assert taken[3:] != _flat(_epoch(plan, 6))[3:]
    assert _flat(_epoch(Batching(10, 2, seed=2, order=order), 5)) != taken


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter, lambda r: range(len(r))])
def test_order_may_be_any_iterable(kind: Any) -> None:
    plan = Batching(10, 3, order=lambda epoch, rng: kind([0, 1, 2, 3]))
    assert _epoch(plan, 1) == [[0, 1, 2], [3]]


def test_order_is_shared_fairly_by_shards() -> None:
    plans = [
        Batching(10, 2, order=lambda epoch, rng: rng.permutation(10)[:7], num_shards=2, shard=shard)
        for shard in range(2)
    ]
    assert [len(batch) for plan in plans for batch in _epoch(plan)] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (lambda e, r: [], "order(epoch=0) must return a non-empty 1-d sequence of integers, got shape (0,)"),
        (lambda e, r: [[1]], "got shape (1, 1)"),
        (lambda e, r: [0.5], "dtype float64"),
        (lambda e, r: [0, 10], "order(epoch=0) returned index 10, outside 0..9"),
        (lambda e, r: [0, -1], "order(epoch=0) returned index -1, outside 0..9"),
    ],
)
def test_bad_orders_are_named(order: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        _ = Batching(10, 2, order=order).num_batches
    assert text in str(caught.value)


def test_an_order_of_another_length_is_an_error() -> None:
    plan = Batching(10, 2, order=lambda epoch, rng: range(4 + epoch))
    assert plan.num_batches == 2
    with pytest.raises(ValueError, match=r"order\(epoch=1\) returned 5 indices, but order\(epoch=0\) returned 4"):
        plan.samples(1, 0)
