"""Bad and odd input, through a worker: the batch that a process without workers gives, or an error that helps."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import keras_mp
from tests.faults.common import SEED, digest, digests
from tests.faults.harm import Harm


@pytest.fixture(scope="module")
def pool() -> Iterator[keras_mp.WorkerPool]:
    with keras_mp.WorkerPool(1) as made:
        # Running from here on, so that it does not count as something that a test has left.
        keras_mp.PoolDataset([1], batch_size=1, pool=made)[0]
        yield made


class Lies:
    """A source shorter than it says."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return list(range(7))[index]


class Forever:
    """A source without an end, whatever it says."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index * index


def _deep(value: Any, depth: int) -> Any:
    for level in range(depth):
        value = {"next": value} if level % 2 else (value, level)
    return value


def _read_only(values: Any) -> Any:
    values.flags.writeable = False
    return values


class _Exploding:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise OverflowError("cannot become an array")


Point = collections.namedtuple("Point", ["x", "y"])  # what users have
_RECORD = np.dtype([("a", "<i4"), ("b", "<f8", (2,))])
_rng = np.random.default_rng(0)

# Samples that make a batch.
_GOOD: dict[str, list[Any]] = {
    "python scalars": [1, 2, 3],
    "ints, then floats": [1, 2.5, 3],
    "bools, then ints": [True, 2, 3],
    "float32, then float64": [np.float32(1), np.float64(2), np.float32(3)],
    "complex": [1j, 2.0, 3],
    "strings of other lengths": ["a", "bcd", ""],
    "bytes with zeros at the end": [b"a\0", b"\0\0", b""],
    "dates": [np.datetime64("2020-01-01"), np.datetime64("2021-01-01T12:00"), np.datetime64("NaT", "s")],
    "0-d arrays": [np.array(1.0), np.array(2.0), np.array(3.0)],
    "zero-size arrays": [np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3))],
    "non-contiguous": [_rng.random((6, 8))[::2, ::-3] for _ in range(3)],
    "Fortran order": [np.asfortranarray(_rng.random((5, 7))) for _ in range(3)],
    "broadcast": [np.broadcast_to(np.float32(i), (4, 5)) for i in range(3)],
    "big-endian": [np.arange(4, dtype=">i4") + i for i in range(3)],
    "structured": [np.array([(1, (2, 3))], _RECORD), np.array([(4, (5, 6))], _RECORD), np.zeros(1, _RECORD)],
    "read-only": [_read_only(np.full(3, i)) for i in range(3)],
    "float16": [np.full(3, i, np.float16) for i in range(3)],
    "object arrays": [np.array([i, "a", None], dtype=object) for i in range(3)],
    "lists of scalars": [[1, 2], [3, 4], [5, 6]],
    "lists of arrays": [[np.zeros(2), np.ones(3)]] * 3,
    "named tuples": [Point(i, np.ones(i and 1)) for i in (1, 1, 1)],
    "None among the parts": [(1, None, {"a": None})] * 3,
    "empty nests": [({}, (), 1)] * 3,
    "nested deeply": [_deep(np.arange(3.0) + i, 60) for i in range(3)],
    "many leaves": [{f"leaf {k}": np.float32(k + i) for k in range(300)} for i in range(3)],
    "keys of several types": [{1: i, "a": i, (2, 3): i} for i in range(3)],
    "a large header": [{"text": "x" * 40_000, "n": i} for i in range(3)],
}

# Samples that do not; the error's type, and words of its text.
_BAD: dict[str, tuple[list[Any], type[Exception], str]] = {
    "other shapes": ([np.zeros(2), np.zeros(3)], ValueError, r"shape \(3,\), but \(2,\) .* `collate=keras_mp.pad"),
    "other rank": ([np.zeros(2), 1.0], ValueError, r"shape \(\), but \(2,\)"),
    "other keys": ([{"a": 1}, {"b": 1}], ValueError, "keys"),
    "other length": ([(1, 2), (1, 2, 3)], ValueError, "3.*2 parts"),
    "None later": ([1, None], TypeError, "None"),
    "None at first": ([None, 1], TypeError, "None"),
    "None as a part": ([(1, None), (1, 2)], ValueError, "is None in the first sample"),
    "a number, then text": ([1, "a"], TypeError, "convert them to one type in `transform`"),
    "text, then a number": (["a", 1], TypeError, "convert them to one type in `transform`"),
    "an object": ([object(), object()], TypeError, "cannot be stacked.*`collate=`"),
    "a set": ([{1, 2}, {3}], TypeError, "cannot be stacked"),
    "ragged lists": ([[[1], [2, 3]], [[1], [2, 3]]], ValueError, "inhomogeneous|ragged|shape"),
    "a broken array": ([_Exploding(), _Exploding()], OverflowError, "cannot become an array"),
}


def _both(source: Any, pool: keras_mp.WorkerPool, **options: Any) -> tuple[Any, Any]:
    """What the dataset gives without workers and with one: digests, or the exception."""
    outcomes: list[Any] = []
    for where in ({"workers": 0}, {"pool": pool}):
        with keras_mp.PoolDataset(source, seed=SEED, **options, **where) as dataset:
            try:
                outcomes.append(digests(dataset))
            except keras_mp.KerasMPError as error:
                outcomes.append(error)
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("samples", _GOOD.values(), ids=_GOOD)
def test_odd_samples_make_the_same_batch(samples: list[Any], pool: keras_mp.WorkerPool) -> None:
    plain, worked = _both(samples, pool, batch_size=3)
    assert isinstance(plain, list), plain
    assert worked == plain


@pytest.mark.parametrize("case", _BAD.values(), ids=_BAD)
def test_bad_samples_are_an_error_that_helps(
    case: tuple[list[Any], type[Exception], str], pool: keras_mp.WorkerPool
) -> None:
    samples, kind, words = case
    for error in _both(samples, pool, batch_size=3):
        assert isinstance(error, keras_mp.SampleError)
        assert isinstance(error, kind)
        with pytest.raises(kind, match=rf"failed on sample \d .*batch 0 of epoch 0(.|\n)*({words})"):
            raise error


@given(
    st.lists(
        hnp.arrays(
            st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes(max_len=4), hnp.byte_string_dtypes(max_len=4)),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60)
def test_any_arrays_give_the_same_outcome(pool: keras_mp.WorkerPool, samples: list[Any]) -> None:
    plain, worked = _both(samples, pool, batch_size=3)
    if isinstance(plain, keras_mp.SampleError):
        assert isinstance(worked, keras_mp.SampleError)
        told = [(error.failure.stage, error.failure.index, error.failure.type) for error in (worked, plain)]
        assert told[0] == told[1]
    else:
        assert worked == plain


def test_bfloat16(pool: keras_mp.WorkerPool) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    samples = [np.arange(4).astype(ml_dtypes.bfloat16) + i for i in range(3)]
    plain, worked = _both(samples, pool, batch_size=3)
    assert worked == plain
    assert "bfloat16" in worked[0]


def test_a_source_shorter_than_it_says(pool: keras_mp.WorkerPool) -> None:
    for error in _both(Lies(), pool, batch_size=4):
        assert isinstance(error, IndexError)
        assert "source failed on sample 7 (not read), batch 1 of epoch 0: IndexError" in str(error)


def test_a_source_longer_than_it_says(pool: keras_mp.WorkerPool) -> None:
    plain, worked = _both(Forever(), pool, batch_size=4)
    assert worked == plain
    assert len(worked) == 3


def test_batch_numbers_out_of_range(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(range(10), batch_size=4, pool=pool) as dataset:
        assert digest(dataset[-1]) == digest(dataset[2]) == digest(np.array([8, 9]))
        for index in (3, -4, 10**9):
            with pytest.raises(IndexError, match=f"batch {index} is out of range: the dataset has 3 batches"):
                dataset[index]


# -- results and exceptions ------------------------------------------------------------------------------------------


class _NeedsMore(Exception):
    def __init__(self, name: str, *, code: int) -> None:
        super().__init__(name)
        self.code = code


class _HoldsGenerator(ValueError):
    def __init__(self) -> None:
        super().__init__("holds a generator")
        self.rows = (row for row in range(2))


class _Text(str):
    __slots__ = ()

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


class _OddText(Exception):
    def __str__(self) -> str:
        return _Text("odd text")


class _NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class _NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _raising(make: Callable[[], BaseException]) -> Callable[[Any], Any]:
    def transform(value: Any) -> Any:
        raise make()

    return transform


_EXCEPTIONS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "constructor needs arguments": (lambda: _NeedsMore("more", code=3), "_NeedsMore: more"),
    "holds what cannot be pickled": (_HoldsGenerator, "_HoldsGenerator: holds a generator"),
    "text of a class of its own": (_OddText, "_OddText: odd text"),
    "no text": (_NoText, "_NoText: <its __str__ raised RuntimeError>"),
    "no arguments": (ZeroDivisionError, "ZeroDivisionError"),
    "KeyError": (lambda: KeyError("key"), "KeyError: 'key'"),
    "StopIteration": (lambda: StopIteration(3), "StopIteration: 3"),
    "SystemExit": (lambda: SystemExit(3), "SystemExit: 3"),
    "KeyboardInterrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
    "UnicodeDecodeError": (lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8'"),
    "a group": (lambda: ExceptionGroup("both", [ValueError(1), TypeError(2)]), "ExceptionGroup: both"),
    "a megabyte of text": (lambda: ValueError("x" * (1 << 20)), "ValueError: xxx"),
    "OSError": (lambda: FileNotFoundError(2, "No such file", "tile.npy"), "No such file.*tile.npy"),
}


@pytest.mark.parametrize("case", _EXCEPTIONS.values(), ids=_EXCEPTIONS)
def test_any_exception_comes_back_and_ends_no_worker(
    case: tuple[Callable[[], BaseException], str], pool: keras_mp.WorkerPool
) -> None:
    make, words = case
    with keras_mp.PoolDataset([_NoRepr(), 2], _raising(make), batch_size=1, pool=pool) as dataset:
        restarts = dataset.stats().restarts
        for index in range(2):
            with pytest.raises(keras_mp.KerasMPError, match=rf"batch {index} of epoch 0: (.|\n)*{words}"):
                dataset[index]
        assert dataset.stats()["restarts"] == restarts


def test_no_exception_of_a_sample_spoils_its_neighbours(pool: keras_mp.WorkerPool) -> None:
    def transform(value: int) -> int:
        if value % 2:
            raise _NoText
        return value

    with keras_mp.PoolDataset(range(8), transform, batch_size=4, on_error="skip", pool=pool) as dataset:
        assert digest(dataset[1]) == digest(np.array([4, 6]))
        assert [failure.index for failure in dataset.failures] == [5, 7]
        with pytest.warns(RuntimeWarning, match="2 of 8 samples failed"):
            dataset.close()


def test_a_crash_does_not_count_failures_twice(tmp_path: Path) -> None:  # P5
    harm = Harm("SIGKILL", tmp_path)

    def transform(value: int) -> int:
        if value in (4, 9):
            raise ValueError("broken")
        if value == 7:
            harm.strike()
        return value

    with keras_mp.WorkerPool(2) as pool:
        options: dict[str, Any] = {"batch_size": 4, "on_error": "replace", "max_failures": 2, "pool": pool}
        with pytest.warns(RuntimeWarning, match="2 of 12 samples failed in epoch 0"):
            with keras_mp.PoolDataset(range(12), transform, **options) as dataset:
                got = [batch.tolist() for batch in dataset]
                assert sorted(failure.index or 0 for failure in dataset.failures) == [4, 9]
    assert got == [[0, 1, 2, 3], [5, 5, 6, 7], [8, 8, 10, 11]]
    assert harm.struck == 1


def test_transforms_that_return_nothing_or_a_generator(pool: keras_mp.WorkerPool) -> None:
    def nothing(value: int) -> None:
        value += 1

    def generate(value: int) -> Iterator[int]:
        yield value

    for transform, words in ((nothing, "returned None; did it forget to return"), (generate, "cannot be stacked")):
        with keras_mp.PoolDataset(range(4), transform, batch_size=2, pool=pool) as dataset:
            with pytest.raises(TypeError, match=f"sample 2 (.|\n)*{words}"):
                dataset[1]
    for piece in ("collate", "batch_transform"):
        options: Any = {piece: lambda batch: None}
        with keras_mp.PoolDataset(range(4), batch_size=2, pool=pool, **options) as dataset:
            with pytest.raises(TypeError, match=r"failed on batch 1 of epoch 0: .*None instead of a batch"):
                dataset[1]


def test_a_batch_above_two_gibibytes(pool: keras_mp.WorkerPool) -> None:
    if psutil.virtual_memory().available < 10 << 30:
        pytest.skip("needs 10 GiB of free memory")

    def transform(value: int) -> Any:
        return np.broadcast_to(np.uint8(value), (1 << 30) + 64)

    with keras_mp.PoolDataset(range(1, 4), transform, batch_size=3, pool=pool) as dataset:
        batch = dataset[0]
        assert batch.shape == (3, (1 << 30) + 64)
        assert (batch[:, :: 1 << 20] == [[1], [2], [3]]).all()
        assert (batch[:, -1] == [1, 2, 3]).all()
        assert batch.ctypes.data % 64 == 0
        del batch
