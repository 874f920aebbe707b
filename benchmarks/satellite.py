"""The satellite workload: the tiles and the function of `examples/satellite.py`, as `.npy` files on disk."""

import functools

import numpy as np

from benchmarks.work import Samples, kept_folder
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
    folder = kept_folder(f"{count}-tiles", lambda folder: cut_tiles(folder, count, _TILE_PIXELS, truncated=0))
    return Samples(sorted((folder / "train").iterdir()), transform, _BATCH_SIZE)
