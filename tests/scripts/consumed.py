"""Trains in many ways and prints, as JSON, which samples the model consumed at every step.

The model has one weight a sample and a loss whose gradient is 1 for each sample in the batch, so the change of the
weights over a step is the batch's census: what was really trained on, on any backend, and not what was requested.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = sys.argv[1]

import keras
import numpy as np

import keras_mp

SAMPLES, BATCH = 22, 4


def one_hot(sample: int) -> tuple[Any, Any]:
    return np.eye(SAMPLES, dtype="float32")[sample], np.float32(0)


class SumOfOutputs(keras.losses.Loss):
    def __init__(self) -> None:
        super().__init__(reduction="sum")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred[:, 0]


class Census(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[list[int]]] = []
        self._before = np.zeros(SAMPLES)

    def on_train_begin(self, logs: Any = None) -> None:
        self.epochs = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append([])

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = self.model.get_weights()[0][:, 0]
        counts = np.rint(self._before - now).astype(int)
        self._before = now
        self.epochs[-1].append(np.repeat(np.arange(SAMPLES), counts).tolist())


class Nosy(keras.callbacks.Callback):
    """Looks at the dataset whenever Keras lets it."""

    def __init__(self, train: keras_mp.PoolDataset) -> None:
        super().__init__()
        self._train = train

    def _look(self) -> None:
        train = self._train
        assert train.num_batches and len(train) and repr(train) and train.stats() and not train.failures
        train.state_dict()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._look()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._look()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._look()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._look()
        if batch == 1:
            assert len(list(self._train)) == 6
            for _ in self._train:
                break
            if keras.backend.backend() == "tensorflow":
                assert sum(1 for _ in self._train.to_tf_dataset()) == 6
            iterator = iter(self._train)
            for _ in range(6):
                next(iterator)
            self._look()


class Picker(keras.callbacks.Callback):
    """Looks at single batches."""

    def __init__(self, train: keras_mp.PoolDataset) -> None:
        super().__init__()
        self._train = train

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        for number in (0, self._train.num_batches - 1):
            assert self._train[number][0].shape[1:] == (SAMPLES,)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.on_train_batch_begin(batch)


class Tester(keras.callbacks.Callback):
    """Evaluates on the dataset that is trained on: in the middle of a pass, or between two."""

    def __init__(self, train: keras_mp.PoolDataset, in_between: bool) -> None:
        super().__init__()
        self._train = train
        self._in_between = in_between

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self._in_between and batch == 2:
            self.model.evaluate(self._train, verbose=0)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._in_between:
            deadline = time.monotonic() + 10  # TensorFlow may take all of a pass of which a part has been trained on
            while self._train.state_dict()["epoch"] == epoch and time.monotonic() < deadline:
                time.sleep(0.01)
            self.model.evaluate(self._train, verbose=0)


def dataset(**options: Any) -> keras_mp.PoolDataset:
    options = {"shuffle": True, "batch_size": BATCH, "seed": 7, **options}
    return keras_mp.PoolDataset(range(SAMPLES), one_hot, **options)


def model() -> Any:
    built = keras.Sequential([keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    built.compile(keras.optimizers.SGD(1.0), SumOfOutputs())
    return built


FITS: dict[str, dict[str, Any]] = {
    "default": {"epochs": 3},
    "unshuffled": {"epochs": 3, "shuffle": False},
    "unseen": {"epochs": 1},
    "short": {"epochs": 4, "steps_per_epoch": 2},
    "exact": {"epochs": 2, "steps_per_epoch": 6},
    "long": {"epochs": 2, "steps_per_epoch": 9},
    "late": {"epochs": 3, "initial_epoch": 1},
    "itself": {"epochs": 2},
    "validated": {"epochs": 2},
    "nosy": {"epochs": 3},
    "nosy-short": {"epochs": 6, "steps_per_epoch": 2},
    "picked": {"epochs": 3},
    "picked-short": {"epochs": 4, "steps_per_epoch": 5},
    "tested": {"epochs": 2},
}
LOOKERS: dict[str, Callable[[keras_mp.PoolDataset], Any]] = {
    "nosy": Nosy,
    "nosy-short": Nosy,
    "picked": Picker,
    "picked-short": Picker,
    "tested": lambda train: Tester(train, in_between=True),
}


def run(kind: dict[str, Any], name: str, fits: int = 1, built: Any = None) -> dict[str, Any]:
    record: dict[str, Any] = {"fits": []}
    with dataset(**kind) as train, dataset(**{**kind, "shuffle": False}) as other:
        fitted = built or model()
        if built:
            built.set_weights([np.zeros((SAMPLES, 1))])
        census = Census()
        validation = {"itself": train, "validated": other}.get(name)
        for _ in range(fits):
            lookers = [LOOKERS[name](train)] if name in LOOKERS else []
            fitted.fit(train, verbose=0, callbacks=[census, *lookers], validation_data=validation, **FITS[name])
            record["fits"].append(census.epochs)
        record["epoch"] = train.epoch
    return record


def refused(pool: keras_mp.WorkerPool, in_between: bool, validated: bool = False, **options: Any) -> str:
    """What a second pass in the middle of one is told; the fit that it belongs to ends with it."""
    with dataset(pool=pool) as train:
        data = {"validation_data": train} if validated else {"callbacks": [Tester(train, in_between)]}
        try:
            model().fit(train, verbose=0, **data, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def trained(two: keras_mp.WorkerPool, five: keras_mp.WorkerPool) -> dict[str, Any]:
    """What came of all fits, on the workers of two pools: to start some for each costs more than the fit."""
    kinds: dict[str, dict[str, Any]] = {
        "in-process": {"workers": 0},
        "threads": {"workers": 2, "use_multiprocessing": False},
        "processes": {"pool": two},
        "five": {"pool": five, "max_queue_size": 3},
    }
    # A new model is built from a first batch, and compiled, which takes its time: two kinds share one that is.
    built = model()
    built.build((None, SAMPLES))
    models = {"threads": built, "five": built}
    records = {
        f"{kind}/{name}": run(options, name, built=models.get(kind)) for kind, options in kinds.items() for name in FITS
    }
    records["refused"] = {
        "in a pass": refused(two, in_between=False),
        "in a pass over two epochs of Keras": refused(two, in_between=True, steps_per_epoch=5),
        "as validation data": refused(two, in_between=True, validated=True, steps_per_epoch=5),
    }
    for name in ("default", "unshuffled", "nosy", "picked", "short"):
        records[f"plain/{name}"] = run({"pool": two, "shuffle": False}, name)
    records["plain/seeds"] = {"fits": []}
    for seed in range(10):  # by chance, Keras begins some of these with batch 0
        random.seed(seed)
        records["plain/seeds"]["fits"] += run({"workers": 0, "shuffle": False, "batch_size": 8}, "unseen")["fits"]
    records["processes/twice"] = run({"workers": 2}, "default", fits=2)
    return records


def main() -> None:
    with keras_mp.WorkerPool(2) as two, keras_mp.WorkerPool(5) as five:
        records = trained(two, five)
    if keras.backend.backend() == "tensorflow":
        for name in ("unshuffled", "default"):
            records[f"keras/{name}"] = run({"workers": 2, "pool": "keras"}, name)
    reference = dataset(workers=0)
    records["reference"] = {
        "epochs": [[sorted(np.argmax(x, axis=1).tolist()) for x, _ in reference] for _ in range(6)],
    }
    identity = keras.Sequential([keras.layers.Identity()])
    with dataset(workers=3, shuffle=False) as ordered:
        rows = identity.predict(ordered, verbose=0)
    records["predict"] = {"rows": np.argmax(rows, axis=1).tolist()}
    print(json.dumps(records))


if __name__ == "__main__":
    main()
