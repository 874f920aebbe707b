"""Streams where something goes wrong: nothing is lost, nothing comes twice (P1, P2), and what fails is told (P5)."""

from __future__ import annotations

import os
import pathlib
import signal
import time
import warnings
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.shards import LENGTHS, TOTAL, Numbers, NumbersFrom, all_pairs, assert_equal, pairs, stream, with_noise

_TIMEOUT_S = 6.0  # enough to start with, also on a machine that has much else to do
_ON_RUNS: list[dict[str, Any]] = [{"workers": 0}, {"workers": 2, "use_multiprocessing": False}, {"workers": 2}]


@pytest.fixture(scope="module")
def reference() -> list[Any]:
    with stream() as data:
        return list(data)


class Noisy:
    """`with_noise`, with an accident at one sample, once or each time."""

    def __init__(self, what: str, flag: pathlib.Path | None = None) -> None:
        self.what, self.flag = what, flag

    def __call__(self, pair: Any, rng: np.random.Generator) -> Any:
        if tuple(pair) == (4, 7) and (self.flag is None or not self.flag.exists()):
            if self.flag is not None:
                self.flag.touch()
            if self.what == "fail":
                raise ValueError("no good")
            if self.what == "hang":
                time.sleep(600)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}[self.what])
        return with_noise(pair, rng)


@pytest.mark.parametrize("what", ["kill", "segv", "stop", "hang"])
def test_a_worker_that_ends_in_transform(what: str, tmp_path: pathlib.Path, reference: list[Any]) -> None:
    flag = tmp_path / "flag"
    with stream(workers=2, transform=Noisy(what, flag), timeout=_TIMEOUT_S if what == "hang" else None) as data:
        assert_equal(list(data), reference)
        assert data.stats().restarts >= 1
    assert flag.exists()


@pytest.mark.parametrize("place", [(4, 0, "kill"), (7, 17, "kill"), (9, 11, "kill"), (7, 17, "hang")])
def test_a_worker_that_ends_in_read(place: tuple[int, int, str], tmp_path: pathlib.Path, reference: list[Any]) -> None:
    flag = tmp_path / "flag"
    read = Numbers(accident=place, flag=flag)
    with stream(read, workers=2, timeout=_TIMEOUT_S if place[2] == "hang" else None) as data:
        assert_equal(list(data), reference)
        assert data.stats().restarts >= 1
    assert flag.exists()


@pytest.mark.parametrize("options", _ON_RUNS)
@pytest.mark.parametrize("on_error", ["skip", "replace"])
@pytest.mark.parametrize("shuffle", [0, 5])
def test_a_shard_that_fails_costs_its_rest_alone(options: dict[str, Any], on_error: str, shuffle: int) -> None:
    read = Numbers(accident=(7, 17, "fail"))
    with stream(read, on_error=on_error, shuffle=shuffle, **options) as data:
        for epoch in range(2):
            with pytest.warns(RuntimeWarning, match=f"1 sample failed in epoch {epoch}"):
                batches = list(data)
            assert sorted(pairs(batches)) == sorted(p for p in all_pairs() if p[0] != 7 or p[1] < 17)
            assert [len(batch) for batch in batches].count(4) >= len(batches) - 1
        (failure, _) = data.failures
        assert (failure.stage, failure.index, failure.offset, failure.type) == ("read", 7, 17, "OSError")
        assert "sample 17 of shard 7 (7)" in failure.describe()


@pytest.mark.parametrize("options", _ON_RUNS)
@pytest.mark.parametrize("length", [None, TOTAL])
def test_a_failure_at_the_very_end_is_told_too(options: dict[str, Any], length: int | None) -> None:
    read = Numbers(accident=(9, LENGTHS[9], "fail"))
    with stream(read, on_error="skip", length=length, **options) as data:
        with pytest.warns(RuntimeWarning, match="1 (of 102 samples|sample) failed in epoch 0"):
            assert set(pairs(list(data))) == all_pairs()
    with stream(read, length=length, **options) as data, pytest.raises(OSError, match="damaged"):
        list(data)


def test_where_a_shard_fails_the_declared_number_of_batches_comes_all_the_same() -> None:
    read = Numbers(accident=(7, 2, "fail"))
    with stream(read, on_error="skip", length=TOTAL) as data:
        with pytest.warns(RuntimeWarning, match="failed in epoch 0"):
            batches = list(data)
    assert len(batches) == len(reference_of_all())
    found = pairs(batches)
    assert set(found) == {pair for pair in all_pairs() if pair[0] != 7 or pair[1] < 2}
    again = [pair for pair in set(found) if found.count(pair) > 1]
    assert again
    noise = [int(row[2]) for batch in batches for row in batch]
    assert len(set(noise)) == len(noise)  # what comes again draws other random numbers


def reference_of_all() -> list[Any]:
    with stream(length=TOTAL) as data:
        return list(data)


@pytest.mark.parametrize("options", _ON_RUNS)
def test_a_shard_that_fails_raises(options: dict[str, Any]) -> None:
    with stream(Numbers(accident=(7, 17, "fail")), **options) as data:
        with pytest.raises(OSError, match=r"read failed on sample 17 of shard 7 \(7\), batch \d+ of epoch 0"):
            list(data)


@pytest.mark.parametrize("options", _ON_RUNS)
def test_a_shard_is_opened_again_where_it_failed(options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    class Flaky(Numbers):
        def suffer(self, shard: int, offset: int) -> None:
            if (shard, offset) == (7, 17) and not (tmp_path / "failed").exists():
                (tmp_path / "failed").touch()
                raise OSError("try again")

    with stream(Flaky(), retries=1, **options) as data:
        assert set(pairs(list(data))) == all_pairs()
    assert (tmp_path / "failed").exists()


@pytest.mark.parametrize("options", _ON_RUNS)
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_a_sample_that_fails(options: dict[str, Any], on_error: str, reference: list[Any]) -> None:
    with stream(transform=Noisy("fail"), on_error=on_error, batch_transform=None, **options) as data:
        with pytest.warns(RuntimeWarning, match="1 sample failed"):
            batches = list(data)
        (failure,) = data.failures
    found = pairs(batches)
    assert (4, 7) not in found
    assert set(found) == all_pairs() - {(4, 7)}
    assert len(found) == TOTAL - (on_error == "skip")
    assert (failure.stage, failure.index, failure.offset, failure.item) == ("transform", 4, 7, "4")
    assert (4, 7) in pairs([reference[failure.batch]])
    assert (failure.replaced_by is not None) == (on_error == "replace")


def test_a_sample_that_ends_its_workers_is_left_out() -> None:
    with stream(transform=Noisy("kill"), on_error="skip", workers=2) as data:
        with pytest.warns(RuntimeWarning, match="1 sample failed"):
            batches = list(data)
        (failure,) = data.failures
    assert set(pairs(batches)) == all_pairs() - {(4, 7)}
    assert (failure.type, failure.index, failure.offset) == ("WorkerCrashed", 4, 7)


@pytest.mark.parametrize("options", _ON_RUNS)
def test_a_batch_without_a_good_sample_is_made_of_the_first_of_its_lane(options: dict[str, Any]) -> None:
    def picky(pair: Any) -> Any:
        if pair[1] >= 8:
            raise ValueError("no good")
        return pair

    with stream(
        Numbers([24]), transform=picky, lanes=1, shuffle=0, on_error="skip", batch_transform=None, **options
    ) as data:
        with pytest.warns(RuntimeWarning, match="16 samples failed"):
            batches = list(data)
    assert [len(batch) for batch in batches] == [4, 4, 1, 1, 1, 1]
    assert {offset for _, offset in pairs(batches)} == set(range(8))


def test_too_many_failures() -> None:
    read = Numbers(accident=(7, 2, "fail"))
    with pytest.warns(RuntimeWarning, match="1 sample failed"):
        with stream(read, on_error="skip", max_failures=0) as data, pytest.raises(keras_mp.TooManyFailures):
            list(data)


def test_an_error_can_be_passed_over(reference: list[Any]) -> None:
    with stream(transform=Noisy("fail"), length=TOTAL) as data:
        failed = 0
        for number in range(len(data)):
            try:
                np.testing.assert_array_equal(data[number], reference[number])
            except ValueError:
                failed += 1
        assert failed == 1


def test_a_lane_is_opened_once_where_its_worker_lives(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "opened"
    lengths = [12] * 24
    with stream(Numbers(lengths, log), lanes=6, workers=2) as data:
        assert set(pairs(list(data))) == all_pairs(lengths)
    opened = log.read_text().split()
    assert set(opened) == {str(shard) for shard in range(24)}
    assert len(opened) <= 24 + 12  # a lane moves now and then to a worker that has nothing to do


def test_read_may_begin_in_the_middle(tmp_path: pathlib.Path, reference: list[Any]) -> None:
    log = tmp_path / "opened"
    with stream(NumbersFrom()) as data:
        batches = iter(data)
        for _ in range(15):
            next(batches)
        state = data.state_dict()
    with stream(NumbersFrom(log=log)) as data:
        data.load_state_dict(state)
        assert_equal(list(data), reference[15:])
    starts = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert any(starts)


def test_a_shard_that_has_become_shorter_is_an_error() -> None:
    with stream(Numbers([40]), lanes=1) as data:
        next(iter(data))
        batches = iter(data)
        for _ in range(8):
            next(batches)
        state = data.state_dict()
    with stream(Numbers([20]), lanes=1) as data:
        data.load_state_dict(state)
        with pytest.raises(RuntimeError, match="ended after 20 samples, but gave 30 before"):
            list(data)


def test_generators_are_closed(tmp_path: pathlib.Path) -> None:
    closed = []

    def read(shard: int) -> Any:
        try:
            for offset in range(50):
                yield np.array([shard, offset])
        finally:
            closed.append(shard)

    with keras_mp.StreamDataset(range(4), read, lanes=4, batch_size=2, workers=0) as data:
        batches = iter(data)
        for _ in range(8):
            next(batches)
        assert not closed
        del batches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del data
    assert sorted(closed) == [0, 1, 2, 3]
