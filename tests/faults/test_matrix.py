"""Every kind of harm at every moment of a batch's life, once and always (P2, P3, P4).

Harm that ends or stops a worker once costs a second run of one batch and changes nothing; harm that comes back on that
batch is an error that names batch, sample, process and cause. What raises is told at once.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

import keras_mp
from keras_mp.workers import handle, starts
from tests.census import eventually
from tests.faults import harm as harms
from tests.faults.common import digests, harmed, undisturbed
from tests.faults.harm import ALWAYS, Harm

_MOMENTS = ["unpickle", "load", "write", "reply"]
_ENDINGS = {"exit": "exit code 3", "SIGSEGV": "signal SIGSEGV", "SIGKILL": "signal SIGKILL"}
_STALLS = ["SIGSTOP", "hang"]
_RAISES = ["raise", "memory"]
_TIMEOUT_S = 2.0
_AT = {
    "unpickle": "before its first sample",
    "load": "at sample 13",
    "write": "after its last sample",
    "reply": "after its last sample",
}


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "_STOPPED_GRACE_S", 0.5)


def _timeout_s(kind: str) -> float | None:
    return _TIMEOUT_S if kind == "hang" else None  # a stopped worker is found without one


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("kind", [*_ENDINGS, *_STALLS])
def test_once_changes_nothing(kind: str, moment: str, tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harm = Harm(kind, tmp_path)
    with harmed(moment, harm, pool=pool, timeout=_timeout_s(kind)) as dataset:
        assert digests(dataset) == undisturbed(moment)
        stats = dataset.stats()
    assert harm.struck == 1
    assert stats["restarts"] >= 1
    assert harm.victims[0] not in stats["pids"]


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("kind", _ENDINGS)
def test_a_batch_that_ends_every_worker_is_named(
    kind: str, moment: str, tmp_path: Path, pool: keras_mp.WorkerPool
) -> None:
    harm = Harm(kind, tmp_path, ALWAYS)
    with harmed(moment, harm, pool=pool) as dataset, pytest.raises(keras_mp.WorkerCrashed) as caught:
        digests(dataset)
    text = str(caught.value)
    assert ("batch 0" if moment == "unpickle" else "batch 3 of epoch 0") in text
    blamed = [int(pid) for pid in re.findall(rf"process (\d+) ended with {_ENDINGS[kind]}, {_AT[moment]}", text)]
    assert len(blamed) >= 2
    assert set(blamed) <= set(harm.victims)
    assert len(blamed) == 2 or moment == "unpickle"


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("kind", _STALLS)
def test_a_batch_that_stalls_every_worker_is_named(
    kind: str, moment: str, tmp_path: Path, pool: keras_mp.WorkerPool
) -> None:
    harm = Harm(kind, tmp_path, ALWAYS)
    timeout_s = _timeout_s(kind)
    with harmed(moment, harm, pool=pool, timeout=timeout_s) as dataset, pytest.raises(keras_mp.BatchTimeout) as caught:
        digests(dataset)
    text = str(caught.value)
    how = r"stood stopped \(SIGSTOP\) for 0.5 s" if timeout_s is None else "took longer than timeout=2 s"
    assert ("batch 0" if moment == "unpickle" else "batch 3 of epoch 0") in text
    assert len(re.findall(rf"process \d+ {how}, {_AT[moment]}", text)) >= 2


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("kind", _RAISES)
def test_what_raises_is_told(kind: str, moment: str, tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harm = Harm(kind, tmp_path, ALWAYS)
    with harmed(moment, harm, pool=pool) as dataset:
        with pytest.raises(keras_mp.KerasMPError) as caught:
            digests(dataset)
        text = str(caught.value)
        assert ("batch 0 of epoch 0" if moment == "unpickle" else "batch 3 of epoch 0") in text
        assert re.search(r"Traceback from (the worker|process \d+)", text)
        assert ("HarmError: harm in a worker" if kind == "raise" else "Unable to allocate") in text
        if moment == "load":
            assert "sample 13" in text
        if moment != "unpickle":
            assert isinstance(caught.value, keras_mp.SampleError)
        if kind == "memory" and moment != "unpickle":
            assert isinstance(caught.value, MemoryError)
        assert dataset.stats()["restarts"] == 0


@pytest.mark.parametrize("kind", _RAISES)
def test_what_raises_once_is_tried_again(kind: str, tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harm = Harm(kind, tmp_path)
    with harmed("load", harm, pool=pool, retries=1) as dataset:
        assert digests(dataset) == undisturbed()
    assert harm.struck == 1


# -- what cannot be pickled ------------------------------------------------------------------------------------------


def _never_sent(value: object) -> object:
    return value


def test_a_transform_that_cannot_be_pickled() -> None:
    rows = (row for row in range(2))
    with pytest.raises(
        keras_mp.KerasMPError, match=r"transform cannot be sent to worker processes: .*generator"
    ) as caught:
        keras_mp.PoolDataset([1, 2], lambda value: (rows, value))
    assert "workers=0" in str(caught.value)


def test_a_source_that_cannot_be_pickled(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset([iter([1]), iter([2])], pool=pool) as _:
        pass
    dataset = keras_mp.PoolDataset([(value for value in range(2))], _never_sent, pool=pool)
    with dataset, pytest.raises(keras_mp.KerasMPError, match=r"source cannot be sent to worker processes: .*generator"):
        dataset[0]


def test_a_batch_that_cannot_be_pickled(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(harms.Source(), collate=harms.generator_collate, batch_size=2, pool=pool) as dataset:
        with pytest.raises(keras_mp.SampleError, match=r"result failed on batch 5 of epoch 0: .*pickle") as caught:
            dataset[5]
        assert isinstance(caught.value, TypeError)
        assert dataset.stats()["restarts"] == 0


class _OnlyThere:
    """Can be pickled, but not unpickled here."""

    def __reduce__(self) -> tuple[object, ...]:
        return _fail_in_parent, (os.getpid(),)


def _fail_in_parent(pid: int) -> None:
    if pid != os.getpid():
        raise ModuleNotFoundError("a module that only workers have")


def _collate_only_there(rows: list[object]) -> object:
    return _OnlyThere()


def test_a_batch_that_cannot_be_unpickled_here(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(harms.Source(), collate=_collate_only_there, batch_size=2, pool=pool) as dataset:
        with pytest.raises(keras_mp.KerasMPError, match=r"batch 1 of epoch 0 .* cannot be unpickled here") as caught:
            dataset[1]
    assert "a module that only workers have" in str(caught.value)


# -- start -----------------------------------------------------------------------------------------------------------


def _pool_with(code: str, folder: Path, workers: int = 1) -> keras_mp.WorkerPool:
    """A pool whose workers run `code` while their interpreter starts."""
    (folder / "sitecustomize.py").write_text(code)
    return keras_mp.WorkerPool(workers, env={"PYTHONPATH": str(folder)})


def _striking(harm: Harm) -> str:
    return (
        "from pathlib import Path\nfrom tests.faults.harm import Harm\n"
        f"Harm({harm.kind!r}, Path({str(harm.folder)!r}), {harm.times}).strike()\n"
    )


@pytest.mark.parametrize("kind", ["SIGSEGV", "SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("times", [1, 2])
def test_workers_that_die_while_starting_are_replaced(kind: str, times: int, tmp_path: Path) -> None:
    harm = Harm(kind, tmp_path, times)
    with _pool_with(_striking(harm), tmp_path) as pool, harmed("load", None, pool=pool) as dataset:
        assert digests(dataset) == undisturbed()
    assert harm.struck == times


@pytest.mark.parametrize(
    ("kind", "how"),
    [("exit", "exit code 3"), ("SIGSEGV", "signal SIGSEGV"), ("SIGKILL", "signal SIGKILL"), ("hang", "not ready")],
)
def test_workers_that_cannot_start_are_an_error(
    kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "_PATIENCE_S", 1.0)
    if kind == "hang":
        monkeypatch.setattr(handle, "_START_TIMEOUT_S", 1.0)
    code = f"import sys\nprint('here it goes', file=sys.stderr, flush=True)\n{_striking(Harm(kind, tmp_path, ALWAYS))}"
    with _pool_with(code, tmp_path, workers=2) as pool, harmed("load", None, pool=pool) as dataset:
        with pytest.raises(keras_mp.WorkerCrashed, match="a worker process could not start") as caught:
            digests(dataset)
        assert how in str(caught.value)
        assert "here it goes" in str(caught.value)


def test_a_broken_import_is_an_error_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "cloudpickle.py").write_text("raise ImportError('this cloudpickle is broken')\n")
    with keras_mp.WorkerPool(2, env={"PYTHONPATH": str(tmp_path)}) as pool, harmed("load", None, pool=pool) as dataset:
        with pytest.raises(keras_mp.WorkerCrashed, match=r"exit code 1(.|\n)*this cloudpickle is broken"):
            digests(dataset)
        (tmp_path / "cloudpickle.py").unlink()  # a later request tries afresh
        assert digests(dataset) == undisturbed()


@pytest.mark.parametrize("interpreter", ["/bin/false", "/nowhere/python"])
def test_a_wrong_interpreter_is_an_error(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with keras_mp.WorkerPool(2) as pool, harmed("load", None, pool=pool) as dataset:
        with monkeypatch.context() as patch:
            patch.setattr("sys.executable", interpreter)
            with pytest.raises(keras_mp.WorkerCrashed, match=r"could (not start|be started)"):
                digests(dataset)
        assert digests(dataset) == undisturbed()


def test_what_a_starting_worker_says_reaches_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys\nprint('a word from sitecustomize', file=sys.stderr)\n"
    with _pool_with(code, tmp_path) as pool, harmed("load", None, pool=pool) as dataset:
        assert digests(dataset) == undisturbed()
    assert "a word from sitecustomize" in capfd.readouterr().err


def test_one_worker_that_cannot_start_leaves_the_work_to_the_others(tmp_path: Path) -> None:
    harm = Harm("exit", tmp_path)
    with _pool_with(_striking(harm), tmp_path, workers=2) as pool, harmed("load", None, pool=pool) as dataset:
        assert digests(dataset) == undisturbed()
    assert harm.struck == 1


# -- idle ------------------------------------------------------------------------------------------------------------


def _wait_until_idle(dataset: keras_mp.PoolDataset) -> list[int]:
    assert eventually(lambda: dataset.stats()["running"] == 0)
    pids: list[int] = dataset.stats()["pids"]
    return pids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGSTOP])
def test_idle_workers_may_die(number: signal.Signals, pool: keras_mp.WorkerPool) -> None:
    with harmed("load", None, pool=pool) as dataset:
        got = digests(dataset)
        victims = _wait_until_idle(dataset)
        for pid in victims:
            os.kill(pid, number)
        got += digests(dataset)
        assert got == undisturbed(epochs=2)
        assert not set(victims) & set(dataset.stats()["pids"])


def test_interrupts_are_the_parents_alone(pool: keras_mp.WorkerPool) -> None:
    with harmed("load", None, pool=pool) as dataset:
        got = digests(dataset)
        victims = _wait_until_idle(dataset)
        for pid in victims:
            os.kill(pid, signal.SIGINT)
        assert got + digests(dataset) == undisturbed(epochs=2)
        assert set(victims) == set(dataset.stats()["pids"])
