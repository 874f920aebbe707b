"""The default collate against `np.stack`; its errors name the leaf."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_mp.loading.collate import Samples, Stack, allocating, empty
from tests.support import assert_same

Array = npt.NDArray[Any]


class Point(NamedTuple):
    x: Any
    y: Any


def _stack(samples: list[Any]) -> Any:
    stack = Stack(len(samples))
    for row, sample in enumerate(samples):
        stack.put(row, sample)
    return stack.finish(len(samples))


def _reference(samples: list[Any]) -> Any:
    """The same by its definition: leaf by leaf, `np.stack`."""
    first = samples[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: _reference([sample[key] for sample in samples]) for key in first}
    if isinstance(first, Point):
        return Point(*(_reference([sample[k] for sample in samples]) for k in range(2)))
    if isinstance(first, tuple):
        return tuple(_reference([sample[k] for sample in samples]) for k in range(len(first)))
    return np.stack([np.asarray(sample) for sample in samples])


_LEAVES = st.one_of(
    st.tuples(
        st.one_of(hnp.integer_dtypes(), hnp.floating_dtypes(), hnp.boolean_dtypes(), hnp.complex_number_dtypes()),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ).map(lambda leaf: hnp.arrays(*leaf)),
    st.just(st.integers(-(2**31), 2**31)),
    st.just(st.floats(width=32)),
    st.just(st.booleans()),
    st.just(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)),
    st.just(st.none()),
)


# Strategies of samples that all have one structure.
_STRUCTURES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda parts: st.tuples(*parts)),
        st.tuples(inner, inner).map(lambda parts: st.builds(Point, *parts)),
        st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3).map(st.fixed_dictionaries),
    ),
    max_leaves=5,
)


@given(st.data(), st.integers(1, 5))
def test_stacks_like_numpy(data: st.DataObject, count: int) -> None:
    structure = data.draw(_STRUCTURES.filter(lambda s: s != st.none()))
    samples = [data.draw(structure) for _ in range(count)]
    if samples[0] is None:
        with pytest.raises(TypeError, match="returned None"):
            _stack(samples)
        return
    native = _to_native(_reference(samples))
    assert_same(_stack(samples), native, "c_contiguous")


def _to_native(nest: Any) -> Any:
    """A batch is in the machine's byte order: TensorFlow and torch know no other."""
    if isinstance(nest, np.ndarray):
        return nest.astype(nest.dtype.newbyteorder("="))
    if isinstance(nest, dict):
        return {key: _to_native(value) for key, value in nest.items()}
    if isinstance(nest, tuple):
        parts = [_to_native(value) for value in nest]
        return type(nest)(*parts) if isinstance(nest, Point) else tuple(parts)
    return nest


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([1, 2], np.array([1, 2])),
        ([1, 2.5], np.array([1.0, 2.5])),
        ([True, False], np.array([True, False])),
        (["a", "long", ""], np.array(["a", "long", ""])),
        ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]])),
        ([[[1], [2]], [[3], [4]]], np.array([[[1], [2]], [[3], [4]]])),
        ([np.float32(1), np.float32(2)], np.array([1, 2], np.float32)),
        ([np.int8(1), np.int64(2)], np.array([1, 2])),
        ([np.arange(2, dtype=np.uint8), np.arange(2, dtype=np.float32)], np.array([[0, 1], [0, 1]], np.float32)),
        ([np.array(["ab"]), np.array(["abc"])], np.array([["ab"], ["abc"]])),
        ([np.datetime64("2020-01-01"), np.datetime64("2021-01-01")], np.array(["2020-01-01", "2021-01-01"], "M8[D]")),
        ([np.arange(2, dtype=">f4")], np.array([[0, 1]], np.float32)),
        ([np.arange(2, dtype=ml_dtypes.bfloat16)] * 2, np.array([[0, 1], [0, 1]], ml_dtypes.bfloat16)),
    ],
)
def test_leaves(samples: list[Any], expected: Array) -> None:
    assert_same(_stack(samples), expected, "c_contiguous")


def test_bytes_keep_their_trailing_zeros() -> None:
    batch = _stack([b"a\0", b"bc", b""])
    assert batch.dtype == object
    assert batch.tolist() == [b"a\0", b"bc", b""]


def test_structures_are_kept() -> None:
    batch = _stack([{"a": [np.zeros(2), np.ones(3)], "b": Point(1, None)}] * 4)
    assert list(batch) == ["a", "b"]
    assert isinstance(batch["a"], list)
    assert [array.shape for array in batch["a"]] == [(4, 2), (4, 3)]
    assert isinstance(batch["b"], Point)
    assert batch["b"].x.shape == (4,)
    assert batch["b"].y is None


@pytest.mark.parametrize("make", [OrderedDict, MappingProxyType, lambda d: dict(reversed(d.items()))])
def test_mappings_of_any_kind_and_order(make: Callable[[dict[str, int]], Any]) -> None:
    batch = _stack([{"a": 1, "b": 2}, make({"a": 3, "b": 4})])
    assert type(batch) is dict
    assert {key: value.tolist() for key, value in batch.items()} == {"a": [1, 3], "b": [2, 4]}


def test_tensors_of_other_libraries() -> None:
    torch = pytest.importorskip("torch")
    batch = _stack([(torch.arange(3), torch.tensor(1.5))] * 2)
    assert [type(part) for part in batch] == [np.ndarray, np.ndarray]
    assert batch[0].tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("make", ["requires_grad", "bfloat16"])
def test_tensors_that_numpy_cannot_take_are_named(make: str) -> None:
    torch = pytest.importorskip("torch")
    options = {"requires_grad": True} if make == "requires_grad" else {"dtype": torch.bfloat16}
    with pytest.raises(
        TypeError, match=r"sample\['a'\] is of type Tensor, of which NumPy can make no array: .*transform"
    ):
        _stack([{"a": torch.ones(2, **options)}])


@pytest.mark.parametrize("kind", ["csr_array", "csr_matrix"])
def test_sparse_rows_are_refused_with_the_way_out(kind: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"sample\[0\] is of type .*, which is sparse .*toarray\(\)"):
        _stack([(getattr(sparse, kind)(np.eye(3))[1], 1)])


_ERRORS: dict[str, tuple[list[Any], type[Exception], list[str]]] = {
    "shape": ([np.zeros((2, 3)), np.zeros((2, 4))], ValueError, ["sample has shape (2, 4), but (2, 3)", "collate="]),
    "deep shape": (
        [{"a": (0, np.zeros(3))}, {"a": (0, np.zeros(4))}],
        ValueError,
        ["sample['a'][1] has shape (4,), but (3,)", "transform"],
    ),
    "missing key": ([{"a": 1, "b": 2}, {"a": 1}], ValueError, ["['a']", "['a', 'b']"]),
    "more parts": ([(1, 2), (1, 2, 3)], ValueError, ["keys 3", "2 parts"]),
    "leaf for nest": ([{"a": (1, 2)}, {"a": 1}], ValueError, ["sample['a']", "of type int", "2 parts"]),
    "none later": ([None, (1, 2)], TypeError, ["returned None"]),
    "none inside": ([(1, None), (1, 2)], ValueError, ["sample[1] is None in the first sample", "of type int"]),
    "none for leaf": ([(1, 2), (1, None)], TypeError, ["sample[1]", "NoneType"]),
    "string after number": ([1, "a"], TypeError, ["sample has dtype <U1, but int64", "transform"]),
    "number after string": ([{"a": "x"}, {"a": 1.0}], TypeError, ["sample['a'] has dtype float64, but <U1"]),
    "object": ([(1, object())], TypeError, ["sample[1] is of type object", "collate="]),
    "set": ([{1, 2}], TypeError, ["sample is of type set", "collate="]),
    "empty list": ([{"a": []}, {"a": [1]}], ValueError, ["sample['a'] has", "0 parts", "keras_mp.pad()"]),
    "none": ([None], TypeError, ["transform returned None", "source"]),
    "date and number": ([np.datetime64("2020"), 1.5], TypeError, ["sample has dtype float64, but datetime64[Y]"]),
}


@pytest.mark.parametrize(("samples", "kind", "texts"), _ERRORS.values(), ids=_ERRORS)
def test_errors_name_the_leaf(samples: list[Any], kind: type[Exception], texts: list[str]) -> None:
    with pytest.raises(kind) as caught:
        _stack(samples)
    for text in texts:
        assert text in str(caught.value)


def test_a_first_sample_that_fails_fixes_nothing() -> None:
    stack = Stack(2)
    with pytest.raises(TypeError):
        stack.put(0, {"a": 1, "b": object()})
    stack.put(0, (1, 2))
    stack.put(1, (3, 4))
    assert [part.tolist() for part in stack.finish(2)] == [[1, 3], [2, 4]]


def test_rows_may_be_repeated_and_left_out() -> None:
    stack = Stack(4)
    stack.put(0, {"a": 1, "b": (None, np.zeros(2))})
    stack.put(2, {"a": 3, "b": (None, np.ones(2))})
    stack.put(1, stack.row(0))
    stack.put(3, stack.row(2))
    assert stack.finish(4)["a"].tolist() == [1, 1, 3, 3]
    batch = stack.finish(2)
    assert batch["a"].tolist() == [1, 1]
    assert batch["b"][0] is None
    assert batch["b"][1].shape == (2, 2)


@pytest.mark.parametrize("leaf", [1.5, "text", b"a\0", np.datetime64("2020"), np.array({1}), np.array([{1}, None])])
def test_a_row_can_be_put_elsewhere_as_it_is(leaf: Any) -> None:
    stack = Stack(2)
    stack.put(0, {"a": [leaf, None]})
    stack.put(1, stack.row(0))
    first, second = stack.finish(2)["a"][0]
    np.testing.assert_array_equal(first, second)
    assert type(first) is type(second)


def test_a_batch_without_samples_is_none() -> None:
    assert Stack(3).finish(0) is None


def test_samples_are_collected_for_a_collate_of_the_users() -> None:
    samples = Samples(3, list)
    samples.put(0, "a")
    samples.put(1, "b")
    samples.put(2, samples.row(0))
    assert samples.finish(3) == ["a", "b", "a"]
    assert samples.finish(2) == ["a", "b"]


# -- empty -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"), [(3, (3,)), (np.int64(3), (3,)), ((2, 3), (2, 3)), ([2, 3], (2, 3)), ((), ()), (0, (0,))]
)
def test_empty_is_like_numpys(shape: Any, expected: tuple[int, ...]) -> None:
    made = empty(shape)
    assert made.shape == expected
    assert made.dtype == np.float64
    assert empty(shape, np.int8).dtype == np.int8


def test_empty_takes_the_batchs_memory() -> None:
    asked: list[tuple[tuple[int, ...], np.dtype[Any]]] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        asked.append((shape, dtype))
        return np.zeros(shape, dtype)

    with allocating(allocate):
        _stack([{"a": np.zeros((2, 3), np.float32), "b": b"x"}] * 4)
        empty(5, "int16")
        empty((2,), object)
        with allocating(None):
            empty(7)
        with pytest.raises(ValueError, match="negative"):
            empty(-1)
    empty(9)
    assert asked == [((4, 2, 3), np.dtype(np.float32)), ((5,), np.dtype(np.int16))]
