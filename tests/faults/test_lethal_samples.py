"""Under `skip` and `replace`, a sample that ends its workers, or that takes too long, is a failed sample (P3, P5)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import keras_mp
from tests.faults.harm import ALWAYS, Harm

pytestmark = pytest.mark.filterwarnings("ignore:keras_mp. .* samples failed:RuntimeWarning")

_TIMEOUT_S = 2.0
_HOW = {
    "exit": ("WorkerCrashed", "exit code 3"),
    "SIGSEGV": ("WorkerCrashed", "signal SIGSEGV"),
    "SIGKILL": ("WorkerCrashed", "signal SIGKILL"),
    "hang": ("BatchTimeout", "took longer than timeout=2 s"),
}


class _Decode:
    """Harm for some of the samples."""

    def __init__(self, harms: dict[int, Harm]) -> None:
        self.harms = harms

    def __call__(self, name: str) -> int:
        number = int(name.removeprefix("tile-"))
        if number in self.harms:
            self.harms[number].strike()
        return number


def _harms(folder: Path, kinds: dict[int, str], times: int = ALWAYS) -> dict[int, Harm]:
    made = {}
    for number, kind in kinds.items():
        (folder / str(number)).mkdir()
        made[number] = Harm(kind, folder / str(number), times)
    return made


def _tiles(harms: dict[int, Harm], **options: Any) -> keras_mp.PoolDataset:
    names = [f"tile-{number}" for number in range(16)]
    return keras_mp.PoolDataset(names, _Decode(harms), **{"batch_size": 4, "timeout": _TIMEOUT_S, **options})


@pytest.mark.parametrize("kind", _HOW)
def test_a_sample_that_ends_two_workers_is_left_out(kind: str, tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harms = _harms(tmp_path, {6: kind})
    with _tiles(harms, on_error="skip", pool=pool) as dataset:
        got = [batch.tolist() for batch in dataset]
        assert got == [[0, 1, 2, 3], [4, 5, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
        (failure,) = dataset.failures
    kind_of_failure, words = _HOW[kind]
    assert (failure.index, failure.batch, failure.epoch, failure.type) == (6, 1, 0, kind_of_failure)
    assert (failure.stage, failure.item) == ("transform", "'tile-6'")
    assert failure.message.count(words) == 2
    assert "sample 6 ('tile-6'), batch 1 of epoch 0" in failure.describe()
    assert harms[6].struck == 2


def test_each_of_several_in_a_batch_has_two_tries(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harms = _harms(tmp_path, {4: "SIGSEGV", 6: "hang", 7: "exit"})
    with _tiles(harms, on_error="replace", pool=pool) as dataset:
        assert [batch.tolist() for batch in dataset][1] == [5, 5, 5, 5]
        assert {failure.index: failure.type for failure in dataset.failures} == {
            4: "WorkerCrashed",
            6: "BatchTimeout",
            7: "WorkerCrashed",
        }
    assert [harm.struck for harm in harms.values()] == [2, 2, 2]


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_a_batch_of_nothing_else_is_made_of_others(policy: str, tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    """Also where a sample that is served in its place is no better."""
    harms = _harms(tmp_path, dict.fromkeys((2, 3, 5, 6, 7), "exit"))
    with _tiles(harms, on_error=policy, batch_size=1, pool=pool) as dataset:
        got = [batch.tolist() for batch in dataset]
        assert [len(batch) for batch in got] == [1] * 16
        assert all(batch == [i] or i in harms for i, batch in enumerate(got))
        assert not {value for batch in got for value in batch} & set(harms)
        assert {failure.index for failure in dataset.failures} == set(harms)


def test_one_death_is_no_failure(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harms = _harms(tmp_path, {4: "SIGKILL", 6: "exit", 7: "SIGSEGV"}, times=1)
    with _tiles(harms, on_error="skip", pool=pool) as dataset:
        assert [value for batch in dataset for value in batch.tolist()] == list(range(16))
        assert not dataset.failures


def test_too_many_of_them_end_the_run(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harms = _harms(tmp_path, {4: "exit", 9: "exit"})
    with _tiles(harms, on_error="skip", max_failures=1, pool=pool) as dataset:
        with pytest.raises(keras_mp.TooManyFailures, match=r"2 of 16 samples have failed(.|\n)*exit code 3"):
            list(dataset)


@pytest.mark.parametrize("kind", ["SIGSEGV", "hang"])
def test_raise_ends_the_run(kind: str, tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    errors = {"SIGSEGV": keras_mp.WorkerCrashed, "hang": keras_mp.BatchTimeout}
    with _tiles(_harms(tmp_path, {6: kind}), pool=pool) as dataset:
        with pytest.raises(errors[kind], match=r"batch 1 of epoch 0 .* at sample 6"):
            list(dataset)


def test_a_batch_that_dies_when_its_samples_are_done_ends_the_run(pool: keras_mp.WorkerPool) -> None:
    """No sample is to blame."""

    def collate(values: list[int]) -> list[int]:
        if 6 in values:
            os.kill(os.getpid(), signal.SIGKILL)
        return values

    with keras_mp.PoolDataset(range(16), collate=collate, batch_size=4, on_error="skip", pool=pool) as dataset:
        with pytest.raises(keras_mp.WorkerCrashed, match=r"batch 1 of epoch 0 .* after its last sample"):
            list(dataset)


def test_a_batch_that_is_slow_as_a_whole_ends_the_run(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    """None of its samples is slower than others: to leave one out would be of no use."""

    def wait_a_little(value: int) -> int:
        if value >= 256:
            signal.sigtimedwait([], 0.05)
        return value

    options: dict[str, Any] = {"batch_size": 128, "on_error": "skip", "timeout": _TIMEOUT_S, "pool": pool}
    with keras_mp.PoolDataset(range(384), wait_a_little, **options) as dataset:
        with pytest.raises(keras_mp.BatchTimeout, match="batch 2 of epoch 0 took too long"):
            list(dataset)
        assert not dataset.failures
