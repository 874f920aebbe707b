"""Batches of different lengths in `fit` and in an export, also where those that are looked at first are alike."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.support import needs_tensorflow

# Of eight batches of four, the first two have the same longest sample, the next ones have others.
_LENGTHS = [2, 5, 3, 4] + [5, 5, 1, 2] + [3, 9, 4, 1] + [7, 1, 7, 2] * 5


def _sample(index: int) -> tuple[np.ndarray[Any, Any], np.float32]:
    return np.full(_LENGTHS[index], index, np.int32), np.float32(index)


def _own(samples: list[Any]) -> Any:
    longest = max(len(x) for x, _ in samples)
    return np.stack([np.pad(x, (0, longest - len(x))) for x, _ in samples]), np.array([y for _, y in samples])


def _dataset(collate: Any, **options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(
        range(len(_LENGTHS)), _sample, **{"batch_size": 4, "collate": collate, "workers": 0, **options}
    )


def _of_the_export(test: Any) -> Any:
    return pytest.mark.any_backend(needs_tensorflow(test))


class Seen(keras.Model):
    """Remembers what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.labels: list[int] = []

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.sum(keras.ops.cast(x, "float32"), axis=1, keepdims=True))

    def train_step(self, *state_and_data: Any) -> Any:  # on JAX, there is a state
        self.labels += map(int, state_and_data[-1][1])
        return super().train_step(*state_and_data)


_COLLATES = [keras_mp.pad(), keras_mp.pad(multiple_of=4), keras_mp.pad(multiple_of=8, max_length=12), _own]


@pytest.mark.parametrize("collate", _COLLATES, ids=["pad", "multiple", "bounded", "own"])
@pytest.mark.parametrize("on_pool", [True, False], ids=["workers", "in-process"])
def test_fit_takes_lengths_that_its_first_batches_lack(
    running_pool: keras_mp.WorkerPool, collate: Any, on_pool: bool
) -> None:  # P1
    engine: dict[str, Any] = {"pool": running_pool, "workers": None} if on_pool else {}
    model = Seen()
    model.compile("sgd", "mse", run_eagerly=True)
    with _dataset(collate, **engine) as train, _dataset(collate, **engine) as validation:
        model.fit(train, validation_data=validation, epochs=2, shuffle=False, verbose=0)
        assert model.predict(validation, verbose=0).shape == (32, 1)
    assert list(model.labels) == [*range(32)] * 2


@_of_the_export
@pytest.mark.parametrize("collate", _COLLATES, ids=["pad", "multiple", "bounded", "own"])
def test_an_export_takes_them(running_pool: keras_mp.WorkerPool, collate: Any) -> None:  # P2
    with _dataset(collate, pool=running_pool, workers=None) as dataset:
        exported = dataset.to_tf_dataset()
        assert exported.element_spec[0].shape.as_list() == [None if collate is _own else 4, None]
        batches = list(exported)
        dataset.set_epoch(0)
        for one, other in zip(batches, dataset, strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_array_equal(one[1], other[1])


@_of_the_export
@pytest.mark.parametrize(
    ("pad", "shape"),
    [
        (keras_mp.pad(), [4, None, 3]),
        (keras_mp.pad(multiple_of=4), [4, None, 3]),
        (keras_mp.pad(max_length=12), [4, 12, 3]),
        (keras_mp.pad(multiple_of=12, max_length=12), [4, 12, 3]),
        (keras_mp.pad(multiple_of=4, max_length=12), [4, None, 3]),
        (keras_mp.pad(multiple_of=(4, 1)), [4, None, None]),
    ],
)
def test_what_the_export_knows(pad: Any, shape: list[int | None]) -> None:
    def sample(index: int) -> Any:
        return {"features": np.ones((_LENGTHS[index], 3)), "label": 1}

    options: dict[str, Any] = {"batch_size": 4, "drop_remainder": True, "workers": 0}
    with keras_mp.PoolDataset(range(32), sample, collate=pad, **options) as dataset:
        spec = dataset.to_tf_dataset().element_spec
        assert spec["features"].shape.as_list() == shape
        assert spec["label"].shape.as_list() == [4]


@_of_the_export
def test_axes_that_vary_within_a_batch_are_open() -> None:
    """Two axes, no features: the last is known to vary from what is in a batch."""
    with keras_mp.PoolDataset(
        range(32), lambda index: np.ones((_LENGTHS[index], _LENGTHS[-index])), collate=keras_mp.pad(), workers=0
    ) as dataset:
        assert dataset.to_tf_dataset().element_spec.shape.as_list() == [32, None, None]


@_of_the_export
def test_one_batch_may_be_looked_at_twice() -> None:
    with _dataset(keras_mp.pad(), batch_size=32) as dataset:
        assert dataset.to_tf_dataset().element_spec[0].shape.as_list() == [32, None]


@_of_the_export
def test_looks_leave_the_data_as_it_is(running_pool: keras_mp.WorkerPool) -> None:  # P2
    """Who looks is not told other lengths, but for Keras; and what is looked at is not what comes in the pass."""
    with _dataset(keras_mp.pad(), pool=running_pool, workers=None) as dataset:
        expected = [batch[0].tolist() for batch in dataset]
        dataset.set_epoch(0)
        dataset.to_tf_dataset()
        assert [dataset[number][0].tolist() for number in range(8)] == expected
        assert [batch[0].tolist() for batch in dataset] == expected


@_of_the_export
def test_a_contradiction_names_the_way_out() -> None:
    import tensorflow as tf

    def batch_transform(batch: Any) -> Any:
        return batch[:, :3] if batch.max() < 8 else batch

    with keras_mp.PoolDataset(
        np.arange(16).repeat(5).reshape(16, 5), batch_size=4, batch_transform=batch_transform, workers=0
    ) as dataset:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"keras_mp\.pad\(\).*element_spec=") as caught:
            list(dataset.to_tf_dataset())
    assert "shape (4, 5)" in caught.value.message


@_of_the_export
def test_batches_of_different_structure_are_refused() -> None:
    def batch_transform(batch: Any) -> Any:
        return batch if batch[0] == 0 else batch[None]

    with keras_mp.PoolDataset(np.arange(8), batch_size=4, batch_transform=batch_transform, workers=0) as dataset:
        with pytest.raises(ValueError, match="number of axes"):
            dataset.to_tf_dataset()
