"""An existing `PyDataset`, unchanged, with its batches made in worker processes.

`Tones` was written for Keras alone: one item is a whole batch, and it reshuffles itself after every epoch.
`keras_mp.parallelize(tones)` moves its `__getitem__` to worker processes. You see two trainings, the first without and
the second with it, and that their losses are equal: the workers follow the reshuffling.
"""

from __future__ import annotations

import math

import keras
import numpy as np

import keras_mp


class Tones(keras.utils.PyDataset):
    """Noisy tones of 1 to 8 periods, shape (batch, 256, 1), and their number of periods, shape (batch, 1)."""

    def __init__(self, tones: int, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.rng = np.random.default_rng(0)
        self.order = np.arange(tones)
        self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        tones, periods = zip(*(self.make(number) for number in numbers), strict=True)
        return np.stack(tones)[..., None], np.array(periods, np.float32)[:, None]

    def on_epoch_end(self) -> None:
        self.rng.shuffle(self.order)

    @staticmethod
    def make(number: int) -> tuple[np.ndarray, float]:
        """Pure Python, sample by sample: threads would take turns at it."""
        rng = np.random.default_rng(number)
        periods = rng.uniform(1, 8)
        tone = [math.sin(2 * math.pi * periods * step / 256) for step in range(256)]
        return (np.array(tone) + rng.normal(0, 0.2, 256)).astype(np.float32), periods


def train(dataset: keras.utils.PyDataset) -> list[float]:
    """The loss of each epoch, from the same weights and with the batches in the dataset's own order."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((256, 1)),
            keras.layers.Conv1D(8, 9, strides=4, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    losses: list[float] = model.fit(dataset, epochs=3, shuffle=False).history["loss"]
    return losses


def main() -> None:
    without = train(Tones(tones=512, batch_size=32))
    with keras_mp.parallelize(Tones(tones=512, batch_size=32), workers=2) as parallel:
        with_workers = train(parallel)
    print("losses without workers:", *(f"{loss:.4f}" for loss in without))
    print("losses with workers:   ", *(f"{loss:.4f}" for loss in with_workers))
    print("equal:", np.allclose(without, with_workers))


if __name__ == "__main__":
    main()
