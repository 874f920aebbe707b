"""Which samples make which batch of a stream: the same for whoever reads it (P2), and each sample once (P1)."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mp
from tests.census import eventually
from tests.shards import LENGTHS, TOTAL, Gated, Numbers, all_pairs, assert_equal, pairs, stream

_EPOCHS = 2


@pytest.fixture(scope="module")
def reference() -> list[Any]:
    """The batches of two epochs, read in this process."""
    with stream() as data:
        return [batch for _ in range(_EPOCHS) for batch in data]


def of_lanes(lengths: Sequence[int], lanes: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """The batches of an epoch without shuffling, as the guide says that they are made."""
    left = [[(s, o) for s in range(lane, len(lengths), lanes) for o in range(lengths[s])] for lane in range(lanes)]
    batches = []
    while any(len(lane) >= batch_size for lane in left):
        for number, lane in enumerate(left):
            if len(lane) >= batch_size:
                batches.append(lane[:batch_size])
                left[number] = lane[batch_size:]
    rest = [sample for lane in left for sample in lane]
    return batches + [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]


@pytest.mark.parametrize("length", [None, TOTAL])
@pytest.mark.parametrize(
    "options", [{"workers": 3, "use_multiprocessing": False}, *({"workers": workers} for workers in (1, 3, 8))]
)
def test_the_number_of_workers_makes_no_difference(
    options: dict[str, Any], length: int | None, reference: list[Any]
) -> None:
    with stream(length=length, **options) as data:
        assert_equal([batch for _ in range(_EPOCHS) for batch in data], reference)


def test_nor_does_an_executor(processes: concurrent.futures.Executor, reference: list[Any]) -> None:
    with stream(pool=processes) as data:
        assert_equal([batch for _ in range(_EPOCHS) for batch in data], reference)


def test_a_slow_shard_does_not_keep_other_lanes_from_working_ahead(
    running_pool: keras_mp.WorkerPool, tmp_path: pathlib.Path
) -> None:
    log, gate = tmp_path / "opened", tmp_path / "gate"
    with stream(shuffle=0) as data:
        expected = list(data)
    with (
        stream(Gated(log, gate), shuffle=0, pool=running_pool) as data,
        concurrent.futures.ThreadPoolExecutor(1) as consumer,
    ):
        batches = consumer.submit(list, data)
        try:
            # Shard 7 is opened for the second batch of lane 3, whose turn is after the second one of lane 0.
            assert eventually(lambda: log.exists() and "7" in log.read_text().split(), 60)
            assert not batches.done()
        finally:
            gate.touch()
        assert_equal(batches.result(), expected)


def test_each_sample_comes_once_in_an_epoch_and_epochs_differ(reference: list[Any]) -> None:
    first, second = pairs(reference[:26]), pairs(reference[26:])
    assert len(reference) == 2 * -(-TOTAL // 4)
    assert len(first) == len(second) == TOTAL
    assert set(first) == set(second) == all_pairs()
    assert first != second
    assert len({int(number) for batch in reference for number in batch[:, 2]}) == 2 * TOTAL  # random numbers


def test_another_number_of_lanes_is_another_order() -> None:
    with stream(lanes=3) as three, stream(lanes=4) as four:
        assert pairs(list(three)) != pairs(list(four))


def test_a_block_holds_samples_that_follow_one_another() -> None:
    with stream(Numbers([40]), lanes=1, shuffle=10, batch_size=5, batch_transform=None) as data:
        offsets = [offset for _, offset in pairs(list(data))]
    for block in range(4):
        found = offsets[10 * block : 10 * (block + 1)]
        assert sorted(found) == list(range(10 * block, 10 * (block + 1)))
        assert found != sorted(found)


_shards = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(lengths=_shards.filter(any), lanes=st.integers(1, 5), batch_size=st.integers(1, 6), declared=st.booleans())
@settings(max_examples=60)
def test_lanes_take_turns(lengths: list[int], lanes: int, batch_size: int, declared: bool) -> None:
    expected = of_lanes(lengths, lanes, batch_size)
    length = sum(lengths) if declared else None
    with stream(
        Numbers(lengths), lanes=lanes, batch_size=batch_size, shuffle=0, batch_transform=None, length=length
    ) as data:
        assert [pairs([batch]) for batch in data] == expected
        assert length is None or len(data) == len(expected)


@given(
    lengths=_shards.filter(any),
    lanes=st.integers(1, 5),
    batch_size=st.integers(1, 6),
    shuffle=st.integers(0, 7),
    drop=st.booleans(),
    declared=st.booleans(),
    cut=st.integers(0, 60),
)
@settings(max_examples=25)
def test_any_cut_and_any_workers(
    running_pool: keras_mp.WorkerPool,
    lengths: list[int],
    lanes: int,
    batch_size: int,
    shuffle: int,
    drop: bool,
    declared: bool,
    cut: int,
) -> None:
    total = sum(lengths)
    declared &= not drop or total >= batch_size
    options: dict[str, Any] = {"lanes": lanes, "batch_size": batch_size, "shuffle": shuffle, "drop_remainder": drop}
    options["length"] = total if declared else None
    read = Numbers(lengths)
    with stream(read, **options) as data:
        whole = [list(data), list(data)]
    for epoch in whole:
        assert len(epoch) == (total // batch_size if drop else -(-total // batch_size))
        found = pairs(epoch)
        assert len(set(found)) == len(found) == (total // batch_size * batch_size if drop else total)
        assert set(found) <= all_pairs(lengths)
    flat = [batch for epoch in whole for batch in epoch]
    cut = min(cut, len(flat))
    with stream(read, pool=running_pool, **options) as data:
        taken: list[Any] = []
        state: dict[str, Any] = data.state_dict()
        for _ in range(2):
            for batch in data:
                if len(taken) == cut:
                    break
                taken.append(batch)
                state = data.state_dict()
            if len(taken) == cut:
                break
    assert_equal(taken, flat[:cut])
    with stream(read, pool=running_pool, **options) as data:
        data.load_state_dict(json.loads(json.dumps(state)))
        rest = [batch for _ in range(2) if data.epoch < 2 for batch in data]
    assert_equal(rest, flat[cut : cut + len(rest)])
    assert len(rest) >= len(flat) - cut or data.epoch < 2


def test_read_that_draws_random_numbers_all_the_same(running_pool: keras_mp.WorkerPool) -> None:
    class Drawing(Numbers):
        def __call__(self, shard: int) -> Any:
            np.random.randint(1 << 30)
            for pair in super().__call__(shard):
                yield np.array([*pair, np.random.randint(1 << 30), random.getrandbits(30)])

    for shuffle in (0, 5):
        options: dict[str, Any] = {"read": Drawing(), "transform": None, "shuffle": shuffle}
        with stream(**options) as data:
            expected, state = [], data.state_dict()
            for batch in data:
                expected.append(batch)
                state = data.state_dict() if len(expected) == 9 else state
        with stream(**options, pool=running_pool) as data:
            assert_equal(list(data), expected)
        with stream(**options) as data:
            data.load_state_dict(state)
            assert_equal(list(data), expected[9:])


def test_two_at_once_and_looks_between(running_pool: keras_mp.WorkerPool, reference: list[Any]) -> None:
    with stream(pool=running_pool, length=TOTAL) as data:
        first, second = iter(data), iter(data)
        taken = [(next(first), next(second)) for _ in range(5)]
        np.testing.assert_array_equal(data[20], reference[20])
        np.testing.assert_array_equal(data[2], reference[2])
        taken += [(next(first), next(second)) for _ in range(5)]
        assert_equal([batch for batch, _ in taken], reference[:10])
        assert_equal([batch for _, batch in taken], reference[:10])


def test_an_empty_shard_costs_nothing_and_an_empty_stream_is_an_error() -> None:
    with stream(Numbers([0, 0, 0, 5, 0]), lanes=8) as data:
        assert set(pairs(list(data))) == all_pairs([0, 0, 0, 5])
    with stream(Numbers([0, 0])) as data, pytest.raises(keras_mp.KerasMPError, match="no samples"):
        list(data)


def test_state_is_of_the_size_of_the_lanes() -> None:
    with stream(lanes=4) as data, stream(Numbers(LENGTHS * 3), lanes=4) as longer:
        sizes = []
        for each in (data, longer):
            batches = iter(each)
            for _ in range(10):
                next(batches)
            sizes.append(len(json.dumps(each.state_dict())))
        assert abs(sizes[0] - sizes[1]) < 20
