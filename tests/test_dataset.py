"""PoolDataset and parallelize: the same batches on every engine (P2), errors that say it all (P5), epochs (P1)."""

from __future__ import annotations

import contextlib
import pickle
import random
import resource
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

import keras_mp
from tests import transforms

_DATA = np.arange(23)


def _plain(nest: Any) -> Any:
    """Batches as lists, to compare."""
    if isinstance(nest, dict):
        return {key: _plain(value) for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        return [_plain(value) for value in nest]
    return nest.tolist() if isinstance(nest, np.ndarray) else nest


pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module", autouse=True)
def pool(running_pool: keras_mp.WorkerPool) -> keras_mp.WorkerPool:
    """One for all tests of this module."""
    return running_pool


@pytest.fixture(params=["workers", "threads", "in-process", "keras", "executor"])
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options for each of the places where batches can be loaded."""
    if request.param == "workers":
        return {"pool": request.getfixturevalue("pool")}
    if request.param == "executor":
        return {"pool": request.getfixturevalue("processes")}
    options: dict[str, dict[str, Any]] = {
        "threads": {"workers": 3, "use_multiprocessing": False},
        "in-process": {"workers": 0},
        "keras": {"workers": 2, "pool": "keras"},
    }
    return options[request.param]


# -- the same data ---------------------------------------------------------------------------------------------------

_RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"shuffle": True},
    "random": {"transform": transforms.with_random, "shuffle": True},
    "global random": {"transform": transforms.globally_random},
    "batch_transform": {"transform": transforms.with_random, "batch_transform": transforms.mixed, "shuffle": True},
    "order": {"order": lambda epoch, rng: rng.integers(0, 23, 30), "transform": transforms.with_random},
    "drop_remainder": {"shuffle": True, "drop_remainder": True},
    "skip": {"transform": transforms.fail_on_seven, "on_error": "skip", "shuffle": True},
    "replace": {"transform": transforms.fail_on_seven, "on_error": "replace", "shuffle": True},
    "collate": {"collate": lambda samples: {"all": np.array(samples), "n": len(samples)}},
}


def _epochs(recipe: dict[str, Any], **engine: Any) -> Any:
    with keras_mp.PoolDataset(_DATA, **{"batch_size": 4, "seed": 5, **recipe, **engine}) as dataset:
        got = []
        for epoch in range(2):
            assert dataset.epoch == epoch
            if "on_error" in recipe:
                with pytest.warns(RuntimeWarning, match=f"1 of 23 samples failed in epoch {epoch}"):
                    got.append([_plain(batch) for batch in dataset])
            else:
                got.append([_plain(batch) for batch in dataset])
        return got


@pytest.mark.parametrize("recipe", _RECIPES.values(), ids=_RECIPES)
def test_every_engine_gives_the_same_batches(engine: dict[str, Any], recipe: dict[str, Any]) -> None:  # P2
    expected = _epochs(recipe, workers=0)
    assert _epochs(recipe, **engine) == expected
    if "shuffle" in recipe:
        assert expected[0] != expected[1]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_makes_no_difference(workers: int) -> None:  # P2
    assert _epochs(_RECIPES["batch_transform"], workers=workers) == _epochs(_RECIPES["batch_transform"], workers=0)


def test_batches_may_be_asked_for_in_any_order(engine: dict[str, Any]) -> None:  # P1, P2
    recipe = _RECIPES["batch_transform"]
    expected = _epochs(recipe, workers=0)
    with keras_mp.PoolDataset(_DATA, **{"batch_size": 4, "seed": 5, **recipe, **engine}) as dataset:
        for batch in (5, 0, 3, 3, 1, 2, -1, 0):
            assert _plain(dataset[batch]) == expected[0][batch]
        dataset.set_epoch(1)
        assert _plain(dataset[2]) == expected[1][2]
        dataset.set_epoch(0)
        assert _plain(dataset[2]) == expected[0][2]


def test_draws_differ_between_samples_epochs_and_seeds() -> None:
    draws = []
    for seed in (1, 2):
        for epoch in _epochs({"transform": transforms.with_random, "seed": seed}, workers=0):
            for batch in epoch:
                draws += [*batch["own"], *batch["python"], *batch["legacy"]]
    assert len(set(draws)) == len(draws) == 2 * 2 * 23 * 3


def test_the_global_random_state_of_the_caller_is_left_alone(engine: dict[str, Any]) -> None:
    # Threads share the global state: there, the first batch that draws from it is noticed only when it has.
    transform = transforms.image_and_label if "use_multiprocessing" in engine else transforms.globally_random
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    with keras_mp.PoolDataset(_DATA, transform, batch_size=4, **engine) as dataset:
        dataset[0]
        assert (random.random(), np.random.rand()) == expected


def test_a_seed_that_was_drawn_is_shown() -> None:
    with keras_mp.PoolDataset(_DATA, shuffle=True, workers=0) as first:
        seed = first.state_dict()["seed"]
        assert f"seed={seed}" in repr(first)
        with keras_mp.PoolDataset(_DATA, shuffle=True, workers=0, seed=seed) as second:
            assert first[0].tolist() == second[0].tolist()
    with keras_mp.PoolDataset(_DATA, shuffle=True, workers=0) as third:
        assert third.state_dict()["seed"] != seed


# -- epochs by hand --------------------------------------------------------------------------------------------------


def test_an_iteration_is_an_epoch(engine: dict[str, Any]) -> None:  # P1
    with keras_mp.PoolDataset(_DATA, batch_size=4, shuffle=True, seed=1, **engine) as dataset:
        assert len(dataset) == 6
        orders = []
        for epoch in range(3):
            assert dataset.epoch == epoch
            orders.append([int(value) for batch in dataset for value in batch])
        assert all(sorted(order) == list(range(23)) for order in orders)
        assert len({tuple(order) for order in orders}) == 3
        dataset.set_epoch(1)
        assert [int(value) for batch in dataset for value in batch] == orders[1]


def test_an_iteration_that_is_given_up_does_not_end_the_epoch() -> None:  # P1
    with keras_mp.PoolDataset(_DATA, batch_size=4, workers=0) as dataset:
        for _ in dataset:
            break
        assert dataset.epoch == 0


def test_two_iterations_at_once(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(_DATA, batch_size=4, pool=pool) as dataset:
        pairs = [(one.tolist(), other.tolist()) for one, other in zip(dataset, dataset, strict=True)]
        assert all(one == other for one, other in pairs)
        assert [value for one, _ in pairs for value in one] == list(range(23))


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_failing_sample_says_what_where_and_why(engine: dict[str, Any]) -> None:  # P5
    with keras_mp.PoolDataset(_DATA, transforms.fail_on_seven, batch_size=4, **engine) as dataset:
        dataset.set_epoch(2)
        dataset[0]
        with pytest.raises(keras_mp.SampleError) as caught:
            dataset[1]
        text = str(caught.value)
        assert text.startswith(f"transform failed on sample 7 ({_DATA[7]!r}), batch 1 of epoch 2: ValueError: seven is")
        assert "Traceback" in text
        assert "fail_on_seven" in text
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value.__cause__, ValueError)
        failure = caught.value.failure
        assert (failure.stage, failure.index, failure.epoch, failure.batch) == ("transform", 7, 2, 1)
        assert dataset[2].tolist() == [8, 9, 10, 11]  # and the dataset lives on


class _Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise_odd(value: Any) -> Any:
    raise _Odd(1, 2)


def _raise_key_error(value: Any) -> Any:
    return dict[str, int]()["absent"]


def _exit(value: Any) -> Any:
    raise SystemExit(3)


def _no_return(value: Any) -> Any:
    return None


@pytest.mark.parametrize(
    ("options", "kind", "texts"),
    [
        ({"transform": _raise_odd}, keras_mp.SampleError, ["_Odd: 1 and 2"]),
        ({"transform": _raise_key_error}, KeyError, ["transform failed on sample 0", "KeyError: 'absent'\n"]),
        ({"transform": _exit}, keras_mp.SampleError, ["SystemExit: 3"]),
        ({"transform": _no_return}, TypeError, ["collate failed on sample 0", "returned None; did it forget"]),
        ({"collate": _no_return}, TypeError, ["collate failed on batch 0", "returned None instead of a batch"]),
        ({"batch_transform": _no_return}, TypeError, ["batch_transform failed on batch 0", "returned None"]),
        ({"batch_transform": _raise_key_error}, KeyError, ["batch_transform failed on batch 0 of epoch 0"]),
        (
            {"transform": lambda v: np.zeros(v + 1)},
            ValueError,
            ["collate failed on sample 1", "has shape (2,), but (1"],
        ),
    ],
)
def test_errors_keep_their_type(
    engine: dict[str, Any], options: dict[str, Any], kind: type[Exception], texts: list[str]
) -> None:
    with keras_mp.PoolDataset(_DATA, batch_size=4, **options, **engine) as dataset:
        with pytest.raises(keras_mp.SampleError) as caught:
            dataset[0]
        assert isinstance(caught.value, kind)
        for text in texts:
            assert text in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value)) if kind is not keras_mp.SampleError else caught.value
        assert str(again) == str(caught.value)


class _BrokenSource:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        if index == 5:
            raise OSError(5, "truncated")
        return float(index)


def test_a_source_that_fails(engine: dict[str, Any]) -> None:
    with keras_mp.PoolDataset(_BrokenSource(), batch_size=4, **engine) as dataset:
        with pytest.raises(OSError, match=r"source failed on sample 5 \(not read\), batch 1 of epoch 0") as caught:
            dataset[1]
        assert isinstance(caught.value, keras_mp.SampleError)


def test_skip_and_replace_say_what_they_left_out(engine: dict[str, Any]) -> None:  # P5
    cases: list[tuple[Literal["skip", "replace"], list[int]]] = [("skip", [4, 5, 6]), ("replace", [4, 5, 6, 6])]
    for on_error, expected in cases:
        dataset = keras_mp.PoolDataset(
            _DATA,
            transforms.fail_on_seven,
            batch_size=4,
            on_error=on_error,
            **engine,
        )
        assert dataset[1].tolist() == expected
        assert [(f.index, f.type, f.message) for f in dataset.failures] == [(7, "ValueError", "seven is broken")]
        assert dataset.stats()["failures"] == 1
        with pytest.warns(RuntimeWarning, match="1 of 23 samples failed in epoch 0.*sample 7"):
            dataset.close()


def test_replace_takes_the_first_good_sample_for_those_before_it() -> None:
    def fail(value: int) -> int:
        if value in (0, 1, 3):
            raise ValueError
        return value

    with (
        pytest.warns(RuntimeWarning),
        keras_mp.PoolDataset(list(range(5)), fail, batch_size=5, on_error="replace", workers=0) as dataset,
    ):
        assert dataset[0].tolist() == [2, 2, 2, 2, 4]


@pytest.mark.parametrize(("limit", "raised"), [(2, True), (3, False), (0.25, True), (0.5, False), (None, False)])
def test_too_many_failures(limit: float | None, raised: bool) -> None:
    def fail(value: int) -> int:
        if value % 3 == 0:
            raise ValueError(f"number {value}")
        return value

    dataset = keras_mp.PoolDataset(list(range(9)), fail, batch_size=3, on_error="skip", max_failures=limit, workers=0)
    if raised:
        with pytest.raises(keras_mp.TooManyFailures, match=f"3 of 9 samples have failed.*max_failures={limit}"):
            list(dataset)
    else:
        with pytest.warns(RuntimeWarning, match="3 of 9 samples"):
            assert [batch.tolist() for batch in dataset] == [[1, 2], [4, 5], [7, 8]]
    with pytest.warns(RuntimeWarning, match="3 of 9") if raised else contextlib.nullcontext():
        dataset.close()


def test_a_batch_without_a_good_sample_is_an_error() -> None:
    with keras_mp.PoolDataset(_DATA, _raise_key_error, batch_size=4, on_error="skip", workers=0) as dataset:
        with pytest.raises(keras_mp.SampleError, match="all 4 samples of the batch failed"):
            dataset[0]


def test_retries_run_a_failing_sample_again(engine: dict[str, Any], tmp_path: Any) -> None:
    def flaky(value: Any) -> Any:
        marker = tmp_path / f"{value}"
        tries = len(marker.read_text()) if marker.exists() else 0
        marker.write_text("x" * (tries + 1))
        if tries < 2:
            raise OSError("not yet")
        return value

    if engine == {"workers": 3, "use_multiprocessing": False}:
        engine = {"workers": 1, "use_multiprocessing": False}
    with keras_mp.PoolDataset(_DATA[:4], flaky, batch_size=4, retries=2, **engine) as dataset:
        assert dataset[0].tolist() == [0, 1, 2, 3]
        assert not dataset.failures


# -- ends ------------------------------------------------------------------------------------------------------------


def test_close_is_final_and_may_come_twice(engine: dict[str, Any]) -> None:
    dataset = keras_mp.PoolDataset(_DATA, batch_size=4, **engine)
    batch = dataset[0]
    dataset.close()
    dataset.close()
    with pytest.raises(keras_mp.PoolClosed, match="PoolDataset has been closed; make a new one"):
        dataset[0]
    assert batch.tolist() == [0, 1, 2, 3]


def test_a_dataset_can_be_pickled_and_starts_afresh() -> None:
    with keras_mp.PoolDataset(_DATA, transforms.with_random, batch_size=4, seed=3, workers=1) as dataset:
        expected = _plain(dataset[1])
        data = pickle.dumps(dataset)
    with pickle.loads(data) as copy:
        assert _plain(copy[1]) == expected


def test_stats_say_what_was_done(engine: dict[str, Any]) -> None:
    with keras_mp.PoolDataset(_DATA, batch_size=4, **engine) as dataset:
        list(dataset)
        stats = dataset.stats()
    assert stats["epoch"] == 1
    assert stats["batches"] == 6
    assert stats["wait_s"] >= 0
    assert stats["failures"] == 0
    assert stats["engine"] in ("worker pool", "threads", "ProcessPoolExecutor", "in-process", "Keras's pool")


# -- parallelize -----------------------------------------------------------------------------------------------------


class Batches:
    """A stranger's dataset: no base class of ours or Keras's, state that changes between epochs."""

    def __init__(self, large: int = 0, factor: int = 1) -> None:
        self.order = np.arange(12)
        self.images = np.ones((12, 1 + large))
        self.factor = factor
        self.hooks: list[str] = []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < 4:
            raise IndexError(index)
        rows = self.order[index * 3 : index * 3 + 3]
        return rows * self.images[rows, 0].astype(int), np.random.rand()

    def on_epoch_end(self) -> None:
        self.hooks.append("end")
        self.order = np.roll(self.order, 1)
        if self.factor != 1:
            self.images *= self.factor  # in place: the same array with other contents


@pytest.mark.parametrize(
    ("large", "factor"), [(0, 1), (0, 2), (1 << 17, 1), (1 << 17, 2)], ids=["small", "small new", "large", "large new"]
)
def test_parallelize_gives_the_workers_what_the_hooks_changed(engine: dict[str, Any], large: int, factor: int) -> None:
    batches = Batches(large, factor)
    with keras_mp.parallelize(batches, seed=3, **engine) as dataset:
        assert len(dataset) == 4
        got = [[value for batch in dataset for value in batch[0].tolist()] for _ in range(3)]
    assert got == [(np.roll(np.arange(12), epoch) * factor**epoch).tolist() for epoch in range(3)]
    assert batches.hooks == ["end"] * 3


def test_parallelize_seeds_each_batch(engine: dict[str, Any]) -> None:  # P2
    def draws(**options: Any) -> list[float]:
        with keras_mp.parallelize(Batches(), seed=3, **options) as dataset:
            return [batch[1] for _ in range(2) for batch in dataset]

    expected = draws(workers=0)
    assert len(set(expected)) == 8
    assert draws(**engine) == expected


def test_parallelize_names_the_batch_that_fails(engine: dict[str, Any]) -> None:
    source: Callable[[int], Any] = _BrokenSource().__getitem__
    assert source(0) == 0.0
    with keras_mp.parallelize(_BrokenSource(), **engine) as dataset:
        with pytest.raises(OSError, match=r"source failed on batch 5 of epoch 0: OSError: .*truncated"):
            dataset[5]


def test_parallelize_a_list_of_batches(engine: dict[str, Any]) -> None:
    batches = [(np.full((2, 3), k), np.arange(2)) for k in range(5)]
    with keras_mp.parallelize(batches, **engine) as dataset:
        assert [batch[0][0, 0] for batch in dataset] == [0, 1, 2, 3, 4]
        assert repr(dataset).startswith("parallelize(list, 5 batches")


# -- a long epoch ----------------------------------------------------------------------------------------------------


class _Many:
    """More samples than a list of their numbers has room for."""

    def __len__(self) -> int:
        return 50_000_000

    def __getitem__(self, index: int) -> Any:
        return index


@pytest.mark.parametrize("exported", [False, True])
def test_the_length_of_an_epoch_takes_no_memory(exported: bool) -> None:
    with keras_mp.PoolDataset(_Many(), batch_size=1, workers=0, shuffle=False) as train:
        batches = train.to_tf_dataset(epochs=2) if exported else train
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        iterator = iter(batches)
        assert [int(next(iterator)[0]) for _ in range(20)] == list(range(20))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
        del iterator


# -- changes between epochs ------------------------------------------------------------------------------------------


class Curriculum:
    """A transform whose strength the training process changes."""

    def __init__(self) -> None:
        self.strength = 1

    def __call__(self, sample: int) -> int:
        return sample * self.strength


def test_what_is_changed_between_epochs_reaches_the_next_one(engine: dict[str, Any]) -> None:
    transform, source = Curriculum(), np.arange(23)
    with keras_mp.PoolDataset(list(source), transform, batch_size=4, **engine) as dataset:
        for strength in (1, 5, 2):
            transform.strength = strength
            served = [int(value) for batch in dataset for value in batch]
            assert served == (source * strength).tolist()
        for strength in (3, 4):  # as Keras asks
            transform.strength = strength
            dataset.on_epoch_begin()
            served = [int(value) for number in range(dataset.num_batches) for value in dataset[number]]
            dataset.on_epoch_end()
            assert served == (source * strength).tolist()


def test_a_source_that_is_changed_between_epochs(engine: dict[str, Any]) -> None:
    source = [1] * 8
    with keras_mp.PoolDataset(source, batch_size=4, **engine) as dataset:
        assert [batch.tolist() for batch in dataset] == [[1] * 4] * 2
        source[5] = 2
        assert [batch.tolist() for batch in dataset] == [[1] * 4, [1, 2, 1, 1]]
