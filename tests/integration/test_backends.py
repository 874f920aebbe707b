"""JAX and torch, each in a process of its own, as Keras fixes its backend at import."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path

import pytest

from tests.support import run_script

_CODE = textwrap.dedent(
    """
    import keras
    import numpy as np
    import keras_mp

    def sample(index):
        return np.full(3, index, np.float32), np.float32(index)

    seen = []

    def remember(index, batch):
        return batch

    options = {"batch_size": 4, "workers": 2}
    with keras_mp.PoolDataset(range(45), sample, **options) as data, \\
            keras_mp.PoolDataset(np.linspace(0, 1, 45), sample, shuffle=True, seed=1, **options) as train:
        model = keras.Sequential([keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
        predicted = model.predict(data, verbose=0)[:, 0]  # of a model that is not built yet
        print("in order", predicted.tolist() == [3.0 * index for index in range(45)])
        predicted = model.predict(data, verbose=0)[:, 0]
        print("again", predicted.tolist() == [3.0 * index for index in range(45)])
        model.compile(keras.optimizers.Adam(0.05), "mse")
        history = model.fit(train, validation_data=data, epochs=10, verbose=0).history
        print("trains", history["loss"][-1] < history["loss"][0] / 4, len(history["val_loss"]))
        x = np.concatenate([batch[0] for batch in data])
        y = np.concatenate([batch[1] for batch in data])
        print("evaluates", np.allclose(model.evaluate(data, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-4))
        print(keras.backend.backend())
    """
)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_fit_evaluate_and_predict(tmp_path: Path, backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    output = run_script(tmp_path / "train.py", _CODE, KERAS_BACKEND=backend)
    assert output.splitlines() == ["in order True", "again True", "trains True 10", "evaluates True", backend]


_LISTS = textwrap.dedent(
    """
    import keras
    import numpy as np
    import keras_mp

    def sample(index):
        return [np.full(3, index, np.float32), np.full(2, index, np.float32)], np.float32(index)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            inputs, y = sample(index)
            return [np.stack([part] * 4) for part in inputs], np.full(4, y)

    a, b = keras.Input((3,)), keras.Input((2,))
    model = keras.Model([a, b], keras.layers.Dense(1)(keras.layers.Concatenate()([a, b])))
    model.compile("sgd", "mse")
    with keras_mp.PoolDataset(range(12), sample, batch_size=4, workers=1) as data, \\
            keras_mp.parallelize(Batches(), workers=1) as given:
        for dataset in data, given:
            model.fit(dataset, validation_data=dataset, epochs=2, verbose=0)
            print(model.predict(dataset, verbose=0).shape, type(dataset[0][0]), type(next(iter(dataset))[0]))
    """
)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_lists_of_inputs(tmp_path: Path, backend: str) -> None:
    """TensorFlow takes a list for a tensor, so Keras gets tuples there; everybody else gets what the code made."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    output = run_script(tmp_path / "train.py", _LISTS, KERAS_BACKEND=backend)
    assert output.splitlines() == ["(12, 1) <class 'list'> <class 'list'>"] * 2
