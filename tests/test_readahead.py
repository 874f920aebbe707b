"""Reading ahead: a right guess saves time, a wrong one costs time and nothing else (P1, P2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keras_mp.loading import Loaded, Loader, Request
from keras_mp.readahead import Key, ReadAhead


class _Engine:
    """Records what is asked of it."""

    bundle_size = 1

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


def _request(epoch: int, batch: int) -> Request:
    return Request(epoch, batch, [batch])


def _plan(*batches: int, epoch: int = 0) -> Iterator[Key]:
    return iter([(epoch, batch) for batch in batches])


def test_reads_ahead_along_the_plan_up_to_the_depth() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 3, _plan(*range(10)))
    ahead._fill()
    assert engine.submitted == [(0, 0), (0, 1), (0, 2)]
    for batch in range(10):
        assert ahead.get((0, batch)).batch == (0, batch)
        assert len(engine.pending) <= 3
    assert engine.submitted == [(0, batch) for batch in range(10)]
    assert not engine.cancelled


def test_what_is_expected_is_requested_once() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 3)
    ahead.expect(_plan(2, 0, 1, 3))
    assert engine.submitted == [(0, 2), (0, 0), (0, 1)]
    assert ahead.get((0, 2), _plan(0, 1, 3)).batch == (0, 2)
    assert ahead.is_ready((0, 0))
    assert not ahead.is_ready((0, 4))
    for batch in (0, 1, 3):
        assert ahead.get((0, batch)).batch == (0, batch)
    assert sorted(engine.submitted) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert not engine.cancelled


def test_small_batches_are_requested_several_at_a_time() -> None:
    engine = _Engine()
    engine.bundle_size = 4
    ahead = ReadAhead(engine, _request, 10, _plan(*range(100)))
    ahead._fill()
    pending = [10]
    for batch in range(60):
        ahead.get((0, batch))
        pending.append(len(engine.pending))
    assert pending[:9] == [10, 9, 8, 7, 10, 9, 8, 7, 10]
    assert min(pending) == 7


def test_depth_0_reads_nothing_ahead() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 0, _plan(*range(10)))
    assert ahead.get((0, 5)).batch == (0, 5)
    assert engine.submitted == [(0, 5)]


def test_an_endless_plan_is_read_as_far_as_needed() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 2, ((epoch, 0) for epoch in itertools.count()))
    assert ahead.get((0, 0)).batch == (0, 0)
    assert engine.pending == [(1, 0), (2, 0)]


def test_no_batch_of_the_plan_is_requested_twice() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 3, _plan(*range(5)))
    for batch in range(5):
        ahead.get((0, batch))
    assert engine.submitted == [(0, batch) for batch in range(5)]
    assert not engine.pending


def test_a_new_plan_uses_what_was_requested_along_the_old_one() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 3)
    ahead.get((0, 0), _plan(1, 2, 3, 4))
    ahead.get((0, 3), _plan(2, 1, 0))
    assert engine.submitted == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 0)]
    assert [ahead.get((0, batch)).batch for batch in (2, 1, 0)] == [(0, 2), (0, 1), (0, 0)]
    assert engine.submitted == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 0)]


def test_what_two_plans_ago_was_requested_is_cancelled() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 2)
    ahead.get((0, 0), _plan(1, 2))
    ahead.get((0, 5), _plan(6, 7))
    ahead.get((0, 8), _plan(9))
    assert sorted(engine.cancelled) == [(0, 1), (0, 2)]


def test_drop_cancels_everything_and_forgets_the_plan() -> None:
    engine = _Engine()
    ahead = ReadAhead(engine, _request, 4, _plan(*range(20)))
    ahead.get((0, 0))
    ahead.get((0, 9), _plan(10, 11))
    ahead.drop()
    assert not engine.pending
    before = len(engine.submitted)
    ahead._fill()
    assert len(engine.submitted) == before
    assert ahead.get((1, 0)).batch == (1, 0)


@given(
    st.integers(0, 5),
    st.lists(
        st.one_of(
            st.tuples(st.just("get"), st.integers(0, 6), st.none() | st.lists(st.integers(0, 6), max_size=8)),
            st.tuples(st.just("drop"), st.just(0), st.none()),
        ),
        max_size=25,
    ),
)
def test_whatever_the_plan_each_batch_is_the_one_asked_for(
    depth: int, steps: list[tuple[str, int, list[int] | None]]
) -> None:  # P1
    engine = _Engine()
    ahead = ReadAhead(engine, _request, depth)
    for step, batch, plan in steps:
        if step == "drop":
            ahead.drop()
            assert not engine.pending
        else:
            assert ahead.get((0, batch), None if plan is None else _plan(*plan)).batch == (0, batch)
            assert len(engine.pending) <= 2 * depth  # those of the plan, and those of the plan before it
    ahead.drop()
    assert not engine.pending
