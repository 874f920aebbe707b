"""What a model gets on its backend: the nests that the code made, and tensors in the memory that the workers wrote to.

`make test` runs this folder once on each backend, in a process of its own, as Keras fixes its backend at import.
"""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.support import lies_in_a_slot

_BACKEND = keras.backend.backend()


@pytest.fixture(scope="module", autouse=True)
def pool(running_pool: keras_mp.WorkerPool) -> keras_mp.WorkerPool:
    """One for all tests of this module."""
    return running_pool


def test_a_model_that_is_not_built_yet_predicts_in_order(pool: keras_mp.WorkerPool) -> None:
    def sample(index: int) -> Any:
        return np.full(3, index, np.float32)

    model = keras.Sequential([keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    with keras_mp.PoolDataset(range(45), sample, batch_size=4, pool=pool) as data:
        for _ in range(2):
            assert model.predict(data, verbose=0)[:, 0].tolist() == [3.0 * index for index in range(45)]


# -- nests -----------------------------------------------------------------------------------------------------------


def _pair(index: int) -> Any:
    return [np.full(3, index, np.float32), np.full(2, index, np.float32)], np.float32(index)


def test_lists_of_inputs(pool: keras_mp.WorkerPool) -> None:
    """TensorFlow takes a list for a tensor, so Keras gets tuples there; everybody else gets what the code made."""

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            inputs, y = _pair(index)
            return [np.stack([part] * 4) for part in inputs], np.full(4, y)

    a, b = keras.Input((3,)), keras.Input((2,))
    model = keras.Model([a, b], keras.layers.Dense(1)(keras.layers.Concatenate()([a, b])))
    model.compile("sgd", "mse")
    with (
        keras_mp.PoolDataset(range(12), _pair, batch_size=4, pool=pool) as data,
        keras_mp.parallelize(Batches(), pool=pool) as given,
    ):
        for dataset in data, given:
            model.fit(dataset, validation_data=dataset, epochs=2, verbose=0)
            assert model.predict(dataset, verbose=0).shape == (12, 1)
            assert type(dataset[0][0]) is type(next(iter(dataset))[0]) is list


# -- memory ----------------------------------------------------------------------------------------------------------


class Holder(keras.Model):
    """A model that keeps all that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.held: list[Any] = []

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.cast(x["image"], "float32"))

    def train_step(self, *state_and_data: Any) -> Any:  # on JAX, there is a state
        self.held.append(state_and_data[-1])
        return super().train_step(*state_and_data)


def _image_and_number(index: int) -> Any:
    return {"image": np.full(500, index % 200, np.uint8), "weight": np.full(3, index, np.float32)}, np.int64(index)


def _held(pool: keras_mp.WorkerPool, transform: Any = _image_and_number) -> list[Any]:
    """The batches that a model has got in two epochs of 20, in order."""
    model = Holder()
    model.compile("sgd", "mse", run_eagerly=True)
    with keras_mp.PoolDataset(range(80), transform, batch_size=4, pool=pool, max_queue_size=3) as dataset:
        model.fit(dataset, epochs=2, shuffle=False, verbose=0)
    return model.held[-40:]  # before them, there may be one to build the model


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr() if _BACKEND == "torch" else np.asarray(tensor).ctypes.data)


def test_the_model_gets_the_memory_that_the_workers_wrote_to_and_keeps_it(pool: keras_mp.WorkerPool) -> None:
    held = _held(pool)
    addresses = [_address(tensor) for batch in held for tensor in keras.tree.flatten(batch)]
    assert all(map(lies_in_a_slot, addresses))
    assert len(set(addresses)) == len(addresses) == 40 * 3
    for number, (x, y) in enumerate(held):  # P6
        expected = np.arange(4) + number % 20 * 4
        np.testing.assert_array_equal(np.asarray(x["image"])[:, 0], expected % 200)
        np.testing.assert_array_equal(np.asarray(x["weight"])[:, 2], expected)
        np.testing.assert_array_equal(np.asarray(y), expected)


@pytest.mark.skipif(_BACKEND != "torch", reason="of torch's dtypes")
def test_what_torch_has_no_such_tensor_for_is_left_to_keras(pool: keras_mp.WorkerPool) -> None:
    def sample(index: int) -> Any:
        return {"image": np.full(5, 65_000 + index, np.uint16)}, np.uint32(index)

    for number, (x, y) in enumerate(_held(pool, sample)):
        expected = np.arange(4) + number % 20 * 4
        assert (str(x["image"].dtype), str(y.dtype)) == ("torch.int32", "torch.int64")
        assert x["image"][:, 0].tolist() == (65_000 + expected).tolist()
        assert y.tolist() == expected.tolist()


@pytest.mark.skipif(_BACKEND != "torch", reason="of torch's DataLoader")
def test_a_lone_array_on_torch(pool: keras_mp.WorkerPool) -> None:
    model = keras.Sequential([keras.layers.Rescaling(2.0)])
    source = np.arange(24, dtype=np.float32).reshape(8, 3)
    with keras_mp.PoolDataset(source, batch_size=3, pool=pool) as dataset:
        np.testing.assert_array_equal(model.predict(dataset, verbose=0), source * 2)


@pytest.mark.skipif(_BACKEND != "jax", reason="of JAX's arrays and compiled functions")
def test_jax_takes_the_memory_over_also_in_a_compiled_function(pool: keras_mp.WorkerPool) -> None:
    """Keras hands the arrays to a compiled step; that it reads where they lie is seen by changing them meanwhile."""
    import jax

    inside, changed = threading.Event(), threading.Event()

    def wait(_: Any) -> Any:
        inside.set()
        assert changed.wait(60)
        return np.float32(1)

    @jax.jit
    def total(x: Any) -> Any:
        return (x * jax.pure_callback(wait, np.zeros((), np.float32), x[0, 0])).sum()

    source = np.ones((400, 100), np.float32)
    with keras_mp.PoolDataset(source, batch_size=4, pool=pool, max_queue_size=3) as dataset:
        held = [jax.device_put(batch) for batch in dataset]
        assert all(lies_in_a_slot(array.unsafe_buffer_pointer()) for array in held)
        assert all((np.asarray(array) == 1).all() for array in held)  # P6
        batch = dataset[0]
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            future = executor.submit(total, batch)
            assert inside.wait(60)
            batch[...] = 2
            changed.set()
            assert float(future.result(60)) == 2 * batch.size
