"""A file becomes a sample: what reads it, and the user's function after that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_mp.loading.randomness import takes_rng

Reader = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Read:
    """(path, label) -> (what the file holds, label), or path -> what it holds; and then `transform`.

    Attributes:
        reader: path -> array, or bytes.
        transform: the user's function of such a sample; None: none.
    """

    reader: Reader
    transform: Callable[..., Any] | None

    def __call__(self, item: Any) -> Any:
        sample = self.read(item)
        return sample if self.transform is None else self.transform(sample)

    def read(self, item: Any) -> Any:
        """The sample before `transform`."""
        if isinstance(item, tuple):
            path, label = item
            return self.reader(path), label
        return self.reader(item)


class ReadWithRng(Read):
    """The same for a transform that takes random numbers."""

    def __call__(self, item: Any, rng: np.random.Generator) -> Any:  # type: ignore[override]  # see `takes_rng`
        return self.transform(self.read(item), rng=rng) if self.transform else self.read(item)


def reading(reader: Reader, transform: Callable[..., Any] | None) -> Read:
    """A transform for a source of (path, label): reads, and calls the user's `transform` with its `rng`, if any."""
    return (ReadWithRng if takes_rng(transform) else Read)(reader, transform)


def only_sample(samples: list[Any]) -> Any:
    """A collate for batches that are one sample, without a batch axis."""
    (sample,) = samples
    return sample
