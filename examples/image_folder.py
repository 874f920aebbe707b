"""Train on a folder of real JPEGs, one of them truncated: `keras.utils.image_dataset_from_directory`, one word changed.

A Sentinel-2 scene (shipped by the package `spyndex`) is cut into tiles that do not overlap, saved as JPEGs in false
colours (infrared, red, green) in a folder for each class: is most of the tile green vegetation, or not? One file is cut
off in the middle, as by an interrupted download. With Keras's own function that ends the training.

You see what was found, Keras's progress bar, and the file that could not be read.

    python examples/image_folder.py [--epochs N] [--workers N]
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image

import keras_mp

_TILE_PIXELS = 20
_BANDS = [3, 2, 1]  # infrared, red, green
_BRIGHTEST = 4500  # counts that become white
_NDVI_VEGETATION = 0.5


def write_tiles(folder: Path) -> Path:
    """Writes the tiles as `folder`/class/number.jpg, and returns the one that is truncated."""
    text = importlib.resources.files("spyndex").joinpath("data", "S2_10m.json").read_text(encoding="utf-8")
    scene = np.array(json.loads(text), np.float32)  # blue, green, red, infrared; shape (4, 300, 300)
    red, infrared = scene[2], scene[3]
    is_vegetation = (infrared - red) / (infrared + red) > _NDVI_VEGETATION
    colours = np.clip(scene[_BANDS] * (255 / _BRIGHTEST), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    starts = range(0, scene.shape[1], _TILE_PIXELS)
    paths = []
    for number, (row, column) in enumerate((row, column) for row in starts for column in starts):
        part = slice(row, row + _TILE_PIXELS), slice(column, column + _TILE_PIXELS)
        path = folder / ("vegetation" if is_vegetation[part].mean() > 0.5 else "other") / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours[part]).save(path, quality=95)
        paths.append(path)
    truncated = paths[len(paths) // 2]
    os.truncate(truncated, truncated.stat().st_size // 2)
    return truncated


def augment(sample: Any, rng: np.random.Generator) -> Any:
    """Mirrors a tile at random; runs in a worker."""
    image, label = sample
    return image[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])] / 255, label


def build_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["accuracy"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on a folder of JPEGs.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, help="default: the usable cores")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    warnings.simplefilter("ignore", RuntimeWarning)  # the failures are printed at the end
    with tempfile.TemporaryDirectory() as folder:
        truncated = write_tiles(Path(folder))
        train, validation = keras_mp.image_dataset_from_directory(  # keras.utils.image_dataset_from_directory
            folder,
            label_mode="binary",
            image_size=(32, 32),
            validation_split=0.2,
            subset="both",
            seed=0,
            # What follows Keras's function does not have.
            transform=augment,
            cache="ram",  # each file is decoded once, and augmented anew in every epoch
            on_error="skip",
            workers=arguments.workers,
        )
        with train, validation:
            build_model().fit(train, validation_data=validation, epochs=arguments.epochs)
            failures = train.failures + validation.failures
            stats = train.stats()
        print(f"\ndecoded {stats.cache_misses} times for {stats.cache_hits + stats.cache_misses} samples")
        print(f"truncated: {truncated.relative_to(folder)}")
        for item, message in sorted({(failure.item, failure.message) for failure in failures}):
            print(f"left out:  {item.replace(folder, '.')}: {message}")


if __name__ == "__main__":
    main()
