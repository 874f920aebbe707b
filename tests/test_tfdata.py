"""The export: same batches, known shapes and cardinality, nests kept, no copy, errors that name the leaf."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.loaded import LoadedDataset
from tests import transforms
from tests.census import eventually
from tests.support import lies_in_a_slot

_DATA = np.arange(23)


@pytest.fixture(scope="module", autouse=True)
def pool(running_pool: keras_mp.WorkerPool) -> keras_mp.WorkerPool:
    """One for all tests of this module."""
    return running_pool


def _dataset(transform: Any = None, **options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(_DATA, transform, **{"batch_size": 4, "workers": 0, **options})


def _values(exported: Any) -> list[list[int]]:
    return [batch.numpy().tolist() for batch in exported]


@pytest.mark.parametrize("on_pool", [True, False], ids=["workers", "in-process"])
def test_the_export_has_the_batches_of_the_dataset(pool: keras_mp.WorkerPool, on_pool: bool) -> None:  # P2
    engine: dict[str, Any] = {"pool": pool, "workers": None} if on_pool else {}
    options = {"transform": transforms.with_random, "shuffle": True, "seed": 4}
    with _dataset(**options) as dataset:
        expected = [list(dataset), list(dataset)]
    with _dataset(**options, **engine) as dataset:
        exported = dataset.to_tf_dataset()
        for epoch in expected:  # reshuffled in each iteration
            got = list(exported)
            assert len(got) == len(epoch)
            for one, other in zip(got, epoch, strict=True):
                assert list(one) == list(other)
                for key in other:
                    np.testing.assert_array_equal(one[key], other[key])
        assert dataset.epoch == 2


def test_several_epochs_in_one_iteration(pool: keras_mp.WorkerPool) -> None:  # P1
    with _dataset(shuffle=True, seed=1, pool=pool, workers=None) as dataset:
        epochs = [_values(dataset.to_tf_dataset()) for _ in range(4)]
        assert dataset.epoch == 4
        dataset.set_epoch(0)
        exported = dataset.to_tf_dataset(epochs=2)
        assert exported.cardinality() == 12
        assert _values(exported) == epochs[0] + epochs[1]
        assert _values(exported) == epochs[2] + epochs[3]


@pytest.mark.parametrize(
    ("options", "axis", "count"),
    [
        ({}, None, 6),
        ({"drop_remainder": True}, 4, 5),
        ({"batch_size": 23}, 23, 1),
        ({"drop_remainder": True, "on_error": "skip"}, None, 5),
        ({"drop_remainder": True, "on_error": "replace"}, 4, 5),
        ({"drop_remainder": True, "collate": np.stack}, None, 5),
    ],
)
def test_shapes_and_cardinality_are_known(options: dict[str, Any], axis: int | None, count: int) -> None:
    with (
        _dataset(transforms.image_and_label, **options) if "collate" not in options else _dataset(**options) as dataset
    ):
        exported = dataset.to_tf_dataset()
        assert exported.cardinality() == count
        spec = exported.element_spec
        if "collate" in options:
            assert spec == tf.TensorSpec((axis,), tf.int64)
        else:
            assert spec == (tf.TensorSpec((axis, 4, 4, 1), tf.float32), tf.TensorSpec((axis,), tf.int64))
        assert sum(1 for _ in exported) == count


def test_nests_are_kept(pool: keras_mp.WorkerPool) -> None:
    with _dataset(transforms.nest, pool=pool, workers=None) as dataset:
        exported = dataset.to_tf_dataset()
        for batch, own in zip(exported, dataset, strict=True):
            inputs, pair, weight = batch
            assert set(inputs) == {"image", "name", "deep"}
            np.testing.assert_array_equal(inputs["image"], own[0]["image"])
            assert inputs["name"].numpy().tolist() == [name.encode() for name in own[0]["name"]]
            np.testing.assert_array_equal(inputs["deep"]["a"][0], own[0]["deep"]["a"][0])
            assert isinstance(inputs["deep"]["a"], tuple)
            assert isinstance(pair, transforms.Pair)
            assert pair.x.dtype == tf.bool
            assert pair.y.numpy().tolist() == [b"\x00raw\x00"] * len(own[1].y)
            assert weight is None


def test_the_tensors_lie_in_the_slots(pool: keras_mp.WorkerPool) -> None:
    """Zero-copy: the addresses that TensorFlow has are in the memory that the workers wrote to."""
    with keras_mp.PoolDataset(np.arange(64), transforms.image_and_label, batch_size=8, pool=pool) as dataset:
        addresses = [np.asarray(part).ctypes.data for batch in dataset.to_tf_dataset() for part in batch]
        assert len(addresses) == 16
        assert all(address % 64 == 0 for address in addresses)
        assert all(map(lies_in_a_slot, addresses))


def test_tensors_that_are_held_are_not_overwritten(pool: keras_mp.WorkerPool) -> None:  # P6
    with keras_mp.PoolDataset(np.arange(200), transforms.image_and_label, batch_size=4, pool=pool) as dataset:
        held = list(dataset.to_tf_dataset(epochs=2))
        for number, (images, labels) in enumerate(held):
            first = number % 50 * 4
            assert images.numpy()[:, 0, 0, 0].tolist() == [first, first + 1, first + 2, first + 3]
            assert labels.numpy().tolist() == [0, 1, 0, 1]
    assert held[3][0].numpy()[0, 0, 0, 0] == 12  # also after close


def test_slots_come_back_from_tensorflow(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(np.arange(400), transforms.image_and_label, batch_size=4, pool=pool) as dataset:
        for _ in range(2):
            for _batch in dataset.to_tf_dataset(prefetch=2):
                pass
        assert dataset.stats()["slots"] < 40


def test_works_with_the_methods_of_tf_data() -> None:
    with _dataset(shuffle=False) as dataset:
        exported = dataset.to_tf_dataset()
        assert _values(exported.take(2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert _values(exported.skip(4)) == [[16, 17, 18, 19], [20, 21, 22]]
        assert _values(exported.repeat(2)) == _values(exported) * 2
        assert exported.repeat(2).cardinality() == 12
        assert _values(exported.unbatch().batch(20)) == [list(range(20)), [20, 21, 22]]
        assert _values(exported.map(lambda x: x * 2).take(1)) == [[0, 2, 4, 6]]
        both = tf.data.Dataset.zip((exported, exported))
        assert [(one.numpy().tolist(), other.numpy().tolist()) for one, other in both.take(1)] == [([0, 1, 2, 3],) * 2]
        cached = exported.cache()
        assert _values(cached) == _values(cached)


def test_an_iteration_that_is_given_up_leaves_nothing(pool: keras_mp.WorkerPool) -> None:  # P4
    dataset = _dataset(pool=pool, workers=None)
    iterator = iter(dataset.to_tf_dataset())
    assert next(iterator).shape == (4,)
    del iterator
    gc.collect()
    assert eventually(lambda: dataset.stats()["queued"] + dataset.stats()["running"] == 0)
    dataset.close()


def test_two_iterators_at_once(pool: keras_mp.WorkerPool) -> None:  # P1: each is an epoch of its own
    with _dataset(shuffle=True, seed=2, pool=pool, workers=None) as dataset:
        exported = dataset.to_tf_dataset()
        pairs = [(one.numpy().tolist(), other.numpy().tolist()) for one, other in zip(exported, exported, strict=True)]
        for side in (0, 1):
            assert sorted(value for pair in pairs for value in pair[side]) == list(range(23))


# -- contradictions --------------------------------------------------------------------------------------------------


def _error(dataset: LoadedDataset, spec: Any = None) -> str:
    with pytest.raises(tf.errors.OpError) as caught:
        list(dataset.to_tf_dataset(element_spec=spec))
    return str(caught.value)


@pytest.mark.parametrize(
    ("later", "expected", "received"),
    [
        (lambda n: np.zeros((n, 3, 2), np.float32), "expected shape (None, 3) and dtype float32", "shape (4, 3, 2)"),
        (lambda n: np.zeros((n, 4), np.float32), "expected shape (None, 3) and dtype float32", "shape (4, 4)"),
        (lambda n: np.zeros((n, 3)), "expected shape (None, 3) and dtype float32", "dtype float64"),
        (lambda n: np.array([["a"] * 3] * n), "expected shape (None, 3) and dtype float32", "dtype <U1"),
    ],
)
def test_a_batch_that_contradicts_the_spec_is_named(later: Any, expected: str, received: str) -> None:
    def collate(samples: list[int]) -> Any:
        count = len(samples)
        x = np.zeros((count, 3), np.float32) if samples[0] < 8 else later(count)
        return {"a": x, "b": (np.zeros(count), x)}

    with _dataset(collate=collate) as dataset:
        text = _error(dataset)
        assert "batch['a'] contradicts the element_spec" in text
        assert expected in text
        assert received in text
        assert "element_spec=" in text


def test_a_batch_of_another_structure_is_named() -> None:
    def collate(samples: list[int]) -> Any:
        return {"a": np.zeros(4), **({"b": np.zeros(4)} if samples[0] >= 8 else {})}

    with _dataset(collate=collate) as dataset:
        text = _error(dataset)
        assert "['a']" in text
        assert "['b']" in text
        assert "structure" in text


def test_a_spec_of_the_users_allows_ragged_batches() -> None:
    def collate(samples: list[int]) -> Any:
        return np.zeros((len(samples), samples[0] + 1), np.float32), np.array(samples)

    spec = (tf.TensorSpec((None, None), tf.float32), tf.TensorSpec((None,), tf.int64))
    with _dataset(collate=collate) as dataset:
        exported = dataset.to_tf_dataset(element_spec=spec)
        assert exported.element_spec == spec
        assert [batch[0].shape[1] for batch in exported] == [1, 5, 9, 13, 17, 21]
    with _dataset(collate=collate) as dataset:
        wrong = (tf.TensorSpec((None, 7), tf.float32), tf.TensorSpec((None,), tf.int64))
        assert "batch[0] contradicts the element_spec: expected shape (None, 7)" in _error(dataset, wrong)


def test_a_dtype_tensorflow_does_not_know() -> None:
    with _dataset(lambda value: np.datetime64(int(value), "D")) as dataset:
        with pytest.raises(keras_mp.KerasMPError, match=r"batch has dtype datetime64\[D\]"):
            dataset.to_tf_dataset()


def test_big_endian_and_bfloat16_batches() -> None:
    import ml_dtypes

    def collate(samples: list[int]) -> Any:
        return np.array(samples, ">i4"), np.array(samples, ml_dtypes.bfloat16)

    with _dataset(collate=collate) as dataset:
        one, other = next(iter(dataset.to_tf_dataset()))
        assert (one.dtype, one.numpy().tolist()) == (tf.int32, [0, 1, 2, 3])
        assert (other.dtype, other.numpy().tolist()) == (tf.bfloat16, [0, 1, 2, 3])


def test_a_failing_sample_reaches_the_consumer_with_its_traceback(pool: keras_mp.WorkerPool) -> None:  # P5
    with _dataset(transforms.fail_on_seven, pool=pool, workers=None) as dataset:
        text = _error(dataset)
        assert "transform failed on sample 7" in text
        assert "seven is broken" in text
        assert "fail_on_seven" in text


def test_what_comes_before_an_error_is_delivered(pool: keras_mp.WorkerPool) -> None:  # P1, P5
    with keras_mp.PoolDataset(np.arange(40), transforms.fail_on_seven, batch_size=1, pool=pool) as dataset:
        for _ in range(2):
            got: list[int] = []
            with pytest.raises(tf.errors.InvalidArgumentError, match="sample 7"):
                got.extend(int(batch[0]) for batch in dataset.to_tf_dataset(prefetch=0))
            assert got == list(range(7))


def test_small_batches_of_several_shapes(pool: keras_mp.WorkerPool) -> None:  # P1
    with keras_mp.PoolDataset(np.arange(101), batch_size=3, shuffle=True, seed=2, pool=pool) as dataset:
        for _ in range(3):
            got = [batch.numpy().tolist() for batch in dataset.to_tf_dataset(epochs=2)]
            assert [len(batch) for batch in got] == ([3] * 33 + [2]) * 2
            for epoch in (got[:34], got[34:]):
                assert sorted(itertools.chain.from_iterable(epoch)) == list(range(101))


def _padded(batch: Any) -> Any:
    """A batch function whose second leaf is longer than the batch, and varies."""
    return batch, np.repeat(batch, 2 + int(batch[0]) % 3)


def test_the_batch_axis_is_static_where_it_is_the_batchs() -> None:
    with keras_mp.PoolDataset(
        np.arange(12), batch_transform=_padded, batch_size=4, drop_remainder=True, workers=0
    ) as dataset:
        export = dataset.to_tf_dataset()
        batch, repeated = export.element_spec
        assert batch.shape == (4,)
        assert repeated.shape.as_list() == [None]
        assert [r.shape.as_list() for _, r in export] == [[8], [12], [16]]
