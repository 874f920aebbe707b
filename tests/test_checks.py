"""Bad arguments: the error has the right type and names the argument, the value and what to do."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import keras_mp
from tests.support import assert_refused

_DATA = np.arange(10.0)


def _made(**options: Any) -> Callable[[], Any]:
    return lambda: keras_mp.PoolDataset(_DATA, **options)


def _from(source: Any) -> Callable[[], Any]:
    return lambda: keras_mp.PoolDataset(source)


class _NoLength:
    def __getitem__(self, index: int) -> int:
        return index


class _Frame(list[int]):
    iloc = None


_CASES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # source
    "source str": (_from("tiles/"), TypeError, ["source must be a sequence", "str: 'tiles/'", "pass a list"]),
    "source bytes": (_from(b"tiles"), TypeError, ["source must be a sequence", "bytes: b'tiles'"]),
    "source dict": (_from({"a": 1}), TypeError, ["source", "dict: {'a': 1}", "list(mapping.items())"]),
    "source set": (_from({1}), TypeError, ["source", "set: {1}", "list"]),
    "source generator": (_from(iter([1])), TypeError, ["source must have len() and [i]", "list_iterator", "pass list"]),
    "source None": (_from(None), TypeError, ["source must have len() and [i]", "None"]),
    "source number": (_from(5), TypeError, ["source must have len() and [i], got 5"]),
    "source without len": (_from(_NoLength()), TypeError, ["source must have len()", "_NoLength"]),
    "source 0-d": (_from(np.array(3.0)), TypeError, ["source must have len()", "array(3.)"]),
    "source empty": (_from([]), ValueError, ["source is empty, got []", "at least one sample"]),
    "source frame": (_from(_Frame([1])), TypeError, ["source must give a row", "_Frame", "to_dict('records')"]),
    "source columns": (
        _from((np.ones((8, 2)), np.ones(8))),
        TypeError,
        ["source must be a sequence of samples", "2 arrays", "keras_mp.zip(X, y)", "list(source)"],
    ),
    "source columns and weights": (_from((np.ones(8), [1] * 8, [2] * 8)), TypeError, ["zip(X, y, sample_weight)"]),
    # functions
    "transform": (_made(transform=3), TypeError, ["transform must be callable or None, got 3"]),
    "collate": (_made(collate="pad"), TypeError, ["collate must be callable or None, got 'pad'"]),
    "batch_transform": (_made(batch_transform=[]), TypeError, ["batch_transform must be callable or None, got []"]),
    "order": (_made(order=[1, 2]), TypeError, ["order must be callable or None, got [1, 2]"]),
    "order and shuffle": (
        _made(order=lambda e, r: [0], shuffle=True),
        ValueError,
        ["order=", "shuffle=True", "leave one of them out"],
    ),
    "unpicklable transform": (
        lambda: keras_mp.PoolDataset(_DATA, lambda x, rows=(row for row in _DATA): x),
        keras_mp.KerasMPError,
        ["transform cannot be sent to worker processes", "generator", "PerWorker", "workers=0"],
    ),
    # numbers
    "batch_size 0": (_made(batch_size=0), ValueError, ["batch_size must be at least 1, got 0"]),
    "batch_size float": (_made(batch_size=2.0), TypeError, ["batch_size must be an int, got 2.0"]),
    "batch_size bool": (_made(batch_size=True), TypeError, ["batch_size must be an int, got True"]),
    "seed negative": (_made(seed=-1), ValueError, ["seed must be at least 0, got -1"]),
    "seed str": (_made(seed="x"), TypeError, ["seed must be an int, got 'x'"]),
    "workers negative": (_made(workers=-1), ValueError, ["workers must be between 0 and", "got -1", "None"]),
    "workers many": (_made(workers=10**6), ValueError, ["workers must be between 0 and", "got 1000000"]),
    "workers float": (_made(workers=2.0), TypeError, ["workers must be an int or None, got 2.0"]),
    "workers bool": (_made(workers=True), TypeError, ["workers must be an int or None, got True"]),
    "max_queue_size": (_made(max_queue_size=0), ValueError, ["max_queue_size must be at least 1, got 0"]),
    "retries": (_made(retries=-1), ValueError, ["retries must be at least 0, got -1"]),
    "retries None": (_made(retries=None), TypeError, ["retries must be an int, got None"]),
    "timeout 0": (_made(timeout=0), ValueError, ["timeout must be a positive number of seconds, got 0", "None waits"]),
    "timeout nan": (_made(timeout=float("nan")), ValueError, ["timeout must be a positive", "nan"]),
    "timeout inf": (_made(timeout=float("inf")), ValueError, ["timeout must be a positive", "inf", "None"]),
    "timeout str": (_made(timeout="5"), TypeError, ["timeout must be a number of seconds or None, got '5'"]),
    "max_failures share": (_made(max_failures=1.5), ValueError, ["max_failures as a float", "got 1.5", "int"]),
    "max_failures nan": (_made(max_failures=float("nan")), ValueError, ["max_failures as a float", "nan"]),
    "max_failures negative": (_made(max_failures=-1), ValueError, ["max_failures must be at least 0, got -1"]),
    "max_failures str": (_made(max_failures="1"), TypeError, ["max_failures must be an int", "'1'"]),
    "on_error": (_made(on_error="ignore"), ValueError, ["on_error must be one of", "'skip'", "got 'ignore'"]),
    "drop_remainder": (
        _made(batch_size=11, drop_remainder=True),
        ValueError,
        ["drop_remainder=True leaves no batch", "10 samples", "batch_size=11"],
    ),
    # pools
    "pool str": (_made(pool="thread"), TypeError, ["pool must be None, 'keras'", "got 'thread'"]),
    "pool number": (_made(pool=4), TypeError, ["pool must be None, 'keras'", "WorkerPool", "got 4"]),
    "pool and in-process": (_made(pool="keras", workers=0), ValueError, ["workers=0", "pool='keras'", "leave one"]),
    "WorkerPool 0": (lambda: keras_mp.WorkerPool(0), ValueError, ["workers >= 1, got 0", "workers=0 (in-process)"]),
    "WorkerPool float": (lambda: keras_mp.WorkerPool(1.5), TypeError, ["workers must be an int or None, got 1.5"]),  # type: ignore[arg-type]
    "WorkerPool threads": (
        lambda: keras_mp.WorkerPool(1, worker_threads=0),
        ValueError,
        ["worker_threads must be an int >= 1, got 0"],
    ),
    "WorkerPool env": (
        lambda: keras_mp.WorkerPool(1, env={"A": 1}),  # type: ignore[dict-item]
        TypeError,
        ["env must map str to str, got {'A': 1}"],
    ),
    "WorkerPool env list": (
        lambda: keras_mp.WorkerPool(1, env=["A=1"]),  # type: ignore[arg-type]
        TypeError,
        ["env must map str to str, got ['A=1']"],
    ),
    # parallelize
    "parallelize number": (lambda: keras_mp.parallelize(5), TypeError, ["py_dataset must have len() and [i], got 5"]),
    "parallelize empty": (lambda: keras_mp.parallelize([]), ValueError, ["py_dataset is empty"]),
    "parallelize ours": (
        lambda: keras_mp.parallelize(keras_mp.PoolDataset(_DATA, workers=0)),
        TypeError,
        ["py_dataset is a PoolDataset(", "already", "workers="],
    ),
    "parallelize workers": (
        lambda: keras_mp.parallelize([1], workers=-2),
        ValueError,
        ["workers must be between 0 and", "got -2"],
    ),
    # methods
    "shard index": (lambda: _made(workers=0)().shard(2, 2), ValueError, ["index must be below num_shards=2, got 2"]),
    "shard count": (lambda: _made(workers=0)().shard(0, 0), ValueError, ["num_shards must be at least 1, got 0"]),
    "shard again": (
        lambda: _made(workers=0, batch_size=2)().shard(2, 0).shard(2, 0),
        ValueError,
        ["shard 0 of 2 already"],
    ),
    "shard too many": (
        lambda: _made(workers=0)().shard(11, 0),
        ValueError,
        ["10 samples are too few", "num_shards=11", "batch_size=32"],
    ),
    "set_epoch": (lambda: _made(workers=0)().set_epoch(-1), ValueError, ["epoch must be at least 0, got -1"]),
    "export epochs": (
        lambda: _made(workers=0)().to_tf_dataset(epochs=0),
        ValueError,
        ["epochs must be at least 1, got 0"],
    ),
    "export spec": (
        lambda: _made(workers=0)().to_tf_dataset(element_spec=("float32",)),
        TypeError,
        ["element_spec[0] must be a tf.TensorSpec, got 'float32'"],
    ),
    "export prefetch": (
        lambda: _made(workers=0)().to_tf_dataset(prefetch="many"),
        TypeError,
        ["prefetch must be an int", "'many'"],
    ),
}


@pytest.mark.parametrize(("make", "kind", "texts"), _CASES.values(), ids=_CASES)
def test_bad_arguments(make: Callable[[], Any], kind: type[Exception], texts: list[str]) -> None:
    assert_refused(make, kind, texts)


@pytest.mark.parametrize("index", [4, -5, 10**9])
def test_batches_out_of_range(index: int) -> None:
    with keras_mp.PoolDataset(_DATA, batch_size=3, workers=0) as dataset:
        with pytest.raises(IndexError, match=f"batch {index} is out of range: the dataset has 4 batches"):
            dataset[index]
        np.testing.assert_array_equal(dataset[-1], [9.0])


def test_a_batch_number_must_be_whole() -> None:
    with keras_mp.PoolDataset(_DATA, workers=0) as dataset:
        with pytest.raises(TypeError):
            dataset[0.0]  # type: ignore[index]
        assert dataset[np.int64(0)].shape == (10,)  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": np.int64(3)},
        {"seed": np.int64(3)},
        {"max_failures": 0, "on_error": "skip"},
        {"max_failures": 1.0, "on_error": "replace"},
        {"timeout": 1},
        {"retries": np.uint8(2)},
        {"max_queue_size": 1},
        {"workers": np.int64(2)},
    ],
    ids=str,
)
def test_good_arguments(options: dict[str, Any]) -> None:
    with keras_mp.PoolDataset(_DATA, **{"workers": 0, **options}) as dataset:
        assert dataset[0].shape == (options.get("batch_size", 10),)


def test_an_executor_is_a_pool() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads, keras_mp.PoolDataset(_DATA, pool=threads) as dataset:
        assert dataset[0].shape == (10,)
        assert "ThreadPoolExecutor" in repr(dataset)


def test_a_sparse_matrix_has_as_many_samples_as_rows() -> None:
    sparse = scipy.sparse.csr_matrix(np.diag([1.0, 2.0, 3.0, 4.0]))
    with keras_mp.PoolDataset(sparse, lambda row: row.toarray()[0], batch_size=2, workers=1) as dataset:
        np.testing.assert_array_equal(np.concatenate(list(dataset)), sparse.toarray())


def test_a_tuple_of_arrays_of_which_each_is_a_sample_is_taken_as_a_list() -> None:
    with keras_mp.PoolDataset([np.ones(3), np.zeros(3)], batch_size=2, workers=0) as dataset:
        assert dataset[0].tolist() == [[1, 1, 1], [0, 0, 0]]
