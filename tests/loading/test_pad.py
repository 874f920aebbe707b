"""`keras_mp.pad` against its definition; what it is told wrongly is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import keras_mp
from keras_mp.loading.collate import allocating

Array = npt.NDArray[Any]


def _reference(arrays: list[Array], lengths: Callable[[int, int], int]) -> Array:
    """By the definition: `np.pad` to what `lengths(axis, longest)` says, then `np.stack`."""
    longest = [lengths(axis, max(a.shape[axis] for a in arrays)) for axis in range(arrays[0].ndim)]
    return np.stack([np.pad(a, [(0, n - size) for n, size in zip(longest, a.shape, strict=True)]) for a in arrays])


@st.composite
def _ragged(draw: st.DrawFn) -> list[Array]:
    dtype = draw(st.sampled_from([np.int16, np.float32, np.bool_, np.complex64, np.uint8]))
    ndim = draw(st.integers(1, 3))
    shapes = draw(st.lists(st.tuples(*[st.integers(0, 5)] * ndim), min_size=1, max_size=6))
    return [draw(hnp.arrays(dtype, shape)) for shape in shapes]


@given(_ragged())
def test_pads_to_the_longest(arrays: list[Array]) -> None:
    batch = keras_mp.pad()(arrays)
    expected = _reference(arrays, lambda _, longest: longest)
    assert batch.dtype == expected.dtype
    np.testing.assert_array_equal(batch, expected)


@given(_ragged(), st.integers(1, 4))
def test_rounds_lengths_up(arrays: list[Array], multiple: int) -> None:
    """An int is for the only axis, or for all but the last."""
    last = arrays[0].ndim - 1

    def lengths(axis: int, longest: int) -> int:
        return longest if axis == last > 0 else -(-longest // multiple) * multiple

    np.testing.assert_array_equal(keras_mp.pad(multiple_of=multiple)(arrays), _reference(arrays, lengths))
    everywhere = keras_mp.pad(multiple_of=(multiple,) * (last + 1))(arrays)
    assert all(length % multiple == 0 for length in everywhere.shape[1:])


@given(_ragged())
def test_a_fixed_length(arrays: list[Array]) -> None:
    batch = keras_mp.pad(max_length=tuple([7] * arrays[0].ndim))(arrays)
    np.testing.assert_array_equal(batch, _reference(arrays, lambda *_: 7))


@pytest.mark.parametrize(("longest", "length"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 10), (10, 10)])
def test_a_multiple_up_to_a_length(longest: int, length: int) -> None:
    assert keras_mp.pad(multiple_of=4, max_length=10)([np.ones(longest)]).shape == (1, length)


class Pair(NamedTuple):
    x: Any
    y: Any


def test_nests_and_values_by_path() -> None:
    samples = [
        Pair({"ids": [1, 2, 3], "name": ["a", "bb"]}, (np.float32(1), None)),
        Pair({"ids": [], "name": ["<unknown>"]}, (np.float32(2), None)),
    ]
    batch = keras_mp.pad({"0/ids": -1, (0, "name"): "<pad>"}, mask={"known": "ids"})(samples)
    assert isinstance(batch, Pair)
    assert list(batch.x) == ["ids", "name", "known"]
    np.testing.assert_array_equal(batch.x["ids"], [[1, 2, 3], [-1, -1, -1]])
    assert batch.x["ids"].dtype.kind == "i"
    assert batch.x["name"].tolist() == [["a", "bb"], ["<unknown>", "<pad>"]]
    np.testing.assert_array_equal(batch.x["known"], [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(batch.y[0], [1, 2])
    assert batch.y[1] is None


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([["a"], ["b", "c"]], [["a", ""], ["b", "c"]]),
        ([[b"a"], [b"b", b"c\0"]], [[b"a", b""], [b"b", b"c\0"]]),
        ([np.array([b"xy"]), np.array([b"z", b"w"])], [[b"xy", b""], [b"z", b"w"]]),
        ([[], [], [1]], [[0], [0], [1]]),
        ([[], []], [[], []]),
        ([[1], [2.5, 3]], [[1, 0], [2.5, 3]]),
    ],
)
def test_strings_and_empty_lists(samples: list[Any], expected: list[Any]) -> None:
    assert keras_mp.pad()(samples).tolist() == expected


def test_the_mask_is_of_the_first_leaf_with_axes() -> None:
    samples = [{"label": 1, "image": np.ones((2, 3, 3))}, {"label": 0, "image": np.ones((4, 1, 3))}]
    mask = keras_mp.pad(mask="inside")(samples)["inside"]
    assert mask.dtype == np.bool_
    assert mask.shape == (2, 4, 3)
    assert mask.sum(axis=(1, 2)).tolist() == [6, 4]


def test_it_is_written_where_arrays_are_allocated() -> None:
    made: list[Array] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        made.append(np.full(shape, 7, dtype))
        return made[-1]

    with allocating(allocate):
        batch = keras_mp.pad(mask="m")([{"a": [1, 2], "b": 3}, {"a": [4], "b": 5}])
    assert [part is array for part, array in zip(batch.values(), made, strict=True)] == [True] * 3
    np.testing.assert_array_equal(batch["a"], [[1, 2], [4, 0]])


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_a_transform_may_use_its_memory_again(ring: int) -> None:
    buffers = [np.zeros(9, np.int64) for _ in range(ring)]

    def fill(number: int) -> Array:
        buffer = buffers[number % ring]
        buffer[: number + 1] = number
        return buffer[: number + 1]

    with keras_mp.PoolDataset(range(8), fill, batch_size=8, collate=keras_mp.pad(-1), workers=0) as dataset:
        (batch,) = dataset
    expected = [[number] * (number + 1) + [-1] * (7 - number) for number in range(8)]
    assert batch.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"value": [1]}, "value must be a number"),
        ({"value": {"a": None}}, "value must be a number"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"multiple_of": 1.5}, "multiple_of must be an int, got 1.5"),
        ({"multiple_of": True}, "multiple_of must be an int, got True"),
        ({"multiple_of": (1, "a")}, r"multiple_of\[i\] must be an int, got 'a'"),
        ({"max_length": -1}, "max_length must be at least 1, got -1"),
        ({"max_length": {"a": 0}}, "max_length must be at least 1, got 0"),
        ({"mask": ""}, "mask must be the name of a leaf"),
        ({"mask": 3}, "mask must be the name of a leaf"),
        ({"mask": {}}, "mask must be the name of a leaf"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        keras_mp.pad(**arguments)


@pytest.mark.parametrize(
    ("arguments", "samples", "text"),
    [
        ({"max_length": 2}, [[1, 2, 3]], "longer in axis 0 than max_length=2"),
        ({"value": -1}, [np.zeros(2, np.uint8)], "dtype uint8, which cannot hold value=-1"),
        ({"value": 0.5}, [[1]], "cannot hold value=0.5"),
        ({"value": "x"}, [[1]], "cannot hold value='x'"),
        ({"value": 1}, [["a"]], "cannot hold value=1"),
        ({"value": float("nan")}, [[1]], "cannot hold value=nan"),
        ({"value": 1e300}, [np.zeros(1, np.float32)], "cannot hold value=1e"),
        ({"value": {"q": 1}}, [{"a": [1]}], r"value of keras_mp.pad has the path 'q'.*sample\['a'\]"),
        ({"max_length": {"q": 1}}, [{"a": [1]}], "max_length of keras_mp.pad has the path 'q'"),
        ({"multiple_of": (2, 2)}, [[1]], r"multiple_of=\(2, 2\) of keras_mp.pad is for leaves of 2 axes"),
        ({"max_length": {"a": (2, 2)}}, [{"a": [1]}], r"has 1 axes, but max_length=\(2, 2\) is for 2"),
        ({"mask": "a"}, [{"a": [1]}], "have a leaf 'a' already"),
        ({"mask": "m"}, [{"a": 1}], "no leaf with an axis"),
        ({"mask": {"m": "b"}}, [{"a": [1]}], "no leaf with an axis at 'b'"),
        ({"mask": "m"}, [[1]], "dicts"),
        ({}, [[1], [[1]]], "sample has 2 axes, but 1 axis in the first sample"),
        ({}, [["a"], [1]], "1 axis, but 1 axis of str"),
        ({}, [[], ["a"], [1]], "1 axis, but 1 axis of str"),
        ({}, [{"a": [1]}, {"b": [1]}], "same structure"),
        ({}, [None], "returned None"),
        ({}, [(None, [1]), ([1], [1])], r"but no value \(None\)"),
        ({}, [object()], "cannot be stacked"),
    ],
)
def test_bad_samples(arguments: dict[str, Any], samples: list[Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        keras_mp.pad(**arguments)(samples)


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_a_sample_that_does_not_fit_is_left_out_alone(policy: Any) -> None:  # P5
    source = [[1.0, 2.0], [[3.0]], [4.0], [5.0] * 9]
    pad = keras_mp.pad(max_length=4)
    with keras_mp.PoolDataset(source, collate=pad, batch_size=4, on_error=policy, workers=0) as dataset:
        with pytest.warns(RuntimeWarning, match="2 of 4 samples failed"):
            (batch,) = dataset
        kept = [[1, 2, 0, 0], [4, 0, 0, 0]] if policy == "skip" else [[1, 2, 0, 0]] * 2 + [[4, 0, 0, 0]] * 2
        assert batch.tolist() == kept
        assert [(failure.index, failure.stage) for failure in dataset.failures] == [(1, "collate"), (3, "collate")]


def test_most_samples_decide() -> None:
    source = [[[1.0]], [2.0, 3.0], [4.0]]
    with keras_mp.PoolDataset(source, collate=keras_mp.pad(), batch_size=3, on_error="skip", workers=0) as dataset:
        with pytest.warns(RuntimeWarning, match="1 of 3 samples failed"):
            (batch,) = dataset
    assert batch.tolist() == [[2, 3], [4, 0]]


def test_the_default_collate_names_it() -> None:
    with keras_mp.PoolDataset([[1], [1, 2]], batch_size=2, workers=0) as dataset:
        with pytest.raises(ValueError, match=r"collate=keras_mp\.pad\(\)"):
            next(iter(dataset))


def test_workers_give_the_same(running_pool: keras_mp.WorkerPool) -> None:  # P2
    source = [{"ids": list(range(number % 7)), "y": number} for number in range(40)]
    options: dict[str, Any] = {
        "batch_size": 8,
        "shuffle": True,
        "seed": 3,
        "collate": keras_mp.pad(-1, multiple_of=4, mask="known"),
    }
    with keras_mp.PoolDataset(source, workers=0, **options) as here:
        with keras_mp.PoolDataset(source, pool=running_pool, **options) as there:
            for one, other in zip(here, there, strict=True):
                assert list(one) == list(other) == ["ids", "y", "known"]
                for key in one:
                    np.testing.assert_array_equal(one[key], other[key])
