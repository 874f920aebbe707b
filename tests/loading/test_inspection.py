"""What an inspection finds in samples and batches, wherever they are loaded."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from keras_mp.loaded import LoadedDataset
from keras_mp.loading.inspection import Inspected, Leaf
from tests.transforms import drawn_length


def _inspect(dataset: LoadedDataset, sample: int | None = None) -> list[Inspected]:
    with dataset.inspection(sample) as inspection:
        return [found for batch in range(len(inspection)) for found in inspection[batch]]


def _odd(number: int, rng: np.random.Generator) -> dict[str, Any]:
    if number == 4:
        raise ValueError("four")
    x = np.full(3, np.nan if number == 2 else 1.0, "float32")
    x[0] = np.inf if number in (2, 6) else rng.random()
    return {"x": x, "name": f"n{number:0{number}}", "y": number}


def test_samples_are_described() -> None:
    found = _inspect(keras_mp.PoolDataset(list(range(10)), _odd, batch_size=4, seed=0, workers=0))
    assert [each.index for each in found] == list(range(10))
    assert {each.unit for each in found} == {"sample"}
    assert found[3].leaves == (Leaf("sample['x']", (3,), "float32"), Leaf("sample['name']", (), "str"), _int("['y']"))
    assert (found[2].leaves[0].nans, found[2].leaves[0].infs) == (2, 1)
    assert (found[6].leaves[0].nans, found[6].leaves[0].infs) == (0, 1)
    assert found[3].item == "3"
    failed = [each for each in found if each.failure is not None]
    assert [(each.index, each.item, each.leaves) for each in failed] == [(4, "4", ())]
    assert failed[0].failure is not None
    assert (failed[0].failure.type, failed[0].failure.message) == ("ValueError", "four")


def _int(path: str) -> Leaf:
    return Leaf(f"sample{path}", (), "int64")


@pytest.mark.parametrize("engine", ["inline", "processes", "threads", "executor"])
def test_every_engine_finds_the_same_as_training_meets(engine: str, pool: keras_mp.WorkerPool) -> None:
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "batch_size": 4}
    expected: dict[int, int] = {}
    with keras_mp.PoolDataset(range(10), drawn_length, **options, collate=list, workers=0) as trained:
        for number in range(len(trained)):
            expected |= zip(trained.samples_of(number), map(len, trained[number]), strict=True)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        where: dict[str, dict[str, Any]] = {
            "inline": {"workers": 0},
            "processes": {"pool": pool},
            "threads": {"workers": 2, "use_multiprocessing": False},
            "executor": {"pool": executor},
        }
        found = _inspect(keras_mp.PoolDataset(range(10), drawn_length, **options, **where[engine]))
    assert {each.index: each.leaves[0].nans for each in found} == expected


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True, "drop_remainder": True},
        {"order": lambda epoch, rng: [1, 1, 1, 2]},
        {"on_error": "raise"},
        {"on_error": "replace", "max_failures": 0},
    ],
)
@pytest.mark.parametrize("is_shard", [False, True])
def test_every_sample_comes_once(options: dict[str, Any], is_shard: bool) -> None:
    def fail(number: int) -> int:
        if number % 2:
            raise ValueError("odd")
        return number

    dataset: LoadedDataset = keras_mp.PoolDataset(range(10), fail, batch_size=2, workers=0, **options)
    found = _inspect(dataset.shard(2, 1) if is_shard else dataset)
    samples = [each for each in found if each.unit == "sample"]
    assert [each.index for each in samples] == list(range(10))
    assert [each.failure is not None for each in samples] == [bool(number % 2) for number in range(10)]


def test_a_part_differs_from_epoch_to_epoch() -> None:
    dataset = keras_mp.PoolDataset(range(1000), seed=1, workers=0)
    with dataset.inspection(50) as inspection:
        parts = []
        for epoch in range(2):
            inspection.set_epoch(epoch)
            parts.append([found.index for batch in range(len(inspection)) for found in inspection[batch]])
    assert [len(set(part)) for part in parts] == [50, 50]
    assert all(part == sorted(part) for part in parts)
    assert parts[0] != parts[1]


@pytest.mark.parametrize("sample", [0, -1, 2.5, "all"])
def test_a_part_must_be_a_number(sample: Any) -> None:
    dataset = keras_mp.PoolDataset(range(4), workers=0)
    with pytest.raises((TypeError, ValueError), match="sample must be"):
        dataset.inspection(sample)


def test_a_sample_that_no_batch_could_hold_has_failed() -> None:
    samples = [np.zeros(2), None, object(), {"x": {1, 2}}, np.zeros(2)]
    found = _inspect(keras_mp.PoolDataset(samples, batch_size=5, workers=0))
    messages = [each.failure and each.failure.message for each in found]
    assert messages[0] is None and messages[4] is None
    assert "returned None" in str(messages[1])
    assert "cannot be stacked" in str(messages[2])
    assert "sample['x'] is of type set" in str(messages[3])


def test_collate_may_take_anything() -> None:
    samples = [threading.Thread, [1, [2, 3]], None, b"bytes"]
    found = _inspect(keras_mp.PoolDataset(samples, collate=lambda batch: np.ones(len(batch)), batch_size=4, workers=0))
    kinds = [tuple((leaf.dtype, leaf.shape) for leaf in each.leaves) for each in found]
    assert kinds == [
        (("type", None),),
        (("list", None),),
        (("NoneType", None),),
        (("bytes", ()),),
        (("float64", (4,)),),
    ]
    assert found[-1].unit == "batch"


def _spoil_two(batch: Any) -> Any:
    return np.where(batch == 2, np.inf, batch)


def test_a_batch_is_not_blamed_for_its_samples() -> None:
    data = np.array([0.0, np.nan, 2.0, 3.0])
    found = _inspect(
        keras_mp.PoolDataset(data, batch_transform=lambda b: np.where(b == 2, np.inf, b), batch_size=2, workers=0)
    )
    odd = [(each.unit, each.index) for each in found if any(leaf.nans or leaf.infs for leaf in each.leaves)]
    assert odd == [("sample", 1), ("batch", 1)]


class _Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            raise KeyError("two")
        return np.full((4, 2), np.inf if index == 3 else 0.0), None


def test_batches_are_described() -> None:
    found = _inspect(keras_mp.parallelize(_Batches(), workers=0))
    assert [(each.unit, each.index, each.item) for each in found] == [("batch", i, f"[{i}]") for i in range(5)]
    assert [each.failure is not None for each in found] == [False, False, True, False, False]
    assert found[3].leaves == (Leaf("batch[0]", (4, 2), "float64", 0, 8), Leaf("batch[1]", None, "NoneType"))


def test_the_dataset_itself_stays_as_it_is() -> None:
    with keras_mp.PoolDataset(range(8), batch_size=4, shuffle=True, seed=0, workers=0) as dataset:
        before = [batch.tolist() for batch in dataset]
        dataset.set_epoch(0)
        _inspect(dataset)
        with dataset.with_workers(0) as copied:
            assert [batch.tolist() for batch in copied] == before
        assert [batch.tolist() for batch in dataset] == before
        assert dataset.stats().batches == 4
