"""Streams of declared, unknown and endless length: in loops, in `fit`, in exports, on several trainers."""

from __future__ import annotations

import itertools
import json
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.consumers import Identity
from tests.shards import LENGTHS, TOTAL, Numbers, all_pairs, assert_equal, endless, pairs, stream, with_label

_COUNT = -(-TOTAL // 4)


@pytest.fixture(scope="module")
def reference() -> list[Any]:
    """The batches of three epochs."""
    with stream() as data:
        return [batch for _ in range(3) for batch in data]


def fitted(data: Any, **options: Any) -> list[Any]:
    model = Identity()
    model.compile(run_eagerly=True)
    model.fit(data, verbose=0, **options)
    return model.seen


# -- declared ------------------------------------------------------------------------------------------------------


def test_declared(running_pool: keras_mp.WorkerPool, reference: list[Any]) -> None:
    with stream(pool=running_pool, length=TOTAL) as data:
        assert len(data) == data.num_batches == _COUNT
        assert_equal(fitted(data, epochs=2), reference[: 2 * _COUNT])
        assert data.epoch == 2
        assert_equal(list(data), reference[2 * _COUNT :])


def test_declared_and_validated(running_pool: keras_mp.WorkerPool) -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    options: dict[str, Any] = {"pool": running_pool, "transform": with_label, "batch_transform": None}
    with stream(length=TOTAL, **options) as train, stream(length=TOTAL, **options) as test:
        history = model.fit(train, epochs=2, validation_data=test, verbose=0)
        assert len(history.history["val_loss"]) == 2
        assert model.predict(test, verbose=0).shape == (TOTAL, 1)


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2, "use_multiprocessing": False}])
@pytest.mark.parametrize("declared", [TOTAL + 1, TOTAL + 2, TOTAL + 3, TOTAL + 50])
def test_shorter_than_declared(options: dict[str, Any], declared: int) -> None:
    with stream(length=declared, **options) as data:
        with pytest.raises(keras_mp.KerasMPError, match=rf"shorter than length={declared}: it has {TOTAL} samples"):
            list(data)


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2, "use_multiprocessing": False}])
@pytest.mark.parametrize("declared", [TOTAL - 1, TOTAL - 2, TOTAL - 6, 40, 5])
def test_longer_than_declared(options: dict[str, Any], declared: int, reference: list[Any]) -> None:
    with stream(length=declared, batch_transform=None, **options) as data:
        for epoch in range(2):
            with pytest.warns(RuntimeWarning, match=rf"longer than length={declared}.* in epoch {epoch}"):
                batches = list(data)
            assert len(batches) == -(-declared // 4)
            assert sum(map(len, batches)) == declared == len(set(pairs(batches)))


def test_too_short_in_fit_is_an_error_and_no_hang(running_pool: keras_mp.WorkerPool) -> None:
    with stream(pool=running_pool, length=TOTAL + 10) as data:
        with pytest.raises(Exception, match=rf"shorter than length={TOTAL + 10}"):
            fitted(data)


def test_count_reads_each_shard_once_and_transforms_nothing(running_pool: keras_mp.WorkerPool) -> None:
    def never(pair: Any) -> Any:
        raise ValueError("transformed")

    with stream(pool=running_pool, transform=never) as data:
        assert data.count() == TOTAL
    damaged = Numbers(accident=(7, 17, "fail"))
    with stream(damaged, pool=running_pool) as data, pytest.raises(OSError, match="damaged"):
        data.count()
    with stream(damaged, pool=running_pool, on_error="skip") as data:
        assert data.count() == TOTAL - LENGTHS[7] + 17


# -- unknown -------------------------------------------------------------------------------------------------------


def test_unknown(running_pool: keras_mp.WorkerPool, reference: list[Any]) -> None:
    with stream(pool=running_pool) as data:
        assert data.num_batches is None
        with pytest.raises(TypeError, match=r"length=None.*steps_per_epoch"):
            len(data)
        assert_equal(list(data), reference[:_COUNT])
        np.testing.assert_array_equal(data[_COUNT - 1], reference[2 * _COUNT - 1])
        with pytest.raises(IndexError, match=f"ended after {_COUNT} batches of epoch 1"):
            data[_COUNT]


def test_fit_needs_steps_which_go_on_over_the_ends_of_epochs(
    running_pool: keras_mp.WorkerPool, reference: list[Any]
) -> None:
    with stream(pool=running_pool) as data:
        with pytest.raises(ValueError, match=r"would never end.*steps_per_epoch=None"):
            fitted(data)
        assert_equal(fitted(data, epochs=3, steps_per_epoch=20), reference[:60])
        assert data.epoch == 2


def test_the_export_ends_by_itself(running_pool: keras_mp.WorkerPool, reference: list[Any]) -> None:
    with stream(pool=running_pool) as data:
        exported = data.to_tf_dataset(epochs=2)
        assert int(exported.cardinality()) == -2  # unknown
        assert_equal([batch.numpy() for batch in exported], reference[: 2 * _COUNT])
        assert data.epoch == 2
    with stream(pool=running_pool) as data, pytest.warns(UserWarning, match="ran out of data"):  # Keras's own
        assert_equal(fitted(data.to_tf_dataset(), epochs=2), reference[: 2 * _COUNT])


def test_one_batch_is_enough(running_pool: keras_mp.WorkerPool) -> None:
    for length in (None, 3):
        with stream(Numbers([3]), pool=running_pool, length=length) as data:
            assert [len(batch) for batch in data] == [3]
            assert [len(batch) for batch in data.to_tf_dataset()] == [3]
            steps = {"steps_per_epoch": 2} if length is None else {}
            assert all(len(batch) == 3 for batch in fitted(data, epochs=2, **steps))


# -- endless -------------------------------------------------------------------------------------------------------


def test_endless(running_pool: keras_mp.WorkerPool) -> None:
    options: dict[str, Any] = {"batch_size": 4, "lanes": 2, "seed": 0}
    with keras_mp.StreamDataset(range(2), endless, pool=running_pool, **options) as data:
        batches = list(itertools.islice(data, 6))
        assert pairs(batches)[:8] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
        assert_equal(fitted(data, epochs=2, steps_per_epoch=3), batches)
        assert_equal([batch.numpy() for batch in data.to_tf_dataset().take(6)], batches)
    with keras_mp.StreamDataset(range(2), endless, length=24, pool=running_pool, **options) as data:
        with pytest.warns(RuntimeWarning, match="longer than length=24"):
            assert_equal(list(data), batches)


# -- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, TOTAL])
def test_a_state_taken_in_an_export_or_between_looks(
    running_pool: keras_mp.WorkerPool, length: int | None, reference: list[Any]
) -> None:
    with stream(length=length, pool=running_pool) as data:
        data[7]
        batches = iter(data)
        for _ in range(9):
            next(batches)
        data[3]
        state = json.loads(json.dumps(data.state_dict()))
    with stream(length=length, seed=None) as other:
        other.load_state_dict(state)
        np.testing.assert_array_equal(other[0], reference[9])
        assert other.state_dict() == state
        assert_equal(list(other), reference[9:_COUNT])


def test_a_state_of_another_stream_is_refused() -> None:
    with stream() as data:
        state = data.state_dict()
    for options in ({"lanes": 5}, {"shuffle": 6}, {"length": TOTAL}, {"batch_size": 3}):
        with stream(**options) as other, pytest.raises(ValueError, match="another dataset"):
            other.load_state_dict(state)


class _Stop(keras.callbacks.Callback):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            raise InterruptedError


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, saving on TensorFlow
@pytest.mark.parametrize(
    ("length", "steps", "at"), [(None, 20, 7), (None, 20, 33), (None, 13, 13), (TOTAL, None, 26), (TOTAL, 10, 7)]
)
def test_backup_and_restore(at: int, length: int | None, steps: int | None, tmp_path: Any) -> None:
    def run(stop: int | None) -> list[Any]:
        seen: list[Any] = []

        class Model(keras.Model):
            def __init__(self) -> None:
                super().__init__()
                self.dense = keras.layers.Dense(1)

            def call(self, x: Any) -> Any:
                return self.dense(x[:, :2] / 30.0)

            def train_step(self, data: Any) -> Any:
                (x,) = data
                seen.append(x.numpy())
                self(x)
                return {"loss": 0.0}

        model = Model()
        model.compile("sgd", run_eagerly=True)
        model(np.zeros((1, 4), "float32"))
        model.optimizer.build(model.trainable_variables)
        with stream(transform=as_floats, length=length) as data:
            callbacks = [] if stop is None else [_Stop(stop)]
            callbacks.append(keras_mp.BackupAndRestore(data, tmp_path / "backup", save_freq=at))
            try:
                model.fit(data, epochs=2, steps_per_epoch=steps, verbose=0, callbacks=list(reversed(callbacks)))
            except InterruptedError:
                pass
        return seen

    with stream(transform=as_floats, workers=0) as data:
        whole = [batch for _ in range(3) for batch in data]
    assert_equal(run(at), whole[:at])
    second = run(None)
    assert_equal(second, whole[at : at + len(second)])
    per_epoch = steps or _COUNT
    assert len(second) == 2 * per_epoch - (at if length else at // per_epoch * per_epoch)


def as_floats(pair: Any, rng: np.random.Generator) -> Any:
    return np.array([*pair, *rng.random(2)], "float32")


# -- several trainers ----------------------------------------------------------------------------------------------


def test_trainers_have_their_own_lanes_and_as_many_steps() -> None:
    lengths = [6, 11, 6, 1, 7, 9, 8, 30]
    total = sum(lengths)
    options: dict[str, Any] = {"read": Numbers(lengths), "batch_transform": None, "length": total}
    found, steps = [], set()
    for index in range(2):
        with stream(**options) as data, data.shard(2, index) as part:
            batches = list(part)
            steps.add(len(batches))
            assert len(part) == len(batches)
            assert {len(batch) for batch in batches} == {4}
            found.append(pairs(batches))
    assert steps == {total // 8}
    assert not set(found[0]) & set(found[1])
    assert set(found[0]) | set(found[1]) <= all_pairs(lengths)


def test_a_trainer_with_too_few_is_given_some_again() -> None:
    lengths = [20, 4, 20, 4]
    with stream(Numbers(lengths), lanes=2, length=sum(lengths), shuffle=0, batch_transform=None) as data:
        with data.shard(2, 1) as part:
            found = pairs(list(part))
    assert len(found) == 24
    assert set(found) == {(shard, offset) for shard in (1, 3) for offset in range(4)}


def test_without_a_length_a_trainer_ends_with_its_lanes() -> None:
    with stream() as data:
        parts = []
        for index in range(2):
            with data.shard(2, index) as part:
                assert part.num_batches is None
                parts.append(pairs(list(part)))
        assert sorted(parts[0] + parts[1]) == sorted(all_pairs())


def test_what_cannot_be_divided() -> None:
    with stream(lanes=4) as data, pytest.raises(ValueError, match=r"num_shards=3 must divide lanes=4.*lanes=6"):
        data.shard(3, 0)
    with stream(Numbers([5]), lanes=4) as data, pytest.raises(ValueError, match="1 shards are too few"):
        data.shard(2, 0)


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"shards": []}, ValueError, "shards is empty"),
        ({"shards": "files"}, TypeError, "shards must be a sequence"),
        ({"read": 3}, TypeError, "read must be a function"),
        ({"read": lambda shard, size: ()}, TypeError, "needs size too"),
        ({"read": lambda shard, rng: ()}, ValueError, "takes rng"),
        ({"shuffle": True}, TypeError, "shuffle must be the number"),
        ({"shuffle": -1}, ValueError, "shuffle must be at least 0"),
        ({"lanes": 0}, ValueError, "lanes must be at least 1"),
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"length": 3, "batch_size": 4, "drop_remainder": True}, ValueError, "too few"),
        ({"max_failures": 0.5}, ValueError, "needs length="),
        ({"pool": "keras"}, ValueError, "leave out pool="),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"shards": [1], "read": endless, **options}
    with pytest.raises(error, match=text):
        keras_mp.StreamDataset(**arguments)


def test_read_that_returns_nothing_is_told() -> None:
    with keras_mp.StreamDataset([1], lambda shard: None, workers=0) as data:
        with pytest.raises(TypeError, match="did it forget to yield"):
            list(data)


def test_repr_and_inspection() -> None:
    with stream(length=TOTAL) as data:
        assert repr(data).startswith(f"StreamDataset(10 shards, 4 lanes, {TOTAL} samples, 26 batches of 4, shuffle=5")
        with pytest.raises(TypeError, match="cannot be inspected"):
            data.inspection()
