"""The satellite workload: the tiles and the function of `examples/satellite.py`, as `.npy` files on disk."""

import functools
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.work import Samples
from examples.satellite import REFLECTANCE_PER_COUNT, cut_tiles, load_tile, read_scene

_BATCH_SIZE = 16
_TILE_PIXELS = 96


def tiles(batches: int) -> Samples:
    """`batches` batches of (image, land cover); the files are written the first time and kept."""
    reflectance = read_scene() * REFLECTANCE_PER_COUNT
    transform = functools.partial(
        load_tile,
        mean=reflectance.mean(axis=(1, 2)).astype(np.float32),
        std=reflectance.std(axis=(1, 2)).astype(np.float32),
    )
    count = batches * _BATCH_SIZE
    folder = Path(tempfile.gettempdir()) / f"keras_mp-benchmark-{os.getuid()}" / f"{count}-tiles"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / "tiles"
            unfinished.mkdir()
            cut_tiles(unfinished, count, _TILE_PIXELS, truncated=0)
            unfinished.rename(folder)
    return Samples(sorted((folder / "train").iterdir()), transform, _BATCH_SIZE)
