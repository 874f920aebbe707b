"""Datasets with buckets: the same batches everywhere (P2), in fit, loops and exports (P1), on shards, and resumed."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.bucketed import BOUNDARIES, LENGTHS, fails_on_17, pad_to_boundary, padded, rows
from tests.support import run_script


def dataset(**options: Any) -> keras_mp.PoolDataset:
    buckets = keras_mp.Buckets(LENGTHS, BOUNDARIES, [8, 6, 4, 2])
    return keras_mp.PoolDataset(
        range(len(LENGTHS)), **{"buckets": buckets, "shuffle": True, "seed": 3, "workers": 0, **options}
    )


def plain(batches: Any) -> list[list[int]]:
    return [np.asarray(batch).tolist() for batch in batches]


_EPOCHS = [plain(data) for data in [dataset()] for _ in range(3)]


def test_an_epoch_has_each_sample_once_in_batches_of_like_length() -> None:
    data = dataset()
    sizes = {0: 8, 1: 6, 2: 4, 3: 2}
    for epoch in _EPOCHS:
        assert sorted(index for batch in epoch for index in batch) == list(range(90))
        assert len(epoch) == len(data) == data.num_batches
        for batch in epoch:
            (bucket,) = set(np.searchsorted(BOUNDARIES, LENGTHS[batch], side="right").tolist())
            assert len(batch) <= sizes[bucket]
    assert _EPOCHS[0] != _EPOCHS[1]


@pytest.mark.parametrize("kind", ["processes", "threads", "executor"])
def test_the_same_batches_wherever_they_are_loaded(kind: str) -> None:  # P2
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        options: dict[str, dict[str, Any]] = {
            "processes": {"workers": 2},
            "threads": {"workers": 2, "use_multiprocessing": False},
            "executor": {"workers": None, "pool": executor},
        }
        with dataset(**options[kind]) as data:
            assert [plain(data) for _ in range(3)] == _EPOCHS
            data.set_epoch(1)
            assert plain(data[index] for index in range(len(data))) == _EPOCHS[1]


class _Recorder(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.seen: list[list[int]] = []

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.reshape(keras.ops.cast(x, "float32"), (-1, 1)))

    def train_step(self, data: Any) -> Any:
        self.seen.append(np.asarray(keras.utils.unpack_x_y_sample_weight(data)[0]).tolist())
        return {"loss": 0.0}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.filterwarnings("ignore:.*no trainable weights:UserWarning")
def test_fit_gets_the_batches_of_a_plain_loop(workers: int, exported: bool) -> None:
    with dataset(workers=workers) as data:
        model = _Recorder()
        model.compile(run_eagerly=True)
        model.fit(data.to_tf_dataset() if exported else data, epochs=3, verbose=0)
        first = model.seen[-sum(map(len, _EPOCHS)) :]  # TensorFlow may have built it with one before
        assert first == [batch for epoch in _EPOCHS for batch in epoch]
        assert data.epoch == 3


@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 0), (2, 2)])
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # as it should: it is resumed
def test_fit_trains_on_padded_batches_also_in_the_middle_of_an_epoch(seed: int, workers: int) -> None:
    """Keras takes the shapes from the first two batches that it sees, and refuses others later."""
    model = keras.Sequential([keras.layers.GlobalMaxPooling1D(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    options: dict[str, Any] = {"transform": rows, "collate": padded, "seed": seed, "workers": workers}
    with dataset(**options) as data:
        count = len(data)
        for position in (0, 1 + seed, count // 2 + seed, count - 1):
            data.load_state_dict({**data.state_dict(), "epoch": 0, "position": position})
            assert len(model.fit(data, epochs=2, verbose=0).history["loss"]) == 2
            assert data.epoch == 2


_COMPILATIONS = textwrap.dedent(
    """
    import keras
    import numpy as np
    import keras_mp
    from tests.bucketed import pad_to_boundary, rows

    boundaries = [4, 8, 16]
    lengths = np.random.default_rng(1).integers(0, 25, 400)
    rng = np.random.default_rng(2)
    source = [rng.integers(0, 9, length) for length in lengths]

    def pad_to_longest(samples):
        longest = max(map(len, samples))
        return np.stack([np.pad(sample, (0, longest - len(sample))) for sample in samples])

    class Counted(keras.layers.Layer):
        compiled = 0

        def call(self, x):
            Counted.compiled += 1  # JAX runs this once for each shape that it compiles the step for
            return keras.ops.cast(x, "float32")[..., None] * self.scale

        def build(self, shape):
            self.scale = self.add_weight(shape=())

    def train(collate, **options):
        shapes = set()

        def recorded(samples):
            batch = collate(samples)
            shapes.add(batch.shape)
            return batch, np.zeros(len(samples), "float32")

        with keras_mp.PoolDataset(source, collate=recorded, shuffle=True, seed=0, workers=0, **options) as data:
            model = keras.Sequential([Counted(), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            model.predict(data, verbose=0)
            Counted.compiled = 0
            model.fit(data, epochs=3, verbose=0)
        return Counted.compiled - 1, len(shapes)  # `fit` compiles its first step twice

    buckets = keras_mp.Buckets(lengths, boundaries, batch_sizes=[8] * 4)
    whole = train(pad_to_boundary, buckets=buckets, drop_remainder=True)
    rest = train(pad_to_boundary, buckets=buckets)
    without = train(pad_to_longest, batch_size=8)
    print(*whole, *rest, *without)
    """
)


def test_few_shapes_are_compiled(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    numbers = list(map(int, run_script(tmp_path / "train.py", _COMPILATIONS, KERAS_BACKEND="jax").split()))
    whole, whole_shapes, rest, rest_shapes, without, without_shapes = numbers
    assert whole == whole_shapes == 4  # as many as there are buckets
    assert 4 < rest == rest_shapes <= 8  # the last batch of a bucket has fewer rows
    assert without == without_shapes > 8


# -- lengths by a function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 90, 1000])
def test_a_function_tells_each_length_once_in_the_workers(workers: int, count: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    lengths = np.random.default_rng(4).integers(0, 25, count)

    def measure(index: int) -> int:
        with open(log, "ab", 0) as file:
            file.write(b"%d %d\n" % (index, os.getpid()))
        return int(lengths[index])

    def epochs(told: Any) -> list[list[list[int]]]:
        buckets = keras_mp.Buckets(told, BOUNDARIES, max_tokens=64)
        with keras_mp.PoolDataset(range(count), buckets=buckets, shuffle=True, seed=1, workers=workers) as data:
            return [plain(data) for _ in range(2)]

    assert epochs(measure) == epochs(lengths)
    asked, processes = np.loadtxt(log, int, ndmin=2).T
    assert sorted(asked) == list(range(count))
    assert (os.getpid() in processes) == (workers == 0)


@pytest.mark.parametrize("pool", ["keras", "threads"])
def test_a_function_tells_lengths_on_other_pools(pool: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        given: Any = executor if pool == "threads" else pool
        buckets = keras_mp.Buckets(lambda index: LENGTHS[index], BOUNDARIES, [8, 6, 4, 2])
        with dataset(buckets=buckets, pool=given, workers=None) as data:
            assert plain(data[index] for index in range(len(data))) == _EPOCHS[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("lengths", "kind", "texts"),
    [
        (fails_on_17, OSError, ["lengths failed on sample 17 (lengths(17)), batch 0", "OSError: no such tile"]),
        (lambda index: 2.5, TypeError, ["lengths(0)", "a length must be a whole number, got 2.5"]),
        (lambda index: None, TypeError, ["lengths(0)", "a length must be a whole number, got None"]),
        (lambda index: 30 - index, ValueError, ["lengths(31)", "a length must be at least 0, got -1"]),
        (lambda index: os._exit(3) if index == 5 else 1, keras_mp.WorkerCrashed, ["exit code 3", "sample 5"]),
    ],
)
def test_a_function_that_fails(
    lengths: Callable[[int], int], kind: type[Exception], texts: list[str], workers: int
) -> None:
    if kind is keras_mp.WorkerCrashed and not workers:
        return
    with pytest.raises(kind) as caught:
        dataset(buckets=keras_mp.Buckets(lengths, BOUNDARIES), workers=workers)
    for text in texts:
        assert text in str(caught.value)


def test_a_function_that_cannot_travel() -> None:
    with (
        socket.socket() as connection,
        pytest.raises(keras_mp.KerasMPError, match="cannot be sent to worker processes"),
    ):
        dataset(buckets=keras_mp.Buckets(lambda index: connection.fileno(), BOUNDARIES), workers=2)


# -- shards, states, failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("drop", [False, True])
def test_shards(parts: int, drop: bool) -> None:
    whole = dataset(drop_remainder=drop)
    for _ in range(2):
        shards = [plain(whole.shard(parts, index)) for index in range(parts)]
        assert len({len(shard) for shard in shards}) == 1
        assert all(batch for shard in shards for batch in shard)
        taken = [index for shard in shards for batch in shard for index in batch]
        assert len(set(taken)) == len(taken)
        assert drop or len(taken) == 90
        for step in zip(*shards, strict=True):  # the devices wait for each other: let them have batches of one length
            buckets = {int(bucket) for part in step for bucket in np.searchsorted(BOUNDARIES, LENGTHS[part], "right")}
            assert len(buckets) == 1
        whole.set_epoch(whole.epoch + 1)


@pytest.mark.parametrize("taken", [0, 1, 7, len(_EPOCHS[0]) - 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_an_epoch_is_the_same(taken: int, workers: int) -> None:
    before = dataset()
    state = before.state_dict()
    for number, _ in enumerate(before):
        if number == taken:
            break
        state = before.state_dict()
    with dataset(workers=workers) as after:
        after.load_state_dict(json.loads(json.dumps(state)))
        assert len(after) == len(_EPOCHS[0]) - taken
        assert plain(after) == _EPOCHS[0][taken:]
        assert plain(after) == _EPOCHS[1]


@pytest.mark.parametrize(
    "options",
    [
        {"buckets": None},
        {"buckets": keras_mp.Buckets(LENGTHS, [4, 8, 17], [8, 6, 4, 2])},
        {"buckets": keras_mp.Buckets(LENGTHS[::-1], BOUNDARIES, [8, 6, 4, 2])},
        {"buckets": keras_mp.Buckets(LENGTHS, BOUNDARIES, [8, 6, 4, 3])},
    ],
    ids=str,
)
def test_a_state_of_other_buckets_is_refused(options: dict[str, Any]) -> None:
    state = dataset().state_dict()
    other = dataset(**options)
    with pytest.raises(ValueError, match="state is of another dataset: b"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="state is of another dataset: b"):
        dataset().load_state_dict(other.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_fails_is_replaced_by_samples_of_its_bucket(workers: int) -> None:
    lost = set(_EPOCHS[0][3])

    def read(index: int) -> Any:
        if index in lost:
            raise OSError("no such tile")
        return rows(index)

    with dataset(
        transform=read, collate=pad_to_boundary, on_error="replace", buckets=dataset_buckets(), workers=workers
    ) as data:
        with pytest.warns(RuntimeWarning, match=f"{len(lost)} of 90 samples failed"):
            batches = list(data)
        served = {failure.replaced_by for failure in data.failures}
    assert [batch.shape for batch in batches] == [pad_to_boundary([rows(i) for i in b]).shape for b in _EPOCHS[0]]
    buckets = np.searchsorted(BOUNDARIES, LENGTHS, side="right")
    assert {buckets[index] for index in served} == {buckets[index] for index in lost}


def dataset_buckets() -> keras_mp.Buckets:
    """Those of `dataset`."""
    return keras_mp.Buckets(LENGTHS, BOUNDARIES, [8, 6, 4, 2])


def test_an_export_knows_a_batch_size_that_all_buckets_have() -> None:
    def first_axis(sizes: list[int], drop: bool) -> Any:
        data = dataset(buckets=keras_mp.Buckets(LENGTHS, BOUNDARIES, sizes), drop_remainder=drop)
        return data.to_tf_dataset().element_spec.shape[0]

    assert first_axis([4] * 4, True) == 4
    assert first_axis([4] * 4, False) is None
    assert first_axis([4, 4, 4, 2], True) is None


def test_a_batch_size_is_that_of_buckets_which_say_none() -> None:
    data = dataset(buckets=keras_mp.Buckets(LENGTHS, BOUNDARIES), batch_size=5)
    assert max(map(len, plain(data))) == 5
    assert "batches of 5 from 4 buckets" in repr(data)
    assert "batches of 2 to 8 from 4 buckets" in repr(dataset())


@pytest.mark.parametrize(
    ("options", "kind", "texts"),
    [
        ({"buckets": [4, 8]}, TypeError, ["buckets must be a keras_mp.Buckets or None, got [4, 8]"]),
        (
            {"buckets": keras_mp.Buckets([1, 2, 3], [2])},
            ValueError,
            ["buckets has 3 lengths, but the source has 90 samples", "a length for each sample"],
        ),
        (
            {"order": lambda epoch, rng: [0], "shuffle": False},
            ValueError,
            ["order=", "buckets=", "leave one of them out"],
        ),
        (
            {"buckets": keras_mp.Buckets(LENGTHS, BOUNDARIES, max_tokens=12)},
            ValueError,
            ["max_tokens=12 is fewer than the boundary 16 of bucket 2"],
        ),
        (
            {"buckets": keras_mp.Buckets(LENGTHS, BOUNDARIES, [99] * 4), "drop_remainder": True},
            ValueError,
            ["drop_remainder=True leaves no batch: the buckets have ["],
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], texts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        dataset(**options)
    for text in texts:
        assert text in str(caught.value)
