"""Batches of like length: each sample once (P1), by seed and epoch alone (P2), as many batches on each shard."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from keras_mp.plan.bucket_batching import BucketBatching, divide
from keras_mp.plan.buckets import Buckets

_BOUNDARIES = [4, 10, 11, 30]
_LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=150)
_SIZES = st.lists(st.integers(1, 9), min_size=5, max_size=5)


def _plan(
    lengths: Sequence[int], sizes: Sequence[int], shuffle: bool = True, seed: int = 0, drop: bool = False
) -> BucketBatching:
    return Buckets(lengths, _BOUNDARIES, sizes).plan(np.array(lengths), 32, shuffle, seed, drop)


def _epoch(plan: BucketBatching, epoch: int = 0) -> list[list[int]]:
    return [plan.samples(epoch, batch).tolist() for batch in range(plan.num_batches)]


def _flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def _bucket(length: int) -> int:
    return sum(length >= boundary for boundary in _BOUNDARIES)


@given(_LENGTHS, _SIZES, st.booleans(), st.booleans(), st.integers(0, 2**40), st.integers(0, 3))
def test_each_sample_comes_once_in_a_batch_of_its_bucket(
    lengths: list[int], sizes: list[int], shuffle: bool, drop: bool, seed: int, epoch: int
) -> None:  # P1
    plan = _plan(lengths, sizes, shuffle, seed, drop)
    batches = _epoch(plan, epoch)
    counts = [sum(_bucket(length) == bucket for length in lengths) for bucket in range(5)]
    short = [0] * 5
    for batch in batches:
        (bucket,) = {_bucket(lengths[index]) for index in batch}
        assert 0 < len(batch) <= sizes[bucket]
        short[bucket] += len(batch) < sizes[bucket]
    taken = _flat(batches)
    assert len(set(taken)) == len(taken)
    if drop:
        assert not any(short)
        assert len(taken) == sum(count // size * size for count, size in zip(counts, sizes, strict=True))
    else:
        assert max(short) <= 1
        assert len(taken) == len(lengths)
    each = math.floor if drop else math.ceil
    assert len(batches) == sum(each(count / size) for count, size in zip(counts, sizes, strict=True))
    assert batches == _epoch(_plan(lengths, sizes, shuffle, seed, drop), epoch)  # P2


@given(
    st.lists(st.integers(0, 60), min_size=40, max_size=150), _SIZES, st.integers(2, 6), st.booleans(), st.integers(0, 3)
)
@example([1, 1, 50], [1, 1, 1, 1, 2], 2, False, 0)  # the only long sample is joined by a short one
@example([1, 1, 1, 50], [2, 1, 1, 1, 1], 2, False, 0)  # a batch of short ones gives one away
@example([1] * 5 + [5] * 3 + [50], [1, 2, 1, 1, 1], 3, False, 0)
def test_shards_are_disjoint_cover_the_epoch_and_have_as_many_batches(
    lengths: list[int], sizes: list[int], shards: int, drop: bool, epoch: int
) -> None:  # P1
    whole = _plan(lengths, sizes, True, 7, drop)
    try:
        plans = [whole.for_shard(shards, shard) for shard in range(shards)]
    except ValueError as error:  # when it may be refused: the next test
        assert "num_shards" in str(error)
        return
    parts = [_epoch(plan, epoch) for plan in plans]
    assert {len(part) for part in parts} == {plans[0].num_batches}
    taken = [index for part in parts for index in _flat(part)]
    assert len(set(taken)) == len(taken)
    if not drop:
        assert len(taken) == len(lengths)
    for step in range(plans[0].num_batches):
        found = [part[step] for part in parts]
        assert min(map(len, found)) >= 1
        assert max(map(len, found)) - min(map(len, found)) <= 1
        bucket = max(_bucket(lengths[index]) for batch in found for index in batch)
        if drop:
            assert {len(batch) for batch in found} == {sizes[bucket]}
            assert {_bucket(lengths[index]) for batch in found for index in batch} == {bucket}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 5), st.data())
def test_whatever_can_be_divided_among_shards_is(counts: list[int], shards: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=len(counts), max_size=len(counts)))
    total = sum(counts)
    assume(total > 0)
    try:
        steps = divide(counts, sizes, shards, False)
    except ValueError as error:
        assert "cannot give num_shards" in str(error)
        # Some batch of two or more could have given a sample away, were there enough samples.
        full = sum(count // (size * shards) for count, size in zip(counts, sizes, strict=True) if size > 1)
        assert total < shards or (total % shards and not full)
        return
    _, starts, stops = steps.T
    assert starts[0] == 0
    assert stops[-1] == total
    assert (starts[1:] == stops[:-1]).all()
    assert (stops - starts >= shards).all()
    assert (stops - starts <= np.array(sizes)[steps[:, 0]] * shards).all()


def test_an_epoch_mixes_the_buckets_and_the_next_one_anew() -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 2000)
    plan = _plan(lengths.tolist(), [8] * 5)
    first, second = (_epoch(plan, epoch) for epoch in (0, 1))
    assert {frozenset(batch) for batch in first}.isdisjoint({frozenset(batch) for batch in second})
    for batches in (first, second):
        buckets = np.array([_bucket(lengths[batch[0]]) for batch in batches])
        expected = 1 - sum((buckets == bucket).mean() ** 2 for bucket in range(5))
        assert abs((np.diff(buckets) != 0).mean() - expected) < 0.15  # as in a random order


def test_without_shuffle_the_batches_stay_and_their_order_is_drawn() -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 300)
    plan = _plan(lengths.tolist(), [8] * 5, shuffle=False)
    first, second = (_epoch(plan, epoch) for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert all(batch == sorted(batch) for batch in first)


@given(_LENGTHS, st.integers(0, 20))
def test_the_first_two_batches_differ_where_batches_do(lengths: list[int], epoch: int) -> None:
    batches = _epoch(_plan(lengths, [2] * 5), epoch)
    buckets = [_bucket(lengths[batch[0]]) for batch in batches]
    assert len(set(buckets)) == 1 or buckets[0] != buckets[1]


@given(_LENGTHS, st.integers(60, 500))
def test_tokens_in_a_padded_batch_stay_below_the_limit(lengths: list[int], max_tokens: int) -> None:
    plan = Buckets(lengths, _BOUNDARIES, max_tokens=max_tokens).plan(np.array(lengths), 32, True, 0, False)
    for batch in _epoch(plan):
        bucket = _bucket(lengths[batch[0]])
        longest = _BOUNDARIES[bucket] if bucket < 4 else max(lengths)
        assert len(batch) * longest <= max_tokens
        assert (plan.sizes[bucket] + 1) * longest > max_tokens  # and no batch size is smaller than it need be


def test_a_bucket_holds_the_lengths_below_its_boundary() -> None:
    plan = Buckets([3, 4, 5, 0, 6, 100], [4, 6]).plan(np.array([3, 4, 5, 0, 6, 100]), 32, False, 0, False)
    assert sorted(map(tuple, _epoch(plan))) == [(0, 3), (1, 2), (4, 5)]


def test_as_in_tf_data() -> None:
    """tf.data puts the same samples into the same batches."""
    tf = pytest.importorskip("tensorflow")
    lengths = np.random.default_rng(3).integers(0, 40, 200)
    sizes = [7, 3, 5, 2, 4]
    theirs = tf.data.Dataset.range(len(lengths)).bucket_by_sequence_length(
        lambda index: tf.gather(tf.constant(lengths, tf.int32), index), _BOUNDARIES, sizes, drop_remainder=False
    )
    plan = _plan(lengths.tolist(), sizes, shuffle=False)
    assert sorted(_epoch(plan)) == sorted(batch.tolist() for batch in theirs.as_numpy_iterator())


@given(_LENGTHS, _SIZES, st.integers(0, 5))
def test_substitutes_are_of_the_same_bucket_and_not_of_the_batch(
    lengths: list[int], sizes: list[int], epoch: int
) -> None:
    plan = _plan(lengths, sizes)
    for batch in range(plan.num_batches):
        samples = plan.samples(epoch, batch).tolist()
        others = plan.substitutes(epoch, batch)
        mates = {i for i, length in enumerate(lengths) if _bucket(length) == _bucket(lengths[samples[0]])}
        if others is None:
            assert mates == set(samples)
        else:
            assert len(set(others)) == len(others) == min(32, len(mates) - len(samples))
            assert set(others) <= mates - set(samples)


def test_plans_are_told_apart() -> None:
    lengths = list(range(50))
    plans = [
        _plan(lengths, [4] * 5),
        _plan(lengths, [4, 4, 4, 4, 5]),
        _plan([*lengths[1:], 0], [4] * 5),
        Buckets(lengths, [4, 10, 11]).plan(np.array(lengths), 4, True, 0, False),
    ]
    assert len({plan.buckets_digest for plan in plans}) == 4
    assert _plan(lengths, [4] * 5, seed=3).buckets_digest == plans[0].buckets_digest


def test_a_plan_travels_without_what_it_has_drawn() -> None:
    plan = _plan(list(range(60)) * 100, [4] * 5)
    before = len(pickle.dumps(plan))
    batches = _epoch(plan, 1)
    copy = pickle.loads(pickle.dumps(plan))
    assert _epoch(copy, 1) == batches
    assert len(pickle.dumps(plan)) < before + 24 * plan.num_batches + 1000  # its steps at most


def test_uniform_size() -> None:
    lengths = [1] * 8 + [5] * 8
    assert _plan(lengths, [4] * 5).uniform_size == 4
    assert _plan(lengths, [4] * 5).for_shard(2, 0).uniform_size == 4
    assert _plan(lengths, [3] * 5).uniform_size is None
    assert _plan(lengths, [3] * 5, drop=True).uniform_size == 3
    assert _plan(lengths, [4, 2, 1, 1, 1]).uniform_size is None


@pytest.mark.parametrize("batch", [-1, 4, 100])
def test_batches_out_of_range(batch: int) -> None:
    with pytest.raises(IndexError, match=f"batch {batch} is out of range for 4 batches"):
        _plan([1] * 10, [3] * 5).samples(0, batch)


def test_a_shard_is_not_divided_again() -> None:
    with pytest.raises(ValueError, match="shard 1 of 2 already"):
        _plan([1] * 10, [3] * 5).for_shard(2, 1).for_shard(2, 0)


@pytest.mark.parametrize(
    ("options", "kind", "texts"),
    [
        ({"lengths": 5}, TypeError, ["lengths must be a 1-d sequence of whole numbers, or callable, got 5"]),
        ({"lengths": "abc"}, TypeError, ["lengths must be a 1-d sequence", "'abc'"]),
        ({"lengths": None}, TypeError, ["lengths must be a 1-d sequence", "None"]),
        ({"lengths": [1.0, 2.0]}, TypeError, ["dtype float64", "[len(sample) for sample in source]"]),
        ({"lengths": [True, False]}, TypeError, ["dtype bool"]),
        ({"lengths": [[1, 2]]}, TypeError, ["shape (1, 2)"]),
        ({"lengths": [[1], [2, 3]]}, TypeError, ["lengths must be a 1-d sequence"]),
        ({"lengths": []}, TypeError, ["lengths must be a 1-d sequence of whole numbers", "[]"]),
        ({"lengths": np.empty(0, int)}, ValueError, ["lengths is empty"]),
        ({"lengths": [3, -1, 2]}, ValueError, ["lengths must be at least 0, but lengths[1] is -1"]),
        ({"boundaries": 8}, TypeError, ["boundaries must be a sequence of whole numbers, got 8"]),
        ({"boundaries": "8"}, TypeError, ["boundaries must be a sequence of whole numbers, got '8'"]),
        ({"boundaries": []}, ValueError, ["boundaries is empty"]),
        ({"boundaries": [-4, 8]}, ValueError, ["boundaries[0] must be at least 1, got -4"]),
        ({"boundaries": [0, 8]}, ValueError, ["boundaries[0] must be at least 1, got 0"]),
        ({"boundaries": [2.5]}, TypeError, ["boundaries[0] must be an int, got 2.5"]),
        ({"boundaries": [8, 4]}, ValueError, ["boundaries must increase, but 4 comes after 8", "sorted"]),
        ({"boundaries": [8, 8]}, ValueError, ["boundaries must increase, but 8 comes after 8"]),
        ({"batch_sizes": [4]}, ValueError, ["one entry for each of the 2 buckets", "from 8 up", "got 1"]),
        ({"batch_sizes": [4, 2, 1]}, ValueError, ["one entry for each of the 2 buckets", "got 3"]),
        ({"batch_sizes": [4, 0]}, ValueError, ["batch_sizes[1] must be at least 1, got 0"]),
        ({"batch_sizes": 4}, TypeError, ["batch_sizes must be a sequence of whole numbers, got 4"]),
        ({"batch_sizes": [4, 2.0]}, TypeError, ["batch_sizes[1] must be an int, got 2.0"]),
        ({"max_tokens": 0}, ValueError, ["max_tokens must be at least 1, got 0"]),
        ({"max_tokens": 1e4}, TypeError, ["max_tokens must be an int, got 10000.0"]),
        ({"batch_sizes": [1, 1], "max_tokens": 9}, ValueError, ["batch_sizes=[1, 1]", "max_tokens=9", "leave one"]),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], texts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        Buckets(**{"lengths": [1, 9, 3], "boundaries": [8], **options})
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "texts"),
    [
        ([1, 5], 9, ["max_tokens=9 is fewer than the boundary 10 of bucket 1", "1 samples", "raise max_tokens to 10"]),
        ([1, 77], 60, ["max_tokens=60 is fewer than the longest length 77 of bucket 4", "raise max_tokens to 77"]),
    ],
)
def test_too_few_tokens(lengths: list[int], max_tokens: int, texts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Buckets(lengths, _BOUNDARIES, max_tokens=max_tokens).plan(np.array(lengths), 32, True, 0, False)
    for text in texts:
        assert text in str(caught.value)


def test_an_empty_bucket_needs_no_tokens() -> None:
    plan = Buckets([1, 2, 3], [4, 1000], max_tokens=8).plan(np.array([1, 2, 3]), 32, False, 0, False)
    assert sorted(map(len, _epoch(plan))) == [1, 2]
    assert plan.batch_size == 2


@pytest.mark.parametrize(
    ("count", "sizes", "drop", "shards", "text"),
    [
        (3, [4] * 5, True, 1, "drop_remainder=True leaves no batch: the buckets have [3, 0, 0, 0, 0] samples"),
        (7, [4] * 5, True, 2, "none fills a batch of [4, 4, 4, 4, 4] on each of num_shards=2"),
        (3, [4] * 5, False, 4, "3 samples in batches of these sizes cannot give num_shards=4"),
        (5, [1] * 5, False, 2, "drop_remainder=True, or greater batch_sizes"),
    ],
)
def test_too_few_samples(count: int, sizes: list[int], drop: bool, shards: int, text: str) -> None:
    plan = dataclasses.replace(_plan([1] * count, sizes, drop=drop), num_shards=shards)
    with pytest.raises(ValueError) as caught:
        plan.check()
    assert text in str(caught.value)
