"""Long lists travel packed, item by item, and everybody reads the same from them (P2)."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import pathlib
import pickle
import threading
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_mp
from keras_mp.memory.packed import ListPacker
from tests.support import assert_same

_COUNT = 20_000  # as many as are packed

_ITEMS: dict[str, Any] = {
    "tuples": lambda number: (f"image {number}.png", number % 7, number / 2, None, b"x"),
    "numbers": lambda number: number,
    "dicts": lambda number: {"path": f"image {number}.png", "label": [number % 7]},
    "paths": lambda number: pathlib.Path(f"/data/image {number}.png"),
    "dates": lambda number: datetime.datetime(2020, 1, 1) + datetime.timedelta(number),
    "decimals": lambda number: decimal.Decimal(number),
    "small arrays": lambda number: (np.full(3, number, np.float32), np.int16(number % 9)),
}


@pytest.mark.parametrize("kind", _ITEMS)
def test_items_come_back(kind: str) -> None:
    items = [_ITEMS[kind](number) for number in range(_COUNT)]
    packed = ListPacker().pack(items)
    assert packed is not None
    packed = pickle.loads(pickle.dumps(packed))
    assert len(packed) == _COUNT
    for index in (0, 1, 4711, _COUNT - 1, -1, np.int64(-_COUNT)):
        assert_same(packed[index], items[index], "writeable")
    assert_same(packed[5:11:3], items[5:11:3], "writeable")
    with pytest.raises(IndexError):
        packed[_COUNT]


@given(
    st.lists(
        st.one_of(st.text(), st.integers(), st.binary(), st.tuples(st.floats(allow_nan=False), st.none())), min_size=1
    )
)
@settings(max_examples=20)
def test_any_values(values: list[Any]) -> None:
    items = tuple(values[number % len(values)] for number in range(_COUNT))
    packed = ListPacker().pack(items)
    if packed is not None:  # it is None where the items are large, or mostly the same
        assert_same(packed[: len(values)], items[: len(values)], "writeable")


class Counted:
    """Of a class of the user's."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclasses.dataclass(frozen=True)
class Held:
    rng: Any


_TOKEN = "a long text that all items have in common " * 20

_NOT_PACKED: dict[str, Any] = {
    "objects": Counted,
    "generators": lambda number: (number, np.random.default_rng(number)),
    "functions": lambda number: (number, lambda: number),
    "locks": lambda number: threading.Lock(),
    "what all share": lambda number: (_TOKEN, number),
    "large arrays": lambda number: np.broadcast_to(np.float32(number), (8192,)),
    "object arrays": lambda number: np.array([Counted(number)]),
}


@pytest.mark.parametrize("kind", _NOT_PACKED)
def test_others_travel_as_they_are(kind: str) -> None:
    assert ListPacker().pack([_NOT_PACKED[kind](number) for number in range(_COUNT)]) is None


def test_short_lists_and_lists_of_a_kind_of_their_own_travel_as_they_are() -> None:
    assert ListPacker().pack([(1, "a")] * 100) is None
    assert ListPacker().pack(collections.UserList(range(_COUNT))) is None
    assert ListPacker().pack(np.arange(_COUNT)) is None


def test_a_list_that_stays_is_packed_once() -> None:
    packer, items = ListPacker(), [(str(number), number) for number in range(_COUNT)]
    packed = packer.pack(items)
    assert packed is not None
    assert packer.pack(items) is packed
    items[17] = ("other", -1)
    again = packer.pack(items)
    assert again is not None
    assert (packed[17], again[17]) == (("17", 17), ("other", -1))


def _label(item: Any) -> Any:
    return {"length": len(item[0]), "label": item[1][0] if isinstance(item[1], list) else item[1]}


def _label_with_chance(item: Any, rng: np.random.Generator) -> Any:
    return {**_label(item), "draws": [rng.random(), np.random.rand()]}


def _batches(dataset: Any, count: int = 5) -> list[Any]:
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("view", [list, tuple, lambda items: keras_mp.split(items, 0.5)[0]])
def test_workers_read_the_same(running_pool: keras_mp.WorkerPool, view: Any) -> None:
    source = view([(f"image {number}.png", number % 7) for number in range(_COUNT)])
    options: dict[str, Any] = {"batch_size": 16, "shuffle": True, "seed": 3}
    with (
        keras_mp.PoolDataset(source, _label_with_chance, pool=running_pool, **options) as ours,
        keras_mp.PoolDataset(source, _label_with_chance, workers=0, **options) as expected,
    ):
        assert_same(_batches(ours), _batches(expected), "aligned")


def test_what_changes_in_a_list_reaches_the_workers(running_pool: keras_mp.WorkerPool) -> None:
    source: list[Any] = [(str(number), 0) for number in range(_COUNT)]
    with keras_mp.PoolDataset(source, _label, batch_size=4, pool=running_pool) as dataset:
        assert _batches(dataset, 1)[0]["label"].tolist() == [0, 0, 0, 0]
        source[1] = ("1", 5)
        assert _batches(dataset, 1)[0]["label"].tolist() == [0, 5, 0, 0]


def test_what_changes_in_its_items_does(running_pool: keras_mp.WorkerPool) -> None:
    source: list[Any] = [(str(number), [0]) for number in range(_COUNT)]
    with keras_mp.PoolDataset(source, _label, batch_size=4, pool=running_pool) as dataset:
        assert _batches(dataset, 1)[0]["label"].tolist() == [0, 0, 0, 0]
        source[1][1][0] = 5
        assert _batches(dataset, 1)[0]["label"].tolist() == [0, 5, 0, 0]


def test_a_failing_item_is_named(running_pool: keras_mp.WorkerPool) -> None:
    def refuse(item: Any) -> Any:
        raise ValueError("no")

    source = [(f"image {number}.png", number) for number in range(_COUNT)]
    with (
        keras_mp.PoolDataset(source, refuse, batch_size=4, pool=running_pool) as dataset,
        pytest.raises(keras_mp.SampleError, match=r"image 0\.png"),
    ):
        next(iter(dataset))


def _own_bytes(item: Any) -> Any:
    return np.int64(psutil.Process().memory_full_info().uss)


def test_a_worker_has_no_list_of_its_own() -> None:
    source = [(f"/data/a/rather/long/path/image {number}.png", number, number / 7) for number in range(300_000)]
    with keras_mp.WorkerPool(1) as pool:
        with keras_mp.PoolDataset(source[:9], _own_bytes, batch_size=1, pool=pool) as few:
            before = int(_batches(few, 1)[0][0])
        with keras_mp.PoolDataset(source, _own_bytes, batch_size=1, pool=pool) as many:
            (batch,) = _batches(many, 1)
    assert int(batch[0]) - before < 25_000_000  # as a list it would be 60 MB
