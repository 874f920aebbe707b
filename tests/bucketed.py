"""Samples of different lengths for datasets with buckets: what makes and collates them, in workers without Keras."""

from __future__ import annotations

from typing import Any

import numpy as np

import keras_mp

BOUNDARIES = [4, 8, 16]
LENGTHS = np.random.default_rng(0).integers(0, 25, 90)


def pad_to_boundary(samples: list[Any]) -> Any:
    """Rows of the samples' numbers, filled up with -1 to the boundary of the batch's bucket."""
    longest = max(len(sample) for sample in samples)
    width = [*BOUNDARIES, 25][int(np.searchsorted(BOUNDARIES, longest, side="right"))]
    batch = keras_mp.empty((len(samples), width), np.int64)
    batch[...] = -1
    for row, sample in zip(batch, samples, strict=True):
        row[: len(sample)] = sample
    return batch


def rows(index: Any) -> Any:
    """As many numbers as the sample is long, all of them its index."""
    return np.full(LENGTHS[index], index)


def padded(samples: list[Any]) -> tuple[Any, Any]:
    """The same as one channel of numbers, and labels."""
    return pad_to_boundary(samples).astype(np.float32)[..., None], np.zeros(len(samples), np.float32)


def fails_on_17(index: int) -> int:
    """A length, of all samples but one."""
    if index == 17:
        raise OSError("no such tile")
    return 3
