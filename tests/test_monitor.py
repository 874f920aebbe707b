"""`PipelineMonitor`: what it measures is what the training waited, whoever takes the batches."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_script

# Eight samples of 20 ms are a batch, and a step takes 40 ms: one worker keeps it waiting for 120 of 160 ms.
_CODE = textwrap.dedent(
    """
    import json, sys, time
    import keras
    import numpy as np
    import keras_mp

    class Step(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.04)

    def slow(x):
        time.sleep(0.02)
        return x, x[:1]

    def fast(x):
        return x, x[:1]

    def fit(workers, export=False, **options):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.ones((160, 4), "float32")
        with keras_mp.PoolDataset(x, slow, batch_size=8, workers=workers) as train, \\
                keras_mp.PoolDataset(x, fast, batch_size=8, workers=1) as held_out:
            convert = (lambda data: data.to_tf_dataset().map(lambda *both: both)) if export else (lambda data: data)
            monitor = keras_mp.PipelineMonitor(verbose=0)
            history = model.fit(convert(train), validation_data=convert(held_out), epochs=2, verbose=0,
                                callbacks=[Step(), monitor], shuffle=not export, **options).history
            last = {name: values[-1] for name, values in history.items()}
            last["step_s"] = train.training.step_s
            last["of_validation"] = held_out.training.batches
            last["batches"] = train.training.batches
            return last

    print(json.dumps({"one": fit(1), "eight": fit(8), "part": fit(1, steps_per_epoch=10),
                      "export": fit(1, True) if "tensorflow" in keras.backend.backend() else None}))
    """
)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_share_of_waiting_is_that_of_the_training(tmp_path: Path, backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    runs: dict[str, Any] = json.loads(run_script(tmp_path / "train.py", _CODE, KERAS_BACKEND=backend))
    one, eight, part = runs["one"], runs["eight"], runs["part"]
    assert one["input_wait_fraction"] > 0.6
    assert eight["input_wait_fraction"] < one["input_wait_fraction"]
    assert one["worker_busy_fraction"] > eight["worker_busy_fraction"]
    assert one["samples_per_second"] < eight["samples_per_second"]
    assert one["step_s"] >= 0.04
    assert (one["batches"], one["of_validation"], part["batches"]) == (20, 20, 10)
    assert set(one) >= {"val_input_wait_fraction", "val_worker_busy_fraction", "val_samples_per_second"}
    if runs["export"] is not None:
        assert runs["export"]["input_wait_fraction"] > 0.6
        assert (runs["export"]["batches"], runs["export"]["of_validation"]) == (20, 20)


_LINES = textwrap.dedent(
    """
    import keras
    import numpy as np
    import keras_mp

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((80, 4), "float32")
    model.fit(x, x[:, :1], epochs=1, verbose=0, callbacks=[keras_mp.PipelineMonitor()])  # no data of ours: silent
    with keras_mp.PoolDataset(x, lambda x: (x, x[:1]), batch_size=8, workers=1) as train:
        model.fit(train, epochs=2, verbose=2, callbacks=[keras_mp.PipelineMonitor()])
        print("end")
        model.evaluate(train, verbose=0, callbacks=[keras_mp.PipelineMonitor()])
        print(train.training.batches)
    """
)


def test_a_line_after_each_epoch_stands_between_those_of_keras(tmp_path: Path) -> None:
    lines = run_script(tmp_path / "train.py", _LINES, KERAS_BACKEND="jax").splitlines()
    starts = [line.split(" - ")[0].split(": fit waited")[0] for line in lines]
    assert starts == ["Epoch 1/2", "10/10", "keras_mp, epoch 1", "Epoch 2/2", "10/10", "keras_mp, epoch 2", "end", "10"]
    assert "1 worker was" in lines[2] and "samples/s" in lines[2]


def test_bad_arguments() -> None:
    import keras_mp

    with pytest.raises(ValueError, match="verbose must be one of 0, 1, got 3"):
        keras_mp.PipelineMonitor(verbose=3)
