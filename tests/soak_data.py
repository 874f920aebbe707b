"""What the workers of the soak load: apart from it, so that they need not import Keras."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import numpy.typing as npt

SIDE = 24  # of a picture
WIDTH = 24  # of a sample for a model of one weight a sample
_BAD_SAMPLE = 77

Array = npt.NDArray[Any]


def transform(index: int, rng: np.random.Generator) -> tuple[Array, np.float32]:
    """A picture made of noise from all three sources, and its label; one sample always fails."""
    if index == _BAD_SAMPLE:
        raise ValueError("this sample is broken")
    picture = rng.normal(size=(SIDE, SIDE, 3)) + np.random.rand() + random.random()
    for _ in range(4):
        picture = np.sin(picture)
    return picture.astype(np.float32), np.float32(index % 10)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A transform: the sample's number, and noise, from the global generators too if it `draws` from them."""

    failing: tuple[int, ...]
    draws: bool

    def __call__(self, sample: int, rng: np.random.Generator) -> Any:
        if sample in self.failing:
            raise ValueError(f"sample {sample} is broken")
        shared = (np.random.rand(), random.random()) if self.draws else ()
        return np.int64(sample), rng.random(), *shared


@dataclasses.dataclass(frozen=True)
class Batches:
    """Whole batches, for `parallelize`."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return np.array([index]), np.random.rand(3)


def one_hot(sample: int) -> tuple[Any, Any]:
    """A sample that only its own weight sees, and a target that the loss does not look at."""
    return np.eye(WIDTH, dtype="float32")[sample], np.float32(0)
