"""Going on in the middle of an epoch: states, and `BackupAndRestore` after a real SIGKILL."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.support import run
from tests.transforms import noisy

_SCRIPT = Path(__file__).parent / "scripts" / "resumable.py"


def dataset(**options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(
        range(22), noisy, **{"batch_size": 4, "shuffle": True, "seed": 3, "workers": 0, **options}
    )


def plain(batches: Any) -> list[tuple[Any, ...]]:
    return [tuple(part.tolist() for part in batch) for batch in batches]


@pytest.mark.parametrize("taken", range(7))
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_the_epoch_is_bit_identical(taken: int, workers: int) -> None:
    reference = dataset()
    epochs = [plain(reference) for _ in range(4)]
    before = dataset()
    list(before)
    state = before.state_dict()
    for number, _ in enumerate(before):
        if number + 1 == taken:
            state = before.state_dict()
            break
    with dataset(workers=workers) as after:
        after.load_state_dict(json.loads(json.dumps(state)))
        assert after.epoch == (2 if taken == 6 else 1)
        rest = epochs[2] if taken == 6 else epochs[1][taken:]
        assert len(after) == len(rest)
        assert plain(after[index] for index in range(len(after))) == rest
        assert plain(after) == rest
        assert plain(after) == epochs[after.epoch - 1]


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # as it should: it is resumed
def test_fit_goes_on_with_a_single_batch() -> None:
    """Keras, on TensorFlow, looks at two before it begins."""
    data = keras_mp.PoolDataset(range(20), lambda index: (np.ones(3), index), batch_size=4, shuffle=True, workers=0)
    data.load_state_dict({**data.state_dict(), "position": 4})
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    steps: list[int] = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: steps.append(step))
    model.fit(data, epochs=2, verbose=0, callbacks=[count])
    assert steps == [0, 0, 1, 2, 3, 4]


def test_an_export_goes_on_there_too() -> None:
    reference = dataset()
    epochs = [plain(reference) for _ in range(2)]
    state = {**dataset().state_dict(), "position": 4}
    after = dataset()
    after.load_state_dict(state)
    export = after.to_tf_dataset()
    assert plain((x.numpy(), y.numpy()) for x, y in export) == epochs[0][4:]
    assert plain((x.numpy(), y.numpy()) for x, y in export) == epochs[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("length", 23), ("seed", 4), ("batch_size", 5), ("version", 99), ("shard", 1), ("shuffle", False)],
)
def test_a_state_of_another_dataset_is_refused_by_name(name: str, value: Any) -> None:
    state = {**dataset().state_dict(), name: value}
    with pytest.raises(ValueError, match=name):
        dataset().load_state_dict(state)


def test_a_drawn_seed_is_shown_and_taken_over() -> None:
    first, second = dataset(seed=None), dataset(seed=None)
    seed = first.state_dict()["seed"]
    assert f"seed={seed}" in repr(first)
    second.load_state_dict(first.state_dict())
    assert plain(second) == plain(first)


def train(*runs: str, backend: str) -> list[list[str]]:
    """The words that the script says of each run."""
    done = run([sys.executable, _SCRIPT, *runs], {"KERAS_BACKEND": backend}, timeout_s=800)
    return [line.split() for line in done.stdout.splitlines()]


# By backend: options of a run, its steps, those left after the kills, and at which step of each process these are.
_PLAIN = "--plain --seed 7 --shuffle --save-freq 4"
_RUNS = {
    "tensorflow": [
        ("--seed 7 --shuffle --save-freq 4", 39, 19, (18, 5)),
        ("--seed 7 --save-freq epoch", 39, 26, (18,)),
        # 13 batches: passes of 5 + 5 + 3 steps, and of 13 where more are wanted.
        (f"{_PLAIN} --steps-per-epoch 5 --epochs 7", 31, 15, (18,)),
        (f"{_PLAIN} --steps-per-epoch 20", 39, 23, (18,)),
    ],
    "jax": [
        ("--seed 7 --shuffle --save-freq 5", 39, 19, (18, 5)),
        (f"{_PLAIN} --steps-per-epoch 5 --epochs 7", 31, 19, (14,)),
    ],
    "torch": [
        ("--seed 7 --shuffle --save-freq 5", 39, 19, (18, 5)),
        ("--plain --seed 7 --save-freq 3 --steps-per-epoch 5 --epochs 7", 31, 13, (18,)),
        (f"{_PLAIN} --steps-per-epoch 20", 39, 23, (18,)),
    ],
}


@pytest.mark.timeout(900)  # a minute on a quiet machine
@pytest.mark.parametrize("backend", _RUNS)
def test_killed_fits_end_with_the_weights_of_those_that_were_not(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    monkeypatch.chdir(tmp_path)
    options = [options for options, *_ in _RUNS[backend]]
    killed = [
        f"killed-{run} {options[run]} --kill-at {at}" for run, (*_, kills) in enumerate(_RUNS[backend]) for at in kills
    ]
    whole = [f"whole-{run} {each}" for run, each in enumerate(options)]
    resumed = [f"killed-{run} {each} --workers 1" for run, each in enumerate(options)]
    said = iter(train(*killed, *whole, *resumed, backend=backend))
    assert [next(said) for _ in killed] == [["killed"]] * len(killed)
    ends = [next(said) for _ in whole], list(said)
    for (name, *steps, _), (all_steps, *expected), (left, *weights) in zip(_RUNS[backend], *ends, strict=True):
        assert [int(all_steps), int(left)] == steps, name
        assert weights == expected, name
    assert not list(tmp_path.iterdir())  # no backup is left


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # Keras finds the end too late
@pytest.mark.parametrize(("kill_at", "more"), [(4, True), (5, True), (9, False), (12, False), (13, True)])
def test_an_epoch_of_keras_without_steps_is_foretold(kill_at: int, more: bool, tmp_path: Path) -> None:
    """Of 12 batches Keras takes 4 at a time; where it was interrupted, it looks for the end of the data 4 later."""

    def steps(after: int, epochs: int) -> int:
        taken: list[int] = []

        def stop(step: int, logs: Any) -> None:
            taken.append(step)
            if len(taken) == after:
                raise KeyboardInterrupt

        with keras_mp.PoolDataset(np.ones((24, 3)), lambda row: (row, 1.0), batch_size=2, workers=0) as data:
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            callbacks = [
                keras_mp.BackupAndRestore(data, tmp_path, 1),
                keras.callbacks.LambdaCallback(on_train_batch_end=stop),
            ]
            with contextlib.suppress(KeyboardInterrupt):
                model.fit(data, epochs=epochs, steps_per_epoch=4, verbose=0, callbacks=callbacks)
        return len(taken)

    assert steps(kill_at, 6) == kill_at
    if more:
        with pytest.warns(RuntimeWarning, match="will have no step"):
            assert steps(0, 7) == 24 - kill_at
    else:
        assert steps(0, 6) == 24 - kill_at


def test_a_backup_cut_off_half_way_is_no_backup(tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    run = f"'{backup}' --seed 7 --save-freq 4"
    assert train(f"{run} --kill-at 10", backend="tensorflow") == [["killed"]]
    (kept,) = backup.iterdir()
    partial = backup / "backup-00000009.partial"
    partial.mkdir()
    (partial / "data.json").write_text("{")
    assert train(run, backend="tensorflow")[0][0] == "31"
    assert kept.name == "backup-00000002"
