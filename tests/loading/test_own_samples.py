"""What a transform gets of a source in memory is its own: it may write there, everywhere, and the source stays (P2)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.transforms import Pair

_ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)
_RECORDS = np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")])


def double(sample: Any) -> Any:
    sample *= 2
    return sample


def double_image(sample: Any) -> Any:
    sample["image"] *= 2
    sample["label"] = sample["label"] + 1
    return sample


def double_parts(sample: Any) -> Any:
    for part in sample:
        part *= 2
    return sample


def add_field(sample: Any) -> Any:
    sample["a"] += 1
    return {"a": sample["a"], "b": sample["b"]}


def flatten_all(samples: list[Any]) -> Any:
    for sample in samples:
        sample += 1
    return np.stack(samples)


_CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "array": (_ROWS, {"transform": double}),
    "large array": (np.ones((4, 1 << 19)), {"transform": double}),
    "list": (list(_ROWS.copy()), {"transform": double}),
    "list of large arrays": ([np.ones(1 << 18) for _ in range(4)], {"transform": double}),
    "tuple": (tuple(_ROWS.copy()), {"transform": double}),
    "list of dicts": ([{"image": row, "label": 1} for row in _ROWS.copy()], {"transform": double_image}),
    "list of tuples": ([(row, row + 1) for row in _ROWS], {"transform": double_parts}),
    "list of pairs": ([Pair(row, row + 1) for row in _ROWS], {"transform": double_parts}),
    "list of lists": ([[row, row + 1] for row in _ROWS], {"transform": double_parts}),
    "records": (_RECORDS, {"transform": add_field}),
    "collate": (_ROWS, {"collate": flatten_all}),
    "collate of a list": (list(_ROWS.copy()), {"collate": flatten_all}),
    "batch": (_ROWS, {"batch_transform": double}),
}


def _flat(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [part.tolist() for part in batch.values()]
    return [part.tolist() for part in batch] if isinstance(batch, tuple | list) else [batch.tolist()]


@pytest.mark.parametrize("case", _CASES)
def test_code_that_writes_into_its_sample_works_everywhere(case: str, engine: dict[str, Any]) -> None:
    source, functions = _CASES[case]
    before = copy.deepcopy(source)
    with keras_mp.PoolDataset(source, batch_size=2, seed=1, **functions, **engine) as train:
        epochs = [[_flat(batch) for batch in train] for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    with keras_mp.PoolDataset(before, batch_size=2, seed=1, workers=0, **functions) as again:
        assert [_flat(batch) for batch in again] == epochs[0]
    np.testing.assert_equal(source, before)


_VIEWS: dict[str, tuple[Any, Any]] = {
    "part": (keras_mp.split(_ROWS, 0.5)[0], double),
    "concat": (keras_mp.concat(_ROWS, list(_ROWS)), double),
    "zip": (keras_mp.zip(list(_ROWS), _ROWS), double_parts),
    "windows": (keras_mp.windows(_ROWS, 3), double),
    "views of views": (keras_mp.zip(keras_mp.concat(keras_mp.windows(_ROWS, 2), _ROWS[None, :2])), double_parts),
}


@pytest.mark.parametrize("view", _VIEWS)
@pytest.mark.parametrize("collates", [False, True])
def test_what_a_view_gives_of_memory_is_a_copy_too(view: str, collates: bool, engine: dict[str, Any]) -> None:
    source, write = _VIEWS[view]
    before = _ROWS.copy()
    expected = [np.asarray(sample).tolist() for sample in (write(copy.deepcopy(sample)) for sample in source)]

    def write_all(samples: list[Any]) -> Any:
        return np.stack([np.asarray(write(sample)) for sample in samples])

    functions: dict[str, Any] = {"collate": write_all} if collates else {"transform": lambda s: np.asarray(write(s))}
    with keras_mp.PoolDataset(source, batch_size=2, seed=1, **functions, **engine) as train:
        for _ in range(3):
            assert [sample.tolist() for batch in train for sample in batch] == expected
    np.testing.assert_array_equal(_ROWS, before)


def test_each_try_has_its_own(engine: dict[str, Any], tmp_path: Path) -> None:
    def write_and_fail(sample: Any) -> Any:
        sample += 1
        marker = tmp_path / str(int(sample[0]))
        if not marker.exists():
            marker.touch()
            raise OSError("not yet")
        return sample

    with keras_mp.PoolDataset(_ROWS, write_and_fail, batch_size=8, retries=1, **engine) as train:
        assert train[0].tolist() == (_ROWS + 1).tolist()


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("kind", ["rows of a file", "a list of files"])
def test_what_stands_on_a_file_is_read_only_everywhere(
    kind: str, mode: Any, engine: dict[str, Any], tmp_path: Path
) -> None:
    """A copy would read all of it, also for a transform that takes a small part."""
    np.save(tmp_path / "rows.npy", _ROWS)
    rows = np.load(tmp_path / "rows.npy", mmap_mode=mode)
    with keras_mp.PoolDataset(rows if kind == "rows of a file" else [rows], double, **engine) as train:
        with pytest.raises(ValueError, match="read-only"):
            train[0]
    assert np.load(tmp_path / "rows.npy").tolist() == _ROWS.tolist()


def test_what_a_source_of_the_user_s_gives_is_the_user_s() -> None:
    class Source:
        def __init__(self) -> None:
            self.given: list[Any] = []

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            self.given.append(np.zeros(2))
            return self.given[-1]

    source = Source()
    seen: list[Any] = []

    def remember(sample: Any) -> Any:
        seen.append(sample)
        return sample

    with keras_mp.PoolDataset(source, remember, workers=0) as train:
        list(train)
    assert all(one is other for one, other in zip(source.given, seen, strict=True))
