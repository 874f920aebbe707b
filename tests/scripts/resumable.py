"""Trainings with `BackupAndRestore`, which can kill their process: the steps and final weights of each, or "killed".

    python resumable.py "BACKUP [OPTIONS]" ...

One after the other, each in a fork of this process, which has started nothing, but imported Keras, and TensorFlow, as
`set_random_seed` does on every backend: the imports take longer than a training.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from typing import Any

import keras
import numpy as np

import keras_mp

parser = argparse.ArgumentParser()
parser.add_argument("backup")
parser.add_argument("--save-freq", default="4")
parser.add_argument("--kill-at", type=int, default=0)
parser.add_argument("--shuffle", action="store_true")
parser.add_argument("--plain", action="store_true", help="the dataset itself does not shuffle")
parser.add_argument("--steps-per-epoch", type=int)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--seed", type=int)
parser.add_argument("--workers", type=int, default=2)

DATA = np.random.default_rng(0).normal(size=(100, 3)).astype("float32")


def augmented(row: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    return row + rng.normal(size=3, scale=0.1).astype("float32"), row.sum()


class Killer(keras.callbacks.Callback):
    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self.steps = 0
        self._kill_at = kill_at

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps += 1
        if self.steps == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def model() -> Any:
    dropout = [] if keras.backend.backend() == "torch" else [keras.layers.Dropout(0.3)]  # torch's own global generator
    layers = [keras.Input((3,)), keras.layers.Dense(8, activation="relu"), *dropout, keras.layers.Dense(1)]
    made = keras.Sequential(layers)
    made.compile(keras.optimizers.Adam(0.01), "mse")
    return made


def train(arguments: argparse.Namespace) -> None:
    keras.utils.set_random_seed(5)
    options = {"shuffle": not arguments.plain, "seed": arguments.seed, "workers": arguments.workers}
    with keras_mp.PoolDataset(DATA, augmented, batch_size=8, **options) as data:
        fitted = model()
        save_freq = arguments.save_freq if arguments.save_freq == "epoch" else int(arguments.save_freq)
        backup = keras_mp.BackupAndRestore(data, arguments.backup, save_freq)
        killer = Killer(arguments.kill_at)
        fitted.fit(
            data,
            epochs=arguments.epochs,
            steps_per_epoch=arguments.steps_per_epoch,
            verbose=0,
            shuffle=arguments.shuffle,
            callbacks=[backup, killer],
        )
        print(killer.steps, data.epoch, *[value.tobytes().hex() for value in fitted.get_weights()])


def run(arguments: argparse.Namespace) -> None:
    """Trains in a process of its own, which must end well or be killed where it is to be."""
    if (pid := os.fork()) == 0:
        train(arguments)
        sys.exit()
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if arguments.kill_at and exit_code == -signal.SIGKILL:
        print("killed", flush=True)
    elif arguments.kill_at or exit_code:
        sys.exit(f"exit code {exit_code} of {arguments}")


if __name__ == "__main__":
    keras.utils.set_random_seed(5)
    for line in sys.argv[1:]:
        run(parser.parse_args(shlex.split(line)))
