"""Views: which sample stands where, what a view refuses, and that it copies and reads nothing it need not."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import keras_mp
from tests.support import assert_refused


class _Counting:
    """A source that says what is read from it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


_FRACTIONS = st.floats(0.01, 0.99)


@given(st.integers(2, 200), _FRACTIONS, st.none() | st.integers(0, 2**70))
def test_split_puts_each_sample_into_one_part(length: int, fraction: float, seed: int | None) -> None:
    size = round(length * fraction)
    assume(0 < size < length)
    first, second = keras_mp.split(range(length), fraction, seed=seed)
    assert len(first) == size
    assert sorted([*first, *second]) == list(range(length))
    assert [*first] == sorted(first)
    assert [*second] == sorted(second)
    if seed is None:
        assert [*first] == list(range(size))
    again, _ = keras_mp.split(range(length), fraction, seed=seed)
    assert [*again] == [*first]


def test_split_draws_by_its_seed() -> None:
    assert len({tuple(keras_mp.split(range(50), 0.5, seed=seed)[0]) for seed in range(20)}) == 20
    assert [*keras_mp.split(range(50), 0.5)[0]] == [*keras_mp.split(range(50), 0.5, seed=0)[0]]
    often = Counter(index for seed in range(400) for index in keras_mp.split(range(10), 0.3, seed=seed)[0])
    assert all(abs(often[index] - 120) < 6 * np.sqrt(400 * 0.3 * 0.7) for index in range(10))


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=100), _FRACTIONS, st.none() | st.integers(0, 9))
def test_split_divides_each_class_alike(labels: list[str], fraction: float, seed: int | None) -> None:
    size = round(len(labels) * fraction)
    assume(0 < size < len(labels))
    first, second = keras_mp.split(range(len(labels)), fraction, seed=seed, stratify=labels)
    assert len(first) == size
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label, count in Counter(labels).items():
        assert abs(sum(labels[index] == label for index in first) - count * size / len(labels)) < 1


def test_a_part_of_a_part_is_a_part_of_the_source() -> None:
    train, rest = keras_mp.split(range(1000), 0.6)
    val, test = keras_mp.split(rest, 0.5, seed=1)
    assert sorted([*train, *val, *test]) == list(range(1000))
    assert len(val) == len(test) == 200
    assert len(pickle.dumps(val)) < 3000  # one array of 400 indices of two bytes, not the first split's as well


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_concat_is_one_after_the_other(lengths: list[int]) -> None:
    sources = [[(number, index) for index in range(length)] for number, length in enumerate(lengths)]
    joined = keras_mp.concat(*sources)
    assert len(joined) == sum(lengths)
    assert [*joined] == [sample for source in sources for sample in source]


def test_zip_is_side_by_side() -> None:
    x, y = np.arange(6).reshape(3, 2), ["a", "b", "c"]
    together = keras_mp.zip(x, y, range(3))
    assert len(together) == 3
    assert [(sample[0].tolist(), *sample[1:]) for sample in together] == [
        ([0, 1], "a", 0),
        ([2, 3], "b", 1),
        ([4, 5], "c", 2),
    ]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
def test_windows_are_runs_of_the_array(count: int, length: int, stride: int) -> None:
    assume(length <= count)
    array = np.arange(count * 2).reshape(count, 2)
    cut = keras_mp.windows(array, length, stride)
    expected = [array[start : start + length] for start in range(0, count - length + 1, stride)]
    assert len(cut) == len(expected)
    for sample, window in zip(cut, expected, strict=True):
        np.testing.assert_array_equal(sample, window)
        assert np.shares_memory(sample, array)  # nothing is copied


def test_windows_of_what_is_no_array() -> None:
    assert keras_mp.windows(range(5), 2, 2)[1] == range(2, 4)
    assert keras_mp.windows([1, 2, 3], 3)[0] == [1, 2, 3]


def test_views_are_lazy() -> None:
    source, other = _Counting(100), _Counting(100)
    part, _ = keras_mp.split(keras_mp.zip(keras_mp.concat(source, source), keras_mp.concat(other, other)), 0.5)
    keras_mp.split(part, 0.5)
    assert source.read == other.read == []
    sample = part[70]
    assert source.read == other.read == [sample[0]]


@pytest.mark.parametrize(
    "view",
    [
        keras_mp.split(range(8), 0.5, seed=None)[0],
        keras_mp.concat(range(2), range(2, 4)),
        keras_mp.windows(range(4), 1),
        keras_mp.zip(range(4)),
    ],
    ids=repr,
)
def test_a_view_is_a_sequence(view: Any) -> None:
    samples = [*view]
    assert len(samples) == len(view) == 4
    assert [view[index] for index in range(-4, 0)] == samples
    assert view[np.int64(2)] == samples[2]
    for index in (4, -5, 10**20):
        with pytest.raises(IndexError, match=rf"sample {index} is out of range: .*\(4 samples of .*range.*\) has 4"):
            view[index]
    with pytest.raises(TypeError):
        view[1.0]
    copy = pickle.loads(pickle.dumps(view))
    assert [*copy] == samples


def test_an_array_travels_once_however_many_views_look_at_it() -> None:
    array = np.zeros((1000, 100))
    labels = np.arange(1000)
    first, second = keras_mp.split(keras_mp.zip(array, labels), 0.5)
    source = keras_mp.concat(
        first, second, keras_mp.zip(array, labels), keras_mp.zip(keras_mp.windows(array, 1), labels)
    )
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    assert len(body) < 3000
    sizes = sorted(buffer.raw().nbytes for buffer in buffers)
    assert sizes.count(array.nbytes) == 1
    assert sum(sizes) < array.nbytes + labels.nbytes + 2 * 1000 + 1000  # the order of the split, and ends


_CASES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "fraction 0": (lambda: keras_mp.split([1, 2], 0.0), ValueError, ["fraction must lie between 0.0 and 1.0, got 0.0"]),
    "fraction 1": (lambda: keras_mp.split([1, 2], 1), ValueError, ["fraction must lie between 0.0 and 1.0, got 1"]),
    "fraction 80": (lambda: keras_mp.split([1, 2], 80), ValueError, ["got 80", "the first part's share"]),
    "fraction negative": (lambda: keras_mp.split([1, 2], -0.2), ValueError, ["got -0.2"]),
    "fraction nan": (lambda: keras_mp.split([1, 2], float("nan")), ValueError, ["got nan"]),
    "fraction str": (lambda: keras_mp.split([1], "0.5"), TypeError, ["fraction must be a float, got '0.5'"]),  # type: ignore[arg-type]
    "fraction bool": (lambda: keras_mp.split([1], True), TypeError, ["fraction must be a float, got True"]),
    "fraction leaves nothing": (
        lambda: keras_mp.split(range(3), 0.9),
        ValueError,
        ["fraction=0.9 of 3 samples are 3, which leaves nothing for the second part"],
    ),
    "fraction takes nothing": (
        lambda: keras_mp.split(range(3), 0.1),
        ValueError,
        ["fraction=0.1 of 3 samples are 0, which leaves nothing for the first part"],
    ),
    "split one": (lambda: keras_mp.split([1], 0.5), ValueError, ["of 1 samples", "leaves nothing"]),
    "split empty": (lambda: keras_mp.split([], 0.5), ValueError, ["source is empty"]),
    "split iterator": (lambda: keras_mp.split(iter([1]), 0.5), TypeError, ["source must have len() and [i]"]),
    "split dict": (lambda: keras_mp.split({"a": 1}, 0.5), TypeError, ["source must be a sequence of samples"]),
    "split seed": (lambda: keras_mp.split([1, 2], 0.5, seed=-1), ValueError, ["seed must be at least 0, got -1"]),
    "stratify length": (
        lambda: keras_mp.split(range(4), 0.5, stratify=[0, 1]),
        ValueError,
        ["stratify has 2 labels, but the source has 4 samples"],
    ),
    "stratify one-hot": (
        lambda: keras_mp.split(range(2), 0.5, stratify=[[0, 1], [1, 0]]),
        ValueError,
        ["stratify must be 1-d", "stratify.argmax(axis=1)"],
    ),
    "concat nothing": (lambda: keras_mp.concat(), TypeError, ["concat() needs at least one source"]),
    "concat empty": (lambda: keras_mp.concat([1], []), ValueError, ["sources[1] is empty"]),
    "concat list": (lambda: keras_mp.concat([1], 2), TypeError, ["sources[1] must have len() and [i], got 2"]),
    "zip nothing": (lambda: keras_mp.zip(), TypeError, ["zip() needs at least one source"]),
    "zip lengths": (
        lambda: keras_mp.zip([1, 2], [1], [1, 2]),
        ValueError,
        ["sources[0] has 2 samples and sources[1] has 1"],
    ),
    "zip iterator": (lambda: keras_mp.zip([1], iter([1])), TypeError, ["sources[1] must have len() and [i]"]),
    "windows long": (
        lambda: keras_mp.windows([1, 2], 3),
        ValueError,
        ["length=3 is greater than the array, which has 2"],
    ),
    "windows length": (lambda: keras_mp.windows([1], 0), ValueError, ["length must be at least 1, got 0"]),
    "windows stride": (lambda: keras_mp.windows([1], 1, 0), ValueError, ["stride must be at least 1, got 0"]),
    "windows float": (lambda: keras_mp.windows([1], 1, 0.5), TypeError, ["stride must be an int, got 0.5"]),  # type: ignore[arg-type]
    "windows scalar": (lambda: keras_mp.windows(np.array(1.0), 1), TypeError, ["array must have len() and [i]"]),
    "windows view": (
        lambda: keras_mp.windows(keras_mp.concat([1, 2]), 1),
        TypeError,
        ["array must give a part for [start:stop], which concat(2 samples", "take windows of its source"],
    ),
}


@pytest.mark.parametrize(("make", "kind", "texts"), _CASES.values(), ids=_CASES)
def test_bad_arguments(make: Callable[[], Any], kind: type[Exception], texts: list[str]) -> None:
    assert_refused(make, kind, texts)
