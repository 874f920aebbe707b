"""Reading ahead: a window that slides along a sequence of requests."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mp
from keras_mp.engines.readahead import Limit, ReadAhead
from keras_mp.loading.base import Loaded, Loader
from keras_mp.plan.request import Request

Key = tuple[int, int]


class _Engine:
    """Records what is asked of it."""

    bundle_size = 1
    batch_bytes: int | None = None

    def __init__(self) -> None:
        self.submitted: list[Key] = []
        self.cancelled: list[Key] = []
        self.pending: list[Key] = []

    def submit(self, requests: Sequence[Request]) -> list[list[Key]]:
        keys = [(request.epoch, request.batch) for request in requests]
        self.submitted += keys
        self.pending += keys
        return [[key] for key in keys]

    def is_ready(self, handle: list[Key]) -> bool:
        return True

    def result(self, handle: list[Key]) -> Loaded:
        key = handle.pop()  # fails if a handle is used twice
        self.pending.remove(key)
        return Loaded(key, ())

    def cancel(self, handle: list[Key]) -> None:
        key = handle.pop()
        self.pending.remove(key)
        self.cancelled.append(key)

    def update(self, loader: Loader) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        raise NotImplementedError


def _limit(batches: int) -> Limit:
    return Limit(batches, batches, 1 << 30)


def _requests(*batches: int) -> Iterator[Request]:
    return (Request(0, batch, [batch]) for batch in batches)


def _keys(*batches: int) -> list[Key]:
    return [(0, batch) for batch in batches]


def test_reads_ahead_up_to_the_depth() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _requests(*range(10)), _limit(3))
    assert engine.submitted == []
    ahead.start()
    assert engine.submitted == _keys(0, 1, 2)
    assert ahead.is_ready()
    for batch in range(10):
        assert ahead.next().batch == (0, batch)
        assert len(engine.pending) <= 3
    assert engine.submitted == _keys(*range(10))
    assert not engine.cancelled
    assert not ahead.is_ready()


def test_small_batches_are_requested_several_at_a_time() -> None:
    engine = _Engine()
    engine.bundle_size = 4
    ahead = ReadAhead(engine, _requests(*range(100)), _limit(10))
    ahead.start()
    pending = [10]
    for _ in range(60):
        ahead.next()
        pending.append(len(engine.pending))
    assert pending[:9] == [10, 9, 8, 7, 10, 9, 8, 7, 10]
    assert min(pending) == 7


def test_more_may_be_in_flight_of_those_that_travel_together() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _requests(*range(100)), Limit(10, 10, 1 << 30, bundles=4))
    ahead.start()
    assert len(engine.pending) == 10
    engine.bundle_size, engine.batch_bytes = 8, 1 << 10  # as it turns out
    pending = []
    for _ in range(60):
        ahead.next()
        pending.append(len(engine.pending))
    assert max(pending) == 32
    assert min(pending[3:]) == 25


def test_depth_0_reads_nothing_ahead() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _requests(*range(10)), _limit(0))
    ahead.start()
    assert not engine.submitted
    assert ahead.next().batch == (0, 0)
    assert engine.submitted == _keys(0)


def test_an_endless_sequence_is_read_as_far_as_needed() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, (Request(0, batch, [batch]) for batch in itertools.count()), _limit(2))
    assert ahead.next().batch == (0, 0)
    assert engine.pending == _keys(1, 2)


def test_what_has_been_requested_is_requested_anew() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _requests(*range(6)), _limit(3))
    ahead.next()
    ahead.renew()
    assert engine.cancelled == _keys(1, 2, 3)
    assert engine.pending == _keys(1, 2, 3)
    assert [ahead.next().batch for _ in range(5)] == _keys(1, 2, 3, 4, 5)


def test_close_cancels_everything_and_lets_go_of_the_engine() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _requests(*range(20)), _limit(4))
    ahead.next()
    alive = weakref.ref(engine)
    ahead.close()
    ahead.close()
    assert not engine.pending
    with pytest.raises(keras_mp.PoolClosed):
        ahead.next()
    del engine
    assert alive() is None


@given(st.integers(0, 5), st.integers(1, 6), st.lists(st.sampled_from(["next", "renew"]), max_size=25))
def test_whatever_is_renewed_each_batch_comes_once_in_order(depth: int, bundle: int, steps: list[str]) -> None:  # P1
    engine = _Engine()
    engine.bundle_size = bundle
    ahead = ReadAhead(engine, _requests(*range(25)), _limit(depth))
    ahead.start()
    served = []
    for step in steps:
        if step == "renew":
            ahead.renew()
        else:
            served.append(ahead.next().batch)
        assert len(engine.pending) <= depth
    assert served == _keys(*range(len(served)))
    ahead.close()
    assert not engine.pending
