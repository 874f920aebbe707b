"""Numbers are handles: whatever order batches are asked for in, a pass gets each once (P1), in our order (P2).

The ways of asking are those of Keras: up to 3.15 it shuffles with the global `random`, from 3.16 on with
`random.Random(epoch)`, and where it divides the data among processes it asks each for every n-th number.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_mp

_SAMPLES, _BATCHES = 22, 6

Way = Callable[[int, int], list[int]]


def _global(count: int, epoch: int) -> list[int]:
    numbers = list(range(count))
    random.shuffle(numbers)
    return numbers


def _by_epoch(count: int, epoch: int) -> list[int]:
    numbers = list(range(count))
    random.Random(epoch).shuffle(numbers)
    return numbers


def _in_order(count: int, epoch: int) -> list[int]:
    return list(range(count))


_WAYS = {"global random": _global, "Random(epoch)": _by_epoch, "not shuffled": _in_order}


def _dataset(**options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(
        range(_SAMPLES), **{"batch_size": 4, "shuffle": True, "seed": 3, "workers": 0, **options}
    )


def _passes(dataset: Any, way: Way, epochs: int) -> Iterator[list[list[int]]]:
    """Runs passes as Keras does, and gives what each was served."""
    dataset.on_epoch_end()  # `fit` resets its iterator first
    for epoch in range(epochs):
        dataset.on_epoch_begin()
        served = [dataset[number].tolist() for number in way(dataset.num_batches, epoch)]
        dataset.on_epoch_end()
        yield served


def _plain(dataset: Any, epochs: int) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in dataset] for _ in range(epochs)]


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
@pytest.mark.parametrize("options", [{}, {"shuffle": False, "order": lambda epoch, rng: rng.permutation(22)}])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_served_in_the_order_of_a_plain_loop(way: Way, options: dict[str, Any], workers: int) -> None:
    with _dataset(workers=workers, **options) as dataset:
        assert list(_passes(dataset, way, 3)) == _plain(_dataset(**options), 3)
        assert dataset.epoch == 3


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
def test_a_dataset_that_does_not_shuffle_is_shuffled_by_batches_where_keras_shuffles(way: Way) -> None:
    batches = _plain(_dataset(shuffle=False), 1)[0]
    random.seed(0)  # of all orders that Keras may ask in, some make two epochs alike
    served = list(_passes(_dataset(shuffle=False), way, 4))
    if way is _in_order:
        assert served == [batches] * 4
    else:
        assert [sorted(epoch) for epoch in served] == [batches] * 4
        assert len({str(epoch) for epoch in served}) == 4


def test_that_keras_shuffles_is_seen_though_a_pass_began_in_order_by_chance() -> None:
    expected = list(_passes(_dataset(shuffle=False), lambda count, epoch: [*range(count)][::-1], 2))[1]
    orders = iter([[2, 1, 4, 5, 0, 3], [0, 2, 1, 3, 5, 4]])
    _, served = _passes(_dataset(shuffle=False), lambda count, epoch: next(orders), 2)
    assert served == expected


def test_the_global_seed_repeats_the_order_of_batches_where_the_dataset_has_none() -> None:
    def served(seed: int) -> list[list[list[int]]]:
        random.seed(seed)
        return list(_passes(_dataset(shuffle=False, seed=None), _by_epoch, 3))

    assert served(1) == served(1) != served(2)


def test_parallelize_serves_each_batch_once_however_it_is_asked() -> None:
    batches = [[i, i + 100] for i in range(9)]
    for way in _WAYS.values():
        with keras_mp.parallelize(batches, workers=2) as dataset:
            dataset.on_epoch_end()
            for epoch in range(3):
                dataset.on_epoch_begin()
                assert sorted(dataset[n] for n in way(dataset.num_batches, epoch)) == batches
                dataset.on_epoch_end()


def test_a_number_that_is_asked_again_gets_its_batch_again() -> None:
    dataset = _dataset()
    dataset.on_epoch_begin()
    numbers = [4, 0, 4, 5, 0, 1, 2, 3]
    assert dataset.num_batches == _BATCHES
    served = [dataset[number].tolist() for number in numbers]
    assert served[2] == served[0]
    assert served[4] == served[1]
    assert [served[at] for at in (0, 1, 3, 5, 6, 7)] == _plain(_dataset(), 1)[0]


def test_outside_of_a_pass_a_number_is_a_batch() -> None:
    dataset = _dataset()
    expected = _plain(_dataset(), 2)
    assert [dataset[i].tolist() for i in (3, 0, 5, -1)] == [expected[0][i] for i in (3, 0, 5, 5)]
    list(_passes(dataset, _by_epoch, 1))
    assert [dataset[i].tolist() for i in (3, 0, 5)] == [expected[1][i] for i in (3, 0, 5)]


def test_looks_one_after_the_other_are_of_the_epoch_that_it_is() -> None:
    expected = _plain(_dataset(), 3)
    with _dataset(workers=2) as dataset:
        assert [dataset[i].tolist() for i in (0, 1)] == expected[0][:2]
        list(dataset)
        assert [dataset[i].tolist() for i in (2, 3, 4)] == expected[1][2:5]
        dataset.set_epoch(2)
        assert dataset[5].tolist() == expected[2][5]
        assert [dataset[i].tolist() for i in range(_BATCHES)] == expected[2]


@pytest.mark.parametrize("changed", [False, True])
def test_what_was_loaded_ahead_of_a_pass_is_used_unless_something_has_changed(changed: bool, tmp_path: Path) -> None:
    class Logged:
        factor = 1

        def __call__(self, sample: int) -> int:
            with open(tmp_path / "loaded", "a") as file:
                file.write(f"{sample} ")
            return sample * self.factor

    transform = Logged()
    with _dataset(workers=1, shuffle=False, batch_size=1, transform=transform, max_queue_size=4, seed=1) as dataset:
        dataset[0], dataset[1]  # as Keras looks on TensorFlow
        if changed:
            transform.factor = 2
        served = list(_passes(dataset, _in_order, 1))
        assert served == [[[sample * transform.factor] for sample in range(_SAMPLES)]]
    loaded = [int(sample) for sample in (tmp_path / "loaded").read_text().split()]
    again = len(loaded) - _SAMPLES - 2  # besides those looked at
    # Ahead of the second look four were, 2 to 5; the pass wants 0 to 3 first, and gives up what it has no room for.
    assert again <= (2 * 4 if changed else 2), loaded


@pytest.mark.parametrize("way", [_in_order, lambda count, epoch: [*range(count)][::-1]])
def test_a_change_after_a_pass_was_read_ahead_for_reaches_it(way: Way) -> None:
    class Scale:
        factor = 1

        def __call__(self, sample: int) -> int:
            return sample * self.factor

    transform = Scale()
    with _dataset(workers=1, shuffle=False, transform=transform, max_queue_size=4) as dataset:
        dataset[0]
        dataset.on_epoch_begin()
        transform.factor = 100
        (served,) = _passes(dataset, way, 1)
    assert sorted(value for batch in served for value in batch) == [sample * 100 for sample in range(_SAMPLES)]


def test_a_pass_that_is_given_up_leaves_its_epoch_to_the_next() -> None:
    dataset = _dataset()
    dataset.on_epoch_begin()
    for number in _by_epoch(dataset.num_batches, 7)[:4]:
        dataset[number]
    assert list(_passes(dataset, _by_epoch, 2)) == _plain(_dataset(), 2)


@given(st.permutations(range(_BATCHES)), st.integers(0, _BATCHES), st.lists(st.integers(0, _BATCHES - 1), max_size=4))
def test_states_say_what_has_not_been_handed_out(numbers: list[int], done: int, again: list[int]) -> None:  # P1
    dataset = _dataset()
    dataset.on_epoch_begin()
    assert dataset.num_batches == _BATCHES
    served = [dataset[number].tolist() for number in numbers[:done]]
    for number in again:
        if number in numbers[:done]:
            dataset[number]
    state = json.loads(json.dumps(dataset.state_dict()))
    resumed = _dataset()
    resumed.load_state_dict(state)
    assert len(resumed) == (_BATCHES - done or _BATCHES)
    expected = _plain(_dataset(), 2)
    assert served + _plain(resumed, 1)[0] == (expected[0] if done < _BATCHES else [*expected[0], *expected[1]])


@pytest.mark.parametrize("way", _WAYS.values(), ids=_WAYS)
def test_what_was_left_of_a_pass_is_resumed_by_the_next(way: Way) -> None:
    for shuffle in (True, False):
        whole = list(_passes(_dataset(shuffle=shuffle), _by_epoch, 3))
        dataset = _dataset(shuffle=shuffle)
        dataset.on_epoch_begin()
        for number in _by_epoch(dataset.num_batches, 0)[:4]:
            dataset[number]
        resumed = _dataset(shuffle=shuffle)
        resumed.load_state_dict(dataset.state_dict())
        rest, following = _passes(resumed, way, 2)
        assert rest == whole[0][4:]
        if shuffle or way is not _in_order:
            assert sorted(following) == sorted(whole[1])


def test_a_state_has_a_constant_size() -> None:
    def size(samples: int) -> int:
        dataset = keras_mp.PoolDataset(range(samples), batch_size=1, shuffle=True, seed=1, workers=0)
        for _ in itertools.islice(dataset, 5):
            pass
        return len(json.dumps(dataset.state_dict()))

    assert abs(size(100_000) - size(100)) < 20


def test_a_batch_that_failed_is_not_handed_out() -> None:
    def fail(sample: int) -> int:
        if sample == 9:
            raise ValueError("nine")
        return sample

    dataset = _dataset(transform=fail, shuffle=False)
    with pytest.raises(ValueError, match="nine"):
        list(dataset)
    resumed = _dataset(shuffle=False)
    resumed.load_state_dict({**dataset.state_dict()})
    assert _plain(resumed, 1)[0][0] == [8, 9, 10, 11]


def test_the_epoch_ends_when_its_last_batch_is_handed_out() -> None:
    dataset = _dataset()
    iterator = iter(dataset)
    for _ in range(_BATCHES):
        next(iterator)
    assert dataset.epoch == 1
    dataset.set_epoch(0)
    del iterator
    assert dataset.epoch == 0
    assert _plain(dataset, 1) == _plain(_dataset(), 1)


def test_an_iteration_ends_with_an_error_when_the_dataset_is_moved() -> None:
    dataset = _dataset()
    iterator = iter(dataset)
    next(iterator)
    dataset.load_state_dict(dataset.state_dict())
    with pytest.raises(RuntimeError, match="load_state_dict"):
        next(iterator)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"position": 99}, "position 99"),
        ({"position": -1}, "position -1"),
        ({"missing": [7]}, "missing"),
        ({"epoch": "one"}, "epoch 'one'"),
        ({"order": True}, "order"),
        ({"version": 1, "remaining": [3]}, "version 1"),
    ],
)
def test_a_state_that_cannot_be_of_this_dataset_is_refused(change: dict[str, Any], text: str) -> None:
    dataset = _dataset()
    with pytest.raises(ValueError, match=text):
        dataset.load_state_dict({**dataset.state_dict(), **change})


def test_states_taken_from_another_thread_never_go_back() -> None:
    with _dataset(workers=2, batch_size=1) as dataset:
        stop = threading.Event()
        done: list[tuple[int, int]] = []

        def watch() -> None:
            while not stop.is_set():
                state = dataset.state_dict()
                done.append((state["epoch"], state["position"] - len(state["missing"])))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for _ in range(20):
            list(dataset)
            list(_passes(dataset, _by_epoch, 1))
        stop.set()
        watcher.join()
    # A pass over an epoch begins with all of it, and so does an iteration.
    assert done == sorted(done)


def test_a_state_in_the_middle_of_an_export_counts_what_that_has_handed_out() -> None:
    with _dataset(workers=2) as dataset:
        export = dataset.to_tf_dataset(epochs=2, prefetch=0)
        taken = [batch.numpy().tolist() for batch in itertools.islice(export, 8)]
        state = dataset.state_dict()
    resumed = _dataset()
    resumed.load_state_dict(state)
    first, second = _plain(_dataset(), 2)
    expected = [*first, *second]
    handed_out = state["epoch"] * _BATCHES + state["position"]
    assert 8 <= handed_out <= len(expected)  # TensorFlow may have taken more
    assert taken == expected[:8]
    if handed_out < len(expected):
        assert _plain(resumed, 1)[0] == expected[handed_out:]


@dataclasses.dataclass
class _Divided:
    """What Keras 3.16 asks of a distribution that divides the data among processes."""

    num_data_shards: int
    data_shard_id: int
    auto_shard_dataset: bool = True


@pytest.fixture
def divide() -> Iterator[Callable[[int, int], None]]:
    before = keras.distribution.distribution()
    yield lambda shards, index: keras.distribution.set_distribution(_Divided(shards, index))
    keras.distribution.set_distribution(before)


def _share(dataset: Any, shards: int, index: int, epochs: int) -> list[list[list[int]]]:
    """What a process is served of passes in which it asks for every n-th number."""
    served = []
    for epoch in range(epochs):
        dataset.on_epoch_begin()
        numbers = _by_epoch(dataset.num_batches, epoch)
        served.append([dataset[number].tolist() for number in numbers[index::shards]])
        dataset.on_epoch_end()
    assert dataset.epoch == epochs
    return served


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_where_keras_divides_the_data_each_sample_comes_once(
    divide: Callable[[int, int], None], shards: int, shuffle: bool
) -> None:
    parts = []
    for index in range(shards):
        divide(shards, index)
        parts.append(_share(_dataset(shuffle=shuffle), shards, index, 3))
    for epoch in range(3):
        steps = [part[epoch] for part in parts]
        assert len({len(own) for own in steps}) == 1
        assert sorted(sample for own in steps for batch in own for sample in batch) == list(range(_SAMPLES))
    assert parts[0][0] != parts[0][1]


def test_what_cannot_be_divided_is_refused(divide: Callable[[int, int], None]) -> None:
    divide(2, 0)
    with pytest.raises(ValueError, match="auto_shard_dataset=False"):
        _dataset().shard(2, 0).on_epoch_begin()
    with pytest.raises(ValueError, match="seed=None"):
        _dataset(seed=None).on_epoch_begin()
    with pytest.raises(ValueError, match="num_shards=2"):
        keras_mp.parallelize([[1], [2], [3]], workers=0).on_epoch_begin()


def test_shards_of_parallelize() -> None:
    batches = [[i] for i in range(12)]
    parts = [keras_mp.parallelize(batches, workers=0).shard(3, index) for index in range(3)]
    assert [list(part) for part in parts] == [batches[index::3] for index in range(3)]
    with pytest.raises(ValueError, match="num_shards=5"):
        keras_mp.parallelize(batches, workers=0).shard(5, 0)


def test_a_shard_counts_for_itself() -> None:
    def fail(sample: int) -> int:
        if sample == 2:
            raise ValueError("two")
        return sample

    dataset = _dataset(transform=fail, on_error="skip", shuffle=False)
    with pytest.warns(RuntimeWarning, match="1 of 22 samples failed"):
        list(dataset)
    part = dataset.shard(2, 0)
    assert (part.stats()["batches"], part.failures, part.epoch) == (0, [], 1)


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_workers_while_iterators_are_alive(taken: int) -> None:  # P4
    with _dataset(workers=2) as dataset:
        iterators = [iter(dataset), dataset.stream(), iter(dataset.to_tf_dataset())]
        for iterator in iterators:
            for _ in range(taken):
                next(iterator)
        list(dataset)
        pids = dataset.stats()["pids"]
        assert pids
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    if taken:
        with pytest.raises(keras_mp.PoolClosed):
            next(iterators[0])


def test_a_dataset_that_is_let_go_ends_its_workers_without_the_garbage_collector() -> None:  # P4
    gc.collect()
    gc.disable()
    try:
        dataset = _dataset(workers=2)
        list(dataset)
        list(_passes(dataset, _by_epoch, 1))
        next(iter(dataset))
        workers = [psutil.Process(pid) for pid in dataset.stats()["pids"]]
        del dataset
        assert not psutil.wait_procs(workers, timeout=30)[1]
    finally:
        gc.enable()


# -- datasets that never end -----------------------------------------------------------------------------------------


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return np.full((2, 1), index, "float32"), np.zeros((2, 1), "float32")


@pytest.mark.timeout(600)  # each worker imports Keras and its backend, as the class of the dataset does
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_never_ends(workers: int) -> None:
    with keras_mp.parallelize(Endless(), workers=workers) as dataset:
        assert dataset.num_batches is None
        assert [dataset[i][0][0, 0] for i in (0, 1, 0, 1, 2, 7)] == [0, 1, 0, 1, 2, 7]
        assert [int(x[0, 0]) for x, _ in itertools.islice(dataset, 4)] == [0, 1, 2, 3]
        export = dataset.to_tf_dataset()
        assert [int(x[0, 0]) for x, _ in export.take(4)] == [0, 1, 2, 3]
        for call in (lambda: len(dataset), dataset.state_dict, lambda: dataset.shard(2, 0)):
            with pytest.raises(TypeError, match="never ends"):
                call()
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        history = model.fit(dataset, steps_per_epoch=3, epochs=2, verbose=0)
        assert len(history.history["loss"]) == 2
        assert "endless" in repr(dataset)
