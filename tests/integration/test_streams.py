"""Streams in `fit`, `evaluate` and `predict`, on the backend of this process: the batches of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.shards import TOTAL, Numbers, all_pairs, assert_equal, pairs, stream

_COUNT = -(-TOTAL // 4)


class Seen(keras.Model):
    """Remembers the batches that it is trained on, in eager execution."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.batches: list[Any] = []

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.cast(x, "float32") / 1e9)

    def train_step(self, *state_and_data: Any) -> Any:  # on JAX, there is a state
        self.batches.append(keras.ops.convert_to_numpy(state_and_data[-1][0]).copy())
        return super().train_step(*state_and_data)


def _labelled(batch: Any) -> Any:
    return batch, np.zeros(len(batch), "float32")


def _model() -> Seen:
    model = Seen()
    model.compile(loss="mse", run_eagerly=True)
    return model


def _fitted(data: Any, **options: Any) -> list[Any]:
    model = _model()
    model.fit(data, verbose=0, **options)
    return model.batches


_PLACES: list[Callable[[keras_mp.WorkerPool], dict[str, Any]]] = [
    lambda pool: {"pool": pool},
    lambda pool: {"workers": 2, "use_multiprocessing": False},
    lambda pool: {"workers": "auto"},
    lambda pool: {},
]


@pytest.fixture(scope="module")
def reference() -> list[Any]:
    """The batches of two epochs."""
    with stream() as data:
        return [batch for _ in range(2) for batch in data]


@pytest.mark.parametrize("place", _PLACES, ids=["workers", "threads", "auto", "in-process"])
@pytest.mark.parametrize(
    "options", [({"length": TOTAL}, {}), ({}, {"steps_per_epoch": _COUNT})], ids=["declared", "steps"]
)
def test_fit_gets_what_a_loop_gets(
    place: Callable[[keras_mp.WorkerPool], dict[str, Any]],
    options: tuple[dict[str, Any], dict[str, Any]],
    running_pool: keras_mp.WorkerPool,
    reference: list[Any],
) -> None:  # P1, P2
    of_the_stream, of_fit = options
    with stream(batch_transform=_transformed, **of_the_stream, **place(running_pool)) as data:
        assert_equal(_fitted(data, epochs=2, **of_fit), reference)


def _transformed(batch: Any, rng: np.random.Generator) -> Any:
    return _labelled(batch[rng.permutation(len(batch))])


def test_evaluate_and_predict_take_each_sample_once(running_pool: keras_mp.WorkerPool) -> None:  # P1
    model = _model()
    with stream(pool=running_pool, length=TOTAL, batch_transform=_labelled) as data:
        assert len(model.predict(data, verbose=0)) == TOTAL
        assert np.isfinite(model.evaluate(data, verbose=0))
        model.fit(data, validation_data=data, verbose=0)
    assert set(pairs(model.batches)) == all_pairs()


def test_a_stream_that_fails_ends_fit_with_its_error(running_pool: keras_mp.WorkerPool) -> None:  # P3
    damaged = Numbers(accident=(4, 3, "fail"))
    with (
        stream(damaged, pool=running_pool, length=TOTAL, batch_transform=_labelled) as data,
        pytest.raises(Exception, match="damaged"),  # TensorFlow makes its own kind of what a generator raises
    ):
        _fitted(data)
