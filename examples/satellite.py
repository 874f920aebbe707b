"""Train on real Sentinel-2 tiles, and see what a process pool does for the seconds per epoch.

A 3 km x 3 km Sentinel-2 scene (bands B02, B03, B04, B08 at 10 m, shipped by the package `spyndex`) is cut into
overlapping tiles, saved as `.npy` files, a few of them truncated as by an interrupted download. Each tile is loaded,
geometrically corrected and normalised in Python; a small convnet learns which part of it is vegetation and which water.

You see Keras's progress bar for four ways to load the same tiles, each in a fresh process, then a table: seconds per
epoch, speed-up over loading in the training process, and the tiles that could not be read.

    python examples/satellite.py [--tiles N] [--epochs N] [--size PIXELS] [--truncated N] [--workers N]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.resources
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

import keras_mp

if TYPE_CHECKING:
    import keras

Floats = npt.NDArray[np.float32]

BLUE, GREEN, RED, NIR = range(4)
REFLECTANCE_PER_COUNT = 1e-4  # ESA's quantification value for Sentinel-2 products of this age: counts / 10000.

# Vegetation: NDVI above 0.5, where the USGS's "sparse vegetation" (0.2 to 0.5) ends.
NDVI_VEGETATION = 0.5
# Water: NDWI above 0 (McFeeters 1996, "The use of the Normalized Difference Water Index").
NDWI_WATER = 0.0

# The correction: from the UTM grid to true north (they differ by up to 3 degrees at the edge of a zone), and a shear.
ROTATION_DEGREES = 2.5
SHEAR = 0.02
MARGIN = 8  # Pixels around a tile that the turned grid may reach into, so that no output pixel is made up.

LOADERS = {
    "in-process": "in-process",
    "keras": "Keras's own pool",
    "fit": "keras_mp, fit",
    "tfdata": "keras_mp, tf.data",
}
ROW_TIMEOUT_S = 150.0


def read_scene() -> npt.NDArray[np.uint16]:
    """The scene as counts, shape (4, 300, 300)."""
    text = importlib.resources.files("spyndex").joinpath("data", "S2_10m.json").read_text(encoding="utf-8")
    return np.array(json.loads(text), dtype=np.uint16)


def correct(tile: npt.NDArray[np.generic]) -> Floats:
    """Resample (bands, n + 2 * MARGIN, n + 2 * MARGIN) counts to (bands, n, n) reflectances on the corrected grid.

    Each output pixel is the mean of four cubic spline samples, so that the resampling does not alias.
    """
    size = tile.shape[-1] - 2 * MARGIN
    angle = np.deg2rad(ROTATION_DEGREES)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1.0, SHEAR], [0.0, 1.0]])
    # Sample k of the fine grid lies at pixel k / 2 - 0.25 of the tile; both grids share their centre.
    offset = (tile.shape[-1] - 1) / 2 - matrix @ np.full(2, 0.25 + (size - 1) / 2)
    corrected = np.empty((len(tile), size, size), np.float32)
    for band, pixels in zip(corrected, tile, strict=True):
        fine = ndimage.affine_transform(
            pixels.astype(np.float32), matrix / 2, offset, output_shape=(2 * size, 2 * size), order=3
        )
        band[:] = fine.reshape(size, 2, size, 2).mean(axis=(1, 3))
    # A cubic spline may overshoot below zero at a sharp edge.
    return np.maximum(corrected * REFLECTANCE_PER_COUNT, 1e-4, dtype=np.float32)


def land_cover(reflectance: Floats) -> Floats:
    """The fractions of vegetation and of water in (bands, n, n) reflectances, shape (2,)."""
    green, red, nir = reflectance[GREEN], reflectance[RED], reflectance[NIR]
    vegetation = (nir - red) / (nir + red) > NDVI_VEGETATION
    water = (green - nir) / (green + nir) > NDWI_WATER
    return np.array([vegetation.mean(), water.mean()], np.float32)


def load_tile(path: Path, mean: Floats, std: Floats) -> tuple[Floats, Floats]:
    """What a worker does with one tile: its normalised image, shape (n, n, 4), and its land cover, shape (2,)."""
    reflectance = correct(np.load(path))
    image = (reflectance.transpose(1, 2, 0) - mean) / std
    return image, land_cover(reflectance)


def cut_tiles(folder: Path, tiles: int, size: int, truncated: int) -> None:
    """Write `tiles` overlapping training tiles, `truncated` of them cut short, and a quarter as many for validation."""
    scene = read_scene()
    rng = np.random.default_rng(0)
    side = size + 2 * MARGIN
    last = scene.shape[-1] - side
    if last < side:
        raise SystemExit(f"--size {size} is too large: at most {scene.shape[-1] // 2 - 2 * MARGIN}")
    # Validation tiles come from the eastern edge, which no training tile touches.
    for kind, count, first_column, last_column in (
        ("train", tiles, 0, last - side),
        ("val", max(tiles // 4, 1), last, last),
    ):
        (folder / kind).mkdir()
        for number in range(count):
            row, column = rng.integers(0, last + 1), rng.integers(first_column, last_column + 1)
            np.save(folder / kind / f"{number:04d}.npy", scene[:, row : row + side, column : column + side])
    for number in rng.choice(tiles, truncated, replace=False):
        path = folder / "train" / f"{number:04d}.npy"
        os.truncate(path, path.stat().st_size // 2)


def build_model(size: int) -> keras.Model:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((size, size, 4)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(2, 1, activation="sigmoid"),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), loss="mse", metrics=["mae"])
    return model


def measure(loader: str, folder: Path, epochs: int, workers: int | None) -> dict[str, Any]:
    """Train with one loader in this process: seconds of each epoch, tiles that failed, what was learned."""
    import keras

    reflectance = read_scene() * REFLECTANCE_PER_COUNT
    transform = functools.partial(
        load_tile,
        mean=reflectance.mean(axis=(1, 2)).astype(np.float32),
        std=reflectance.std(axis=(1, 2)).astype(np.float32),
    )
    processes = 0 if loader == "in-process" else workers
    pool: Literal["keras"] | None = "keras" if loader == "keras" else None
    train_paths, val_paths = sorted((folder / "train").iterdir()), sorted((folder / "val").iterdir())
    targets = np.stack([transform(path)[1] for path in val_paths])

    class Clock(keras.callbacks.Callback):
        """Seconds from one end of epoch to the next, validation and the loader's own start included."""

        seconds: list[float]

        def on_train_begin(self, logs: object = None) -> None:
            self.seconds = []
            self.last = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: object = None) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    with (
        keras_mp.PoolDataset(
            train_paths,
            transform,
            batch_size=16,
            shuffle=True,
            seed=0,
            workers=processes,
            on_error="skip",
            pool=pool,
        ) as train,
        keras_mp.PoolDataset(val_paths, transform, batch_size=16, workers=processes, pool=pool) as val,
    ):
        clock = Clock()
        model = build_model(transform(val_paths[0])[0].shape[0])
        model.fit(
            train.to_tf_dataset() if loader == "tfdata" else train,
            validation_data=val.to_tf_dataset() if loader == "tfdata" else val,
            epochs=epochs,
            callbacks=[clock],
        )
        learned, true = model.predict(val, verbose=0)[:, 0], targets[:, 0]
        failed = sorted({train_paths[f.index].name for f in train.failures if f.index is not None})
        return {
            "seconds": clock.seconds,
            # The workers of Keras's own pool send back batches and nothing else: what failed in them stays there.
            "failed": None if loader == "keras" else failed,
            "vegetation": float(true.mean()),
            "learned": float(learned.mean()),
            "error": float(np.abs(learned - true).mean()),
        }


def measure_in_fresh_process(loader: str, folder: Path, epochs: int, workers: int | None) -> dict[str, Any] | None:
    """`measure` in a new interpreter, so that no row profits from the one before; None if it hung or failed."""
    result = folder / f"{loader}.json"
    command = [sys.executable, __file__, "--measure", loader, "--folder", str(folder), "--epochs", str(epochs)]
    if workers is not None:
        command += ["--workers", str(workers)]
    # Its own session: Keras's pool forks a process that runs TensorFlow's threads, which can hang for ever, and then
    # its forked workers have to be stopped with it.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}  # TensorFlow says much about GPUs that are not there
    process = subprocess.Popen(command, env=quiet, start_new_session=True)
    try:
        process.wait(ROW_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"no end after {ROW_TIMEOUT_S:.0f} s: stopped")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return json.loads(result.read_text()) if result.exists() else None


def print_table(results: dict[str, dict[str, Any] | None], tiles: int, workers: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    processes = "one worker per usable core" if workers is None else f"{workers} workers"
    table = Table(title=f"Seconds per epoch of {tiles} tiles, {processes}")
    for column in ("loader", "first epoch", "later epochs", "speed-up", "failed tiles"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    base = results["in-process"]
    for loader, result in results.items():
        if result is None:
            table.add_row(LOADERS[loader], "-", "-", "-", "-")
            continue
        first, later = result["seconds"][0], statistics.median(result["seconds"][1:])
        speed_up = f"{statistics.median(base['seconds'][1:]) / later:.2f}x" if base else "-"
        failed = "not told" if result["failed"] is None else str(len(result["failed"]))
        table.add_row(LOADERS[loader], f"{first:.2f}", f"{later:.2f}", speed_up, failed)
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on Sentinel-2 tiles with four data loaders.")
    parser.add_argument("--tiles", type=int, default=320, help="training tiles")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each loader, at least 2")
    parser.add_argument("--size", type=int, default=96, help="width and height of a corrected tile in pixels")
    parser.add_argument("--truncated", type=int, default=5, help="training tiles that are cut short on disk")
    parser.add_argument("--workers", type=int, default=None, help="worker processes; default: every usable core")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: the first one includes the start of the workers")

    if args.measure:
        measured = measure(args.measure, args.folder, args.epochs, args.workers)
        (args.folder / f"{args.measure}.json").write_text(json.dumps(measured))
        return 0

    results: dict[str, dict[str, Any] | None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cut_tiles(folder, args.tiles, args.size, args.truncated)
        for loader, title in LOADERS.items():
            print(f"\n{title}", flush=True)
            results[loader] = measure_in_fresh_process(loader, folder, args.epochs, args.workers)
    print_table(results, args.tiles, args.workers)

    ours = results["tfdata"]
    if ours is None or results["fit"] is None:
        return 1
    print(f"Left out and reported: {', '.join(ours['failed'])}")
    print(
        f"Vegetation at the eastern edge, where no training tile lies: {ours['vegetation']:.1%}; "
        f"learned: {ours['learned']:.1%}; mean error of a tile: {ours['error']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
