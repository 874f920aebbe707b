"""Faults seen from `model.fit`: it goes on where it can, and tells what happened where it cannot (P1, P2, P3)."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import keras
import psutil
import pytest

import keras_mp
from tests.census import eventually
from tests.faults import scripts
from tests.faults.harm import ALWAYS, Harm, Row

_SAMPLES = 48
_EPOCHS = 3


def _dataset(harm: Harm | None = None, **options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(
        range(_SAMPLES), Row(harm), batch_size=4, shuffle=True, seed=5, max_queue_size=3, **options
    )


def _fit(data: Any, callbacks: Any = (), epochs: int = _EPOCHS) -> tuple[list[float], list[Any]]:
    """The losses of a training, and the weights after it."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    history = model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks))
    return history.history["loss"], [weight.tolist() for weight in model.get_weights()]


class KillAll(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """Kills every worker after every third batch."""

    def __init__(self, pool: keras_mp.WorkerPool) -> None:
        super().__init__()
        self._pool = pool

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch % 3 == 0:
            for pid in self._pool.stats()["pids"]:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("export", [False, True])
def test_training_is_the_same_while_all_workers_are_killed(export: bool, pool: keras_mp.WorkerPool) -> None:
    with _dataset(workers=0) as plain:
        expected = _fit(plain.to_tf_dataset() if export else plain, epochs=1)
    with _dataset(pool=pool) as dataset:
        got = _fit(dataset.to_tf_dataset() if export else dataset, [KillAll(pool)], epochs=1)
        assert dataset.stats()["restarts"] > 0
    assert got == expected


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSEGV"])
def test_fit_tells_all_of_a_batch_that_ends_its_workers(
    kind: str, export: bool, tmp_path: Path, pool: keras_mp.WorkerPool
) -> None:
    with _dataset(Harm(kind, tmp_path, ALWAYS), pool=pool) as dataset:
        with pytest.raises(
            Exception, match=rf"ended its worker twice: process \d+ ended with signal {kind}, at sample 13"
        ):
            for _ in range(2):  # the export's first look at a batch may be at the bad one
                _fit(dataset.to_tf_dataset() if export else dataset, epochs=1)


def test_training_again_after_an_interrupt_and_after_an_error(pool: keras_mp.WorkerPool) -> None:
    class Break(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
        def __init__(self, error: type[BaseException]) -> None:
            super().__init__()
            self._error = error

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 4:
                raise self._error

    with _dataset(workers=0) as plain:
        expected = _fit(plain)
    with _dataset(pool=pool) as dataset:
        for error in (KeyboardInterrupt, ZeroDivisionError):
            with pytest.raises(error):
                _fit(dataset, [Break(error)])
            dataset.set_epoch(0)
        assert _fit(dataset) == expected
        assert dataset.stats()["restarts"] == 0


def test_ctrl_c_while_fit_waits(tmp_path: Path) -> None:
    """For a batch whose code never returns: the program gets its exception, and closing the dataset ends the worker."""
    code = """
    import keras
    from tests.faults.harm import Row
    from tests.faults.test_fit import _fit

    class Tell(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            (here / f"trained-{batch}").touch()

    row = Row(Harm("hang", here))
    with keras_mp.PoolDataset(range(48), row, batch_size=4, workers=2, max_queue_size=2) as dataset:
        try:
            _fit(dataset, [Tell()])
        except KeyboardInterrupt:
            print("interrupted")
    print("right")
    """
    process = scripts.start(code, tmp_path, backend="jax")
    # Batch 3 hangs, and what is bundled with it. Earlier, while JAX compiles, an interrupt may be lost in a callback of
    # JAX's.
    for event in ("struck-0", "trained-0"):
        assert eventually((tmp_path / event).exists, 100), scripts.finish(process, 0)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    code_, said = scripts.finish(process)
    assert code_ == 0, said
    assert said.splitlines()[-2:] == ["interrupted", "right"]
    assert eventually(lambda: not any(worker.is_running() for worker in workers))
