"""Real text of very different lengths: batches of like length have few shapes, so training is rarely compiled anew.

The text is Python's own language reference, as `help()` shows it: some 2,500 paragraphs of 2 to 2,000 words. A small
model learns to predict the next word. XLA (here: Keras on JAX) compiles the training step once for each shape of a
batch.

    python examples/text_buckets.py
"""

from __future__ import annotations

import collections
import functools
import os
import re
import time
from pydoc_data.topics import topics
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # where the number of compilations can be seen

import keras
import numpy as np

import keras_mp

VOCABULARY = 1000
LONGEST = 128  # words of a paragraph that are used
BOUNDARIES = [17, 49, LONGEST + 1]  # a bucket holds lengths below its boundary: up to 16, 48 and 128 words

PARAGRAPHS = [part for text in topics.values() for part in text.split("\n\n") if len(part.split()) > 1]


def words(text: str) -> list[str]:
    """The words and signs of a paragraph."""
    return re.findall(r"\w+|[^\w\s]", text.lower())[:LONGEST]


def tokenise(text: str, vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Runs in a worker: numbers of the words, int32, and of the next word of each; 1 stands for an unknown word."""
    tokens = np.array([vocabulary.get(word, 1) for word in words(text)], np.int32)
    return tokens[:-1], tokens[1:]


class CountsCompilations(keras.layers.Layer):
    """Passes its input on. Its Python code runs when the step is compiled, and never when it is run."""

    compilations = 0

    def call(self, x: Any) -> Any:
        CountsCompilations.compilations += 1
        return x


def make_model() -> keras.Model:
    """Predicts each next word from the eight before it."""
    layers = keras.layers
    model = keras.Sequential(
        [
            CountsCompilations(),
            layers.Embedding(VOCABULARY, 32),
            layers.Conv1D(32, 4, padding="causal", activation="relu"),
            layers.Conv1D(32, 5, padding="causal", activation="relu"),
            layers.Dense(VOCABULARY),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))
    return model


def train(name: str, dataset: keras_mp.PoolDataset) -> None:
    """Trains a new model for an epoch, and prints what that took."""
    batches = [x for x, _ in dataset]
    dataset.set_epoch(0)  # the same batches again, for the model
    padding = 1 - sum(map(np.count_nonzero, batches)) / sum(x.size for x in batches)
    keras.utils.set_random_seed(0)
    model = make_model()
    CountsCompilations.compilations = 0
    started = time.perf_counter()
    loss = model.fit(dataset, epochs=1, verbose=0).history["loss"][-1]
    seconds = time.perf_counter() - started
    shapes = len({x.shape for x in batches})
    print(
        f"{name:16}{len(batches):8}{shapes:8}{CountsCompilations.compilations:14}{padding:10.0%}{seconds:9.1f}{loss:8.2f}"
    )


def main() -> None:
    counts = collections.Counter(word for text in PARAGRAPHS for word in words(text))
    vocabulary = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY - 2), 2)}
    print(f"{len(PARAGRAPHS)} paragraphs, {sum(counts.values())} words, {len(counts)} of them different\n")

    # Lengths by a function: the workers evaluate it, once for each paragraph.
    buckets = keras_mp.Buckets(lambda index: len(words(PARAGRAPHS[index])), BOUNDARIES, max_tokens=3072)
    options: dict[str, Any] = {
        "transform": functools.partial(tokenise, vocabulary=vocabulary),
        "shuffle": True,
        "seed": 0,
        "workers": 2,
    }
    print(f"{'':16}{'batches':>8}{'shapes':>8}{'compilations':>14}{'padding':>10}{'seconds':>9}{'loss':>8}")
    longest, in_steps = keras_mp.pad(), keras_mp.pad(multiple_of=16)
    with keras_mp.PoolDataset(PARAGRAPHS, collate=longest, batch_size=48, **options) as mixed:
        train("without buckets", mixed)
    with keras_mp.PoolDataset(PARAGRAPHS, collate=in_steps, buckets=buckets, **options) as alike:
        train("with buckets", alike)


if __name__ == "__main__":
    main()
