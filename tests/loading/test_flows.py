"""What old projects have: `Sequence`s, and `ImageDataGenerator`'s iterators, which hold a lock and a generator (P2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp
from tests.support import assert_alike


@pytest.fixture
def generator() -> Any:
    tf = pytest.importorskip("tensorflow")
    return tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255, horizontal_flip=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pytest.importorskip("PIL")
    for number in range(12):
        folder = tmp_path / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        keras.utils.save_img(folder / f"{number}.png", np.full((6, 6, 3), number * 20), scale=False)
    return tmp_path


def _levels(batches: Any) -> list[list[int]]:
    return [np.rint(x[:, 0, 0, 0] * 255 / 20).astype(int).tolist() for x, _ in batches]


@pytest.mark.parametrize("shuffle", [False, True])
def test_flow_from_directory_gives_each_image_once_whoever_loads(
    generator: Any, images: Path, shuffle: bool, running_pool: keras_mp.WorkerPool
) -> None:
    def flow() -> Any:
        return generator.flow_from_directory(images, (6, 6), batch_size=4, shuffle=shuffle, seed=3)

    np.random.seed(0)
    with keras_mp.parallelize(flow(), workers=0, seed=1) as plain:
        expected = _levels(plain)
    np.random.seed(0)
    with keras_mp.parallelize(flow(), pool=running_pool, seed=1) as dataset:
        assert _levels(dataset) == expected
    assert sorted(level for batch in expected for level in batch) == list(range(12))
    assert (expected[0] == [0, 10, 2, 4]) is not shuffle


def test_random_flips_depend_on_the_seed_alone(generator: Any, running_pool: keras_mp.WorkerPool) -> None:  # P2
    x = np.random.default_rng(0).random((24, 4, 4, 3), dtype="float32")

    def batches(**where: Any) -> list[Any]:
        flow = generator.flow(x, np.arange(24), batch_size=4, shuffle=False, seed=5)
        with keras_mp.parallelize(flow, seed=7, **where) as dataset:
            return [part for batch in dataset for part in batch]

    plain = batches(workers=0)
    pairs = list(zip(plain[::2], plain[1::2], strict=True))
    for where in ({"pool": running_pool}, {"workers": 3, "use_multiprocessing": False}):
        for ours, theirs in zip(batches(**where), plain, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    flipped = [[not np.allclose(row * 255, x[number]) for row, number in zip(*pair, strict=True)] for pair in pairs]
    assert len({tuple(batch) for batch in flipped}) > 1  # each batch has draws of its own


def test_unshuffled_batches_are_those_of_the_iterator_itself(images: Path, running_pool: keras_mp.WorkerPool) -> None:
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    for number in range(5):  # noise, and in the other format
        keras.utils.save_img(images / f"class {number % 2}" / f"noise {number}.jpg", rng.random((9, 7, 3)) * 255)
    generator = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)

    def flow() -> Any:
        return generator.flow_from_directory(images, (6, 6), batch_size=4, shuffle=False, class_mode="sparse")

    theirs = flow()
    expected = [next(theirs) for _ in range(len(theirs))]
    assert [len(labels) for _, labels in expected] == [4, 4, 4, 4, 1]
    for where in ({"workers": 0}, {"pool": running_pool}):
        with keras_mp.parallelize(flow(), **where) as dataset:
            assert_alike([*dataset, *dataset], [*expected, *expected])


def test_a_sequence_that_does_not_call_the_constructor_of_its_base_class(running_pool: keras_mp.WorkerPool) -> None:
    sequence: Any = pytest.importorskip("tensorflow").keras.utils.Sequence

    class Squares(sequence):
        def __init__(self, count: int) -> None:
            self.order = np.arange(count)

        def __len__(self) -> int:
            return len(self.order) // 4

        def __getitem__(self, index: int) -> Any:
            numbers = self.order[4 * index : 4 * index + 4]
            return numbers.astype("float32")[:, None], numbers.astype("float32") ** 2

        def on_epoch_end(self) -> None:
            self.order = self.order[::-1]

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with keras_mp.parallelize(Squares(12), pool=running_pool) as dataset:
        first, second = list(dataset), list(dataset)
        model.fit(dataset, epochs=1, verbose=0)
    assert np.concatenate([x[:, 0] for x, _ in first]).tolist() == list(range(12))
    assert np.concatenate([y for _, y in second]).tolist() == [number**2 for number in range(11, -1, -1)]
