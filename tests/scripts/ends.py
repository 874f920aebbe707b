"""Ends in one of several ways while a dataset is in use; what is of interest is whether the process ends.

    python -m tests.scripts.ends export+exception

Says "in use" when it is, where a Ctrl-C is to come from outside.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import keras
import numpy as np

import keras_mp

BATCHES = 400
WORK_S = float(os.environ.get("ENDS_WORK_S", "0.008"))  # for a batch: time enough for who reads ahead to be waiting
_ENDS = {"exception": (1,), "ctrl-c": (-signal.SIGINT, 1), "sys.exit": (3,), "alive": (0,)}
EXIT_CODES = {f"{what}+{end}": codes for what in ("export", "dataset", "stock") for end, codes in _ENDS.items()}

kept: Any = None  # what is alive when the process ends


class Stock(keras.utils.PyDataset):
    """A dataset of Keras's own kind, for comparison."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        time.sleep(WORK_S)
        return np.full((4, 8), index, np.float32), np.zeros((4, 1), np.float32)


class End(keras.callbacks.Callback):
    """Ends the training."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self._end = end

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 5 and self._end == "ctrl-c":
            print("in use", flush=True)
        if batch == 20 and self._end == "exception":
            raise RuntimeError("from the callback")
        if batch == 20 and self._end == "sys.exit":
            sys.exit(3)


def end(scenario: str) -> None:
    """Does what `scenario` says, and leaves the rest to the interpreter."""
    global kept

    def sample(index: int) -> Any:  # in here, so that workers need not import this module, and with it Keras
        time.sleep(WORK_S / 2)  # two workers, four samples
        return np.full(8, index, np.float32), np.zeros(1, np.float32)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    what, how = scenario.split("+")
    epochs = 1000 if how == "ctrl-c" else 2
    data: Any = Stock()
    if what != "stock":
        data = keras_mp.PoolDataset(range(4 * BATCHES), sample, batch_size=4, workers=2)
    if what == "export":
        data = data.to_tf_dataset(epochs=epochs)
    if how == "alive":
        kept = iter(data)
        for _ in range(20):
            next(kept)
        return
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(data, epochs=epochs, verbose=0, callbacks=[End(how)])


if __name__ == "__main__":
    end(sys.argv[1])
