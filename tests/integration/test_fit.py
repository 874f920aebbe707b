"""Real Keras, on whichever backend it runs: fit, evaluate and predict on datasets and on their exports."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests import transforms
from tests.census import eventually
from tests.support import needs_tensorflow

_SAMPLES = 50
_BATCH = 8
_BATCHES = 7


pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module", autouse=True)
def pool(running_pool: keras_mp.WorkerPool) -> keras_mp.WorkerPool:
    """One for all tests of this module."""
    return running_pool


@pytest.fixture(autouse=True)
def _fresh_keras() -> Iterator[None]:
    keras.utils.set_random_seed(1)
    yield
    keras.backend.clear_session()


def _flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


class Recorder(keras.Model):
    """A model that writes down what it is trained and tested on, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.seen: list[list[int]] = []
        self.tested: list[list[int]] = []
        self.weights_seen: list[Any] = []

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.reshape(x, (-1, 16)))

    def train_step(self, *state_and_data: Any) -> Any:  # on JAX, there is a state
        *state, data = state_and_data
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        self.seen.append([int(value) for value in np.asarray(x)[:, 0, 0, 0]])
        self.weights_seen.append(None if weight is None else np.asarray(weight).tolist())
        return super().train_step(*state, (x, y, weight))

    def test_step(self, *state_and_data: Any) -> Any:
        self.tested.append([int(value) for value in np.asarray(state_and_data[-1][0])[:, 0, 0, 0]])
        return super().test_step(*state_and_data)

    def epochs(self, batches: int = _BATCHES) -> list[list[int]]:
        """The samples of each epoch, in order."""
        return [_flat(self.seen[start : start + batches]) for start in range(0, len(self.seen), batches)]


@pytest.fixture
def model() -> Recorder:
    made = Recorder()
    made.compile(keras.optimizers.SGD(1e-6), "mse", run_eagerly=True)
    return made


def _dataset(count: int = _SAMPLES, **options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(range(count), transforms.image_and_label, **{"batch_size": _BATCH, **options})


def _fit(model: keras.Model, data: Any, **options: Any) -> Any:
    """`fit`, without the `shuffle=True` that Keras itself warns of where it is of no use."""
    by_keras = isinstance(data, keras.utils.PyDataset)
    return model.fit(data, **{"verbose": 0, "shuffle": by_keras, **options})


_WAYS: dict[str, Callable[[keras_mp.PoolDataset], Any]] = {"dataset": lambda dataset: dataset}
if importlib.util.find_spec("tensorflow"):  # whichever backend trains on it
    _WAYS["export"] = lambda dataset: dataset.to_tf_dataset()


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
def test_fit_sees_every_sample_once_an_epoch(pool: keras_mp.WorkerPool, model: Recorder, way: Any) -> None:  # P1
    with _dataset(shuffle=True, seed=1, pool=pool) as train, _dataset(20, pool=pool) as val:
        history = _fit(model, way(train), validation_data=way(val), epochs=3)
    epochs = model.epochs()
    assert [sorted(epoch) for epoch in epochs] == [list(range(_SAMPLES))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert _flat(model.tested) == list(range(20)) * 3
    assert len(history.history["val_loss"]) == 3
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
def test_evaluate_and_predict(pool: keras_mp.WorkerPool, model: Recorder, way: Any) -> None:
    with _dataset(pool=pool) as dataset:
        x = np.concatenate([batch[0] for batch in dataset])
        y = np.concatenate([batch[1] for batch in dataset])
        expected = model.predict(x, verbose=0)
        np.testing.assert_allclose(model.predict(way(dataset), verbose=0), expected, rtol=1e-5)
        loss = model.evaluate(way(dataset), verbose=0)
        np.testing.assert_allclose(loss, model.evaluate(x, y, verbose=0), rtol=1e-4)
        assert _flat(model.tested[:_BATCHES]) == list(range(_SAMPLES))


def test_both_ways_and_the_plain_arrays_train_the_same(pool: keras_mp.WorkerPool) -> None:  # P2
    def losses(data: Any) -> Any:
        keras.utils.set_random_seed(3)
        made = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(1)])
        made.compile(keras.optimizers.SGD(1e-6), "mse")
        return made.fit(
            *data, batch_size=None if len(data) == 1 else _BATCH, epochs=3, shuffle=False, verbose=0
        ).history

    with _dataset(pool=pool) as dataset:
        arrays = [np.concatenate(parts) for parts in zip(*dataset, strict=True)]
        expected = losses(arrays)["loss"]
        for way in _WAYS.values():
            np.testing.assert_allclose(losses([way(dataset)])["loss"], expected, rtol=1e-4)


def test_fit_gives_the_same_batches_wherever_they_are_loaded(
    pool: keras_mp.WorkerPool, processes: concurrent.futures.Executor
) -> None:  # P2
    def seen(**engine: Any) -> list[list[int]]:
        keras.utils.set_random_seed(5)
        made = Recorder()
        made.compile(keras.optimizers.SGD(1e-6), "mse", run_eagerly=True)
        with _dataset(shuffle=True, seed=2, **engine) as dataset:
            made.fit(dataset, epochs=2, shuffle=False, verbose=0)
        return made.seen

    expected = seen(workers=0)
    assert seen(pool=pool) == expected
    assert seen(pool=processes) == expected
    assert seen(workers=2, use_multiprocessing=False) == expected


def test_class_weight(pool: keras_mp.WorkerPool, model: Recorder) -> None:
    with _dataset(pool=pool) as dataset:
        for way in _WAYS.values():
            model.seen.clear()
            model.weights_seen.clear()
            _fit(model, way(dataset), class_weight={0: 1.0, 1: 3.0})
            for samples, weights in zip(model.seen, model.weights_seen, strict=True):
                assert weights == [3.0 if sample % 2 else 1.0 for sample in samples]


def test_sample_weight(pool: keras_mp.WorkerPool, model: Recorder) -> None:
    def weighted(index: int) -> Any:
        return (*transforms.image_and_label(index), np.float32(index))

    with keras_mp.PoolDataset(range(_SAMPLES), weighted, batch_size=_BATCH, pool=pool) as dataset:
        for way in _WAYS.values():
            model.seen.clear()
            model.weights_seen.clear()
            _fit(model, way(dataset))
            assert model.weights_seen == [[float(sample) for sample in batch] for batch in model.seen]


@needs_tensorflow
def test_no_sample_weight(pool: keras_mp.WorkerPool, model: Recorder) -> None:
    def weighted(index: int) -> Any:
        return (*transforms.image_and_label(index), None)

    with keras_mp.PoolDataset(range(_SAMPLES), weighted, batch_size=_BATCH, pool=pool) as dataset:
        _fit(model, dataset.to_tf_dataset())  # from a PyDataset, Keras itself does not take it on TensorFlow
        assert dataset[0][2] is None
    assert model.weights_seen == [None] * _BATCHES


def test_steps_per_epoch(pool: keras_mp.WorkerPool, model: Recorder) -> None:  # P1
    with _dataset(48, shuffle=True, seed=1, pool=pool) as dataset:
        model.fit(dataset, steps_per_epoch=3, epochs=4, verbose=0)
        assert [sorted(epoch) for epoch in model.epochs(6)] == [list(range(48))] * 2
        if "export" in _WAYS:
            model.seen.clear()
            _fit(model, dataset.to_tf_dataset().repeat(), steps_per_epoch=3, epochs=4)
            assert [sorted(epoch) for epoch in model.epochs(6)] == [list(range(48))] * 2


def test_dict_inputs_and_several_outputs(pool: keras_mp.WorkerPool) -> None:
    def sample(index: int) -> Any:
        x = {"a": np.full(3, index / 50, np.float32), "b": np.array([index % 2], np.float32)}
        return x, {"sum": x["a"].sum(), "same": x["b"]}

    a, b = keras.Input((3,), name="a"), keras.Input((1,), name="b")
    outputs = {"sum": keras.layers.Dense(1, name="sum")(a), "same": keras.layers.Dense(1, name="same")(b)}
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile(keras.optimizers.Adam(0.05), {"sum": "mse", "same": "mse"})
    with keras_mp.PoolDataset(range(64), sample, batch_size=8, shuffle=True, pool=pool) as dataset:
        first = model.evaluate(dataset, verbose=0, return_dict=True)
        model.fit(dataset, epochs=8, verbose=0)
        _fit(model, dataset.to_tf_dataset(epochs=2) if "export" in _WAYS else dataset, epochs=4)
        last = model.evaluate(dataset, verbose=0, return_dict=True)
        assert last["loss"] < first["loss"] / 4
        assert set(model.predict(dataset, verbose=0)) == {"sum", "same"}


def test_training_learns(pool: keras_mp.WorkerPool) -> None:
    def sample(index: int, rng: np.random.Generator) -> Any:
        image = rng.normal(size=(8, 8, 1)).astype(np.float32)
        image[:4] += 2 * (index % 2)
        return image, index % 2

    model = keras.Sequential(
        [keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    model.compile(
        keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    with keras_mp.PoolDataset(range(256), sample, batch_size=16, shuffle=True, seed=1, pool=pool) as dataset:
        model.fit(dataset, epochs=4, verbose=0)
        assert model.evaluate(dataset, verbose=0)[1] > 0.95


def test_a_failing_sample_ends_fit_with_its_name(pool: keras_mp.WorkerPool, model: Recorder) -> None:  # P5
    def sample(index: int) -> Any:
        if index == 17:
            raise ValueError("tile is truncated")
        return transforms.image_and_label(index)

    with keras_mp.PoolDataset(range(_SAMPLES), sample, batch_size=_BATCH, pool=pool) as dataset:
        for way in _WAYS.values():
            with pytest.raises(Exception, match="tile is truncated") as caught:
                model.fit(way(dataset), shuffle=False, verbose=0)
            assert "transform failed on sample 17 (17), batch 2 of epoch" in str(caught.value)


def test_failures_are_told_once_an_epoch_of_fit(pool: keras_mp.WorkerPool, model: Recorder) -> None:  # P5
    def sample(index: int) -> Any:
        if index in (3, 17):
            raise ValueError("tile is truncated")
        return transforms.image_and_label(index)

    with keras_mp.PoolDataset(range(_SAMPLES), sample, batch_size=_BATCH, on_error="skip", pool=pool) as dataset:
        with pytest.warns(RuntimeWarning, match="2 of 50 samples failed in epoch") as warned:
            model.fit(dataset, epochs=3, verbose=0)
            dataset.close()
    assert len([w for w in warned if "samples failed" in str(w.message)]) == 3
    assert sorted({failure.index for failure in dataset.failures if failure.index is not None}) == [3, 17]
    assert [len(epoch) for epoch in model.epochs()] == [_SAMPLES - 2] * 3


# -- parallelize -----------------------------------------------------------------------------------------------------


def _existing() -> keras.utils.PyDataset:
    """The usual shape of a user's own dataset: it reshuffles itself after each epoch."""

    class Existing(keras.utils.PyDataset):  # local, so that workers do not import this module
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.rng = np.random.default_rng(7)
            self.order = np.arange(_SAMPLES)

        def __len__(self) -> int:
            return _BATCHES

        def __getitem__(self, index: int) -> Any:
            rows = self.order[index * _BATCH : (index + 1) * _BATCH]
            return np.repeat(rows, 16).reshape(-1, 4, 4, 1).astype(np.float32), rows % 2

        def on_epoch_end(self) -> None:
            self.order = self.rng.permutation(self.order)

    return Existing()


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_unmodified_pydataset_trains_the_same(pool: keras_mp.WorkerPool, shuffle: bool) -> None:
    def seen(data: Any) -> list[list[int]]:
        keras.utils.set_random_seed(5)
        made = Recorder()
        made.compile(keras.optimizers.SGD(1e-6), "mse", run_eagerly=True)
        made.fit(data, epochs=4, shuffle=shuffle, verbose=0)
        return made.seen

    def epochs(batches: list[list[int]]) -> list[list[list[int]]]:
        return [batches[start : start + _BATCHES] for start in range(0, len(batches), _BATCHES)]

    expected = seen(_existing())
    assert len({tuple(batch) for batch in expected}) > 2 * _BATCHES  # it does reshuffle
    trained = []
    for engine in ({"pool": pool}, {"workers": 2, "use_multiprocessing": False}, {"workers": 0}):
        with keras_mp.parallelize(_existing(), **engine) as dataset:
            trained.append(seen(dataset))
    assert trained[0] == trained[1] == trained[2]
    if shuffle:  # the order of the batches is then ours, whatever Keras's
        assert [sorted(epoch) for epoch in epochs(trained[0])] == [sorted(epoch) for epoch in epochs(expected)]
    else:
        assert trained[0] == expected


def test_a_parallelized_pydataset_as_validation_data(pool: keras_mp.WorkerPool, model: Recorder) -> None:
    with keras_mp.parallelize(_existing(), pool=pool) as train, keras_mp.parallelize(_existing(), pool=pool) as val:
        model.fit(train, validation_data=val, epochs=3, verbose=0)
    assert [sorted(epoch) for epoch in model.epochs()] == [list(range(_SAMPLES))] * 3
    tested = [_flat(model.tested[start : start + _BATCHES]) for start in range(0, 3 * _BATCHES, _BATCHES)]
    assert [sorted(epoch) for epoch in tested] == [list(range(_SAMPLES))] * 3


@needs_tensorflow
@pytest.mark.any_backend  # elsewhere, the first epoch goes to build the model
def test_the_export_of_a_parallelized_pydataset(pool: keras_mp.WorkerPool, model: Recorder) -> None:
    expected, plain = [], _existing()
    for _ in range(3):
        expected.append([int(value) for batch in range(_BATCHES) for value in plain[batch][0][:, 0, 0, 0]])
        plain.on_epoch_end()
    with keras_mp.parallelize(_existing(), pool=pool) as dataset:
        _fit(model, dataset.to_tf_dataset(), epochs=3)
    assert model.epochs() == expected


def test_pool_keras_leaves_the_work_to_keras() -> None:
    dataset = _dataset(workers=3, pool="keras", max_queue_size=5)
    assert (dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size) == (3, True, 5)
    ours = _dataset(workers=3, max_queue_size=5)
    assert (ours.workers, ours.use_multiprocessing) == (1, False)
    dataset.close()
    ours.close()


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_read_ahead_from_its_begin_and_its_batches_are_loaded_once(shuffle: bool) -> None:
    """Keras asks for an epoch's first batch a while after it has told that the epoch begins."""
    loaded: list[int] = []

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            loaded.append(index)
            return np.zeros((2, 3)), np.zeros((2, 1))

    class Begin(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            loaded.clear()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch:  # of the first, Keras looks at two batches beforehand
                assert set(loaded) == set(range(20))
                # As the pass begins, Keras or torch may draw from a generator that the two threads' code might have
                # drawn from: what they are at is then loaded again.
                assert len(loaded) <= 20 + 2

    with keras_mp.parallelize(Batches(), workers=2, use_multiprocessing=False) as dataset:
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        model.fit(dataset, epochs=5, shuffle=shuffle, verbose=0, callbacks=[Begin()])


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_is_read_ahead_before_its_first_batch_is_asked_for(shuffle: bool) -> None:
    loaded: list[int] = []

    def note(sample: int) -> int:
        loaded.append(sample)
        return sample

    with keras_mp.PoolDataset(range(20), note, batch_size=1, workers=2, use_multiprocessing=False) as dataset:
        for _ in range(2):
            dataset.on_epoch_begin()
            numbers = list(range(dataset.num_batches))
            if shuffle:
                random.Random(1).shuffle(numbers)
            for number in numbers:
                dataset[number]
            dataset.on_epoch_end()
        loaded.clear()
        dataset.on_epoch_begin()
        assert eventually(lambda: len(loaded) == 10)
        assert (sorted(loaded) == list(range(10))) is not shuffle


# -- two passes at once ----------------------------------------------------------------------------------------------


def _recorder() -> Recorder:
    made = Recorder()
    made.compile(keras.optimizers.SGD(1e-6), "mse", run_eagerly=True)
    return made


def test_of_two_fits_on_one_dataset_in_two_threads_the_second_is_refused(pool: keras_mp.WorkerPool) -> None:
    errors: list[str] = []

    class Second(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                thread = threading.Thread(target=fit_again)
                thread.start()
                thread.join()

    with _dataset(pool=pool) as dataset:

        def fit_again() -> None:
            try:
                _recorder().fit(dataset, verbose=0)
            except RuntimeError as error:
                errors.append(str(error))

        first = _recorder()
        first.fit(dataset, epochs=2, verbose=0, callbacks=[Second()])
    assert len(errors) == 2 and all("Make a second dataset" in error for error in errors)
    assert [sorted(epoch) for epoch in first.epochs()] == [list(range(_SAMPLES))] * 2


def test_a_fit_that_was_given_up_does_not_stand_in_the_way_of_the_next(pool: keras_mp.WorkerPool) -> None:
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise KeyboardInterrupt

    with _dataset(pool=pool, shuffle=True, seed=2) as dataset, _dataset(workers=0, shuffle=True, seed=2) as plain:
        for _ in range(2):  # the second time from the same line
            with pytest.raises(KeyboardInterrupt):
                _recorder().fit(dataset, verbose=0, callbacks=[Stop()])
        second = _recorder()
        second.fit(dataset, epochs=2, verbose=0)
        expected = [_flat([batch[1] for batch in plain]) for _ in range(2)]
        assert len(second.epochs()) == len(expected)
        assert [sorted(epoch) for epoch in second.epochs()] == [list(range(_SAMPLES))] * 2
        assert dataset.epoch == 2
        with pytest.raises(KeyboardInterrupt):
            _recorder().fit(dataset, verbose=0, callbacks=[Stop()])
        epoch = dataset.epoch
        assert len(list(dataset)) == len(dataset)
        assert dataset.epoch == epoch + 1
