"""What models really consume in `fit`, on every backend: each sample once an epoch (P1), epoch e as documented (P2)."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import python_path

pytestmark = pytest.mark.timeout(600)

_SCRIPT = Path(__file__).parent / "scripts" / "consumed.py"
_KINDS = ("in-process", "threads", "processes", "five")

Steps = list[list[int]]


@pytest.fixture(scope="module", params=["tensorflow", "jax", "torch"])
def consumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script says, which runs once for all of pytest's own processes: the others wait for the first."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / f"consumed-{request.param}.json", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        records = file.read()
        if not records:
            records = _consumed(request.param)
            file.write(records)
    said: dict[str, Any] = json.loads(records)
    return said


def _consumed(backend: str) -> str:
    done = subprocess.run(
        [sys.executable, _SCRIPT, backend],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=290,  # 25 s on a quiet machine
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def whole(epoch: Steps) -> bool:
    return sorted(sample for step in epoch for sample in step) == list(range(22))


@pytest.mark.parametrize("kind", _KINDS)
def test_fit_consumes_each_epoch_whole(consumed: dict[str, Any], kind: str) -> None:
    reference: list[Steps] = consumed["reference"]["epochs"]
    assert all(whole(epoch) for epoch in reference)
    assert reference[0] != reference[1]
    for name, numbers in {
        "default": [0, 1, 2],
        "unshuffled": [0, 1, 2],
        "exact": [0, 1],
        "long": [0, 1],
        "late": [0, 1],
        "validated": [0, 1],
        "itself": [0, 2],  # epoch 1 was the validation in between
        "tested": [0, 2],
        "nosy": [0, 1, 2],
    }.items():
        (fit,) = consumed[f"{kind}/{name}"]["fits"]
        assert fit == [reference[number] for number in numbers], name
        assert consumed[f"{kind}/{name}"]["epoch"] == numbers[-1] + (2 if name in ("itself", "tested") else 1)


@pytest.mark.parametrize("kind", _KINDS)
def test_batches_that_a_callback_picks_come_once_all_the_same(consumed: dict[str, Any], kind: str) -> None:
    reference: list[Steps] = consumed["reference"]["epochs"]
    (fit,) = consumed[f"{kind}/picked"]["fits"]
    assert [sorted(epoch) for epoch in fit] == [sorted(epoch) for epoch in reference[:3]]
    (fit,) = consumed[f"{kind}/picked-short"]["fits"]  # passes of 5 + 1 steps
    assert [len(epoch) for epoch in fit] == [5, 1, 5, 1]
    assert [sorted(fit[0] + fit[1]), sorted(fit[2] + fit[3])] == [sorted(epoch) for epoch in reference[:2]]


def test_a_second_pass_in_the_middle_of_one_is_refused(consumed: dict[str, Any]) -> None:
    for name, text in consumed["refused"].items():
        assert text.startswith("RuntimeError: fit() is in the middle of a pass over this dataset"), name
        assert "Make a second dataset" in text


def test_unshuffled_fit_keeps_the_order(consumed: dict[str, Any]) -> None:
    (fit,) = consumed["processes/unshuffled"]["fits"]
    assert fit == consumed["reference"]["epochs"][:3]


def test_where_only_keras_shuffles_each_epoch_has_an_order_of_its_own(consumed: dict[str, Any]) -> None:
    batches = consumed["plain/unshuffled"]["fits"][0][0]
    assert batches == [list(range(start, min(start + 4, 22))) for start in range(0, 22, 4)]
    assert consumed["plain/unshuffled"]["fits"][0] == [batches] * 3
    (fit,) = consumed["plain/default"]["fits"]
    assert [sorted(epoch) for epoch in fit] == [batches] * 3
    assert fit[0] != fit[1] != fit[2] != fit[0]
    assert consumed["plain/nosy"]["fits"] == [fit]
    first, *others = consumed["plain/seeds"]["fits"]
    assert others == [first] * 9  # whatever Keras draws
    (picked,) = consumed["plain/picked"]["fits"]
    assert [sorted(epoch) for epoch in picked] == [batches] * 3
    (short,) = consumed["plain/short"]["fits"]
    assert sorted(short[0] + short[1] + short[2]) == batches
    assert all(step in batches for step in short[3])


@pytest.mark.parametrize("kind", _KINDS)
def test_steps_per_epoch_below_the_length_goes_on_where_it_stopped(consumed: dict[str, Any], kind: str) -> None:
    (fit,) = consumed[f"{kind}/short"]["fits"]
    reference: list[Steps] = consumed["reference"]["epochs"]
    assert [len(epoch) for epoch in fit] == [2, 2, 2, 2]
    steps = [step for epoch in fit for step in epoch]
    assert steps == [*reference[0], *reference[1][:2]]
    (fit,) = consumed[f"{kind}/nosy-short"]["fits"]
    assert [step for epoch in fit for step in epoch] == [*reference[0], *reference[1]]


def test_a_second_fit_goes_on_with_the_next_epoch(consumed: dict[str, Any]) -> None:
    reference: list[Steps] = consumed["reference"]["epochs"]
    first, second = consumed["processes/twice"]["fits"]
    assert first + second == reference[:6]
    assert consumed["processes/twice"]["epoch"] == 6


def test_keras_own_pool_gives_the_same_epochs(consumed: dict[str, Any]) -> None:
    if "keras/unshuffled" not in consumed:
        pytest.skip("Keras's own queue mixes passes on this backend; docs/epochs.md says so")
    reference = consumed["reference"]["epochs"][:3]
    (fit,) = consumed["keras/unshuffled"]["fits"]
    assert fit == reference
    (fit,) = consumed["keras/default"]["fits"]
    assert [sorted(epoch) for epoch in fit] == [sorted(epoch) for epoch in reference]


def test_predict_of_an_unbuilt_model_returns_rows_in_order(consumed: dict[str, Any]) -> None:
    assert consumed["predict"]["rows"] == list(range(22))
