"""All that a user does where TensorFlow is not installed, on the backend that KERAS_BACKEND names.

    python without_tensorflow.py EXAMPLE FOLDER

EXAMPLE is the quick start; FOLDER has `images/` and `texts/` of two classes, and room for what is written.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mp
from keras_mp import cli

_FOLDER = Path(sys.argv[2])


def installed(*_: Any) -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def quick_start() -> None:
    try:
        runpy.run_path(sys.argv[1])["main"]()
    except ImportError as error:  # at its last line, the export
        print("quick start:", error)


def trained(train: Any, val: Any, model: Any) -> int:
    """How many rows were predicted, after a training that was watched, reported and backed up."""
    monitor = keras_mp.PipelineMonitor(verbose=0)
    backup = keras_mp.BackupAndRestore(train, _FOLDER / "backup")
    with train.trace(_FOLDER / "trace.json"):
        history = model.fit(train, validation_data=val, epochs=2, verbose=0, callbacks=[monitor, backup]).history
    assert np.isfinite([*history["loss"], *history["val_loss"], *history["val_input_wait_fraction"]]).all()
    assert np.isfinite(model.evaluate(val, verbose=0))
    train.report().save(_FOLDER / "report.html")
    assert "samples" in str(train.report())
    return len(model.predict(val, verbose=0))


def images() -> None:
    options: dict[str, Any] = {"image_size": (8, 8), "batch_size": 4, "workers": 1, "seed": 1}
    model = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train, val = keras_mp.image_dataset_from_directory(
        _FOLDER / "images", validation_split=0.5, subset="both", **options
    )
    with train, val:
        print("images:", train.class_names, trained(train, val, model))


def texts() -> None:
    with keras_mp.text_dataset_from_directory(_FOLDER / "texts", batch_size=2, shuffle=False, workers=0) as data:
        print("texts:", [(words.tolist(), labels.tolist()) for words, labels in data])


def lengths() -> None:
    def sample(index: int) -> Any:
        return np.full(2 + index % 5, index, np.int32), np.float32(installed())

    layers = [keras.layers.Embedding(40, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    options: dict[str, Any] = {"batch_size": 4, "collate": keras_mp.pad()}
    with (
        keras_mp.PoolDataset(range(32), sample, workers=1, **options) as train,
        keras_mp.PoolDataset(range(20), sample, workers=0, **options) as val,
    ):
        print("lengths:", trained(train, val, model))
        print("in workers:", any(y.any() for _, y in train))


def checked() -> None:
    (_FOLDER / "checked.py").write_text("import keras_mp\ntrain = keras_mp.PoolDataset(range(8), batch_size=4)\n")
    os.chdir(_FOLDER)
    print("check:", cli.main(["check", "checked:train"]))


if __name__ == "__main__":
    print("installed:", installed())
    for part in (quick_start, images, texts, lengths, checked):
        part()
    print("loaded:", "tensorflow" in sys.modules, keras.backend.backend())
