"""Ways to consume a dataset, each giving all its batches as arrays, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import keras_mp
from tests.transforms import permuted

EPOCHS = 2


class Identity(keras.Model):
    """A model whose training step notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def train_step(self, data: Any) -> dict[str, Any]:
        (x,) = data if isinstance(data, tuple) else (data,)
        self.seen.append(x.numpy())
        return {"loss": 0.0}


def iterated(dataset: Any) -> Iterator[Any]:
    """By a plain loop."""
    for _ in range(EPOCHS):
        yield from dataset


def fitted(dataset: Any) -> list[Any]:
    """By `fit`."""
    model = Identity()
    model.compile(run_eagerly=True)
    model.fit(dataset, epochs=EPOCHS, shuffle=False, verbose=0)
    return model.seen


def exported(dataset: Any) -> list[Any]:
    """By an export."""
    return [batch.numpy() for batch in dataset.to_tf_dataset(epochs=EPOCHS)]


def seeded(consume: Callable[[Any], Any], transform: Any, **options: Any) -> list[Any]:
    """The batches of EPOCHS epochs of 40 samples, 4 in each, shuffled and made by `transform` and random numbers."""
    with keras_mp.PoolDataset(
        range(40), transform, batch_size=4, batch_transform=permuted, shuffle=True, seed=11, **options
    ) as dataset:
        batches = [np.asarray(batch) for batch in consume(dataset)]
    assert len(batches) == EPOCHS * 10
    return batches
