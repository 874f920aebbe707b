"""What counts as wrong, told from records alone."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mp.commands.findings import Findings
from keras_mp.loading.inspection import Inspected, Leaf, Likeness

Shape = tuple[int, ...] | None


def _record(
    index: int,
    *leaves: tuple[Shape, str],
    likeness: Likeness = "equal",
    unit: Literal["sample", "batch"] = "sample",
    nans: int = 0,
    seconds: float = 0.001,
) -> Inspected:
    named = tuple(Leaf(f"x[{number}]", shape, dtype, nans) for number, (shape, dtype) in enumerate(leaves))
    return Inspected(unit, index, f"item {index}", likeness, seconds, named)


def _findings(*records: Inspected, unit: Literal["sample", "batch"] = "sample") -> Findings:
    findings = Findings(unit)
    for record in records:
        findings.add(record, 0)
    return findings


_ALIKE = [_record(index, ((4, 3), "float32"), ((), "int64")) for index in range(5)]


@pytest.mark.parametrize(
    ("leaves", "text"),
    [
        ([((4, 2), "float32"), ((), "int64")], "x[0] has shape (4, 2), (4, 3) in 5 others"),
        ([((4,), "float32"), ((), "int64")], "x[0] has shape (4,), (4, 3) in 5 others"),
        ([((4, 3), "float64"), ((), "int64")], "x[0] is float64, float32 in 5 others"),
        ([((4, 3), "float32"), ((1,), "str")], "x[1] is str, int64 in 5 others; x[1] has shape (1,), () in 5 others"),
        ([((4, 3), "float32")], "has x[0], where 5 others have x[0], x[1]"),
        ([], "has no array, where 5 others have x[0], x[1]"),
        ([((4, 3), "float32"), (None, "Image")], "x[1] is Image, int64 in 5 others; x[1] has shape no array, () in 5"),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_sample_unlike_the_others(leaves: list[tuple[Shape, str]], text: str, place: int) -> None:
    records = list(_ALIKE)
    records.insert(place, _record(77, *leaves))
    (problem,) = _findings(*records).problems()
    assert (problem.kind, problem.index, problem.item) == ("different", 77, "item 77")
    assert text in problem.text


def test_nothing_is_wrong_with_what_is_alike() -> None:
    findings = _findings(*_ALIKE)
    assert not findings.problems()
    assert findings.checked == 5
    assert findings.leaves() == [
        {"path": "x[0]", "dtype": "float32", "shape": [4, 3]},
        {"path": "x[1]", "dtype": "int64", "shape": []},
    ]


@pytest.mark.parametrize(
    ("likeness", "shapes", "wrong", "common"),
    [
        ("lengths", [(5, 1), (3, 1), (9, 1), (7, 2)], set(), [None, None]),
        ("lengths", [(5, 1), (3, 1), (9,)], {2}, [None, 1]),
        ("rows", [(8, 4), (8, 4), (3, 4)], set(), [None, 4]),
        ("rows", [(8, 4), (8, 4), (8, 5)], {2}, [8, 4]),
        ("rows", [(8, 1), (8, 2), (8, 3), (8, 3)], set(), [8, None]),  # no length is that of most: they are to vary
        ("equal", [(1,), (2,), (3,), (3,)], {0, 1}, [3]),
        ("rows", [(), (), ()], set(), []),
    ],
)
def test_what_may_vary(likeness: Likeness, shapes: list[Shape], wrong: set[int], common: list[Any]) -> None:
    records = [_record(index, (shape, "float32"), likeness=likeness) for index, shape in enumerate(shapes)]
    findings = _findings(*records)
    assert {problem.index for problem in findings.problems()} == wrong
    assert findings.leaves()[0]["shape"] == common


def test_the_order_of_keys_is_no_difference() -> None:
    leaves = (Leaf("x['a']", (2,), "float32"), Leaf("x['b']", (), "int64"))
    records = [
        Inspected("sample", index, "", "equal", 0.0, order)
        for index, order in enumerate(itertools.permutations(leaves))
    ]
    assert not _findings(*records).problems()


def test_epochs_of_one_problem_are_listed_together() -> None:
    findings = Findings("sample")
    for epoch in range(3):
        for record in _ALIKE:
            findings.add(record, epoch)
        findings.add(_record(9, ((4, 3), "float32"), ((), "int64"), nans=epoch), epoch)
        findings.add_failure(4, "samples 8 to 9", epoch, "BatchTimeout: too long", 2)
    failed, odd = findings.problems()
    assert (odd.index, odd.epochs, odd.text) == (9, (1, 2), "x[0] has 1 NaN; x[1] has 1 NaN")
    assert (failed.unit, failed.index, failed.epochs) == ("batch", 4, (0, 1, 2))
    assert (findings.checked, findings.failed) == (3 * 8, 1)


@given(st.lists(st.floats(0.0, 10.0), max_size=40))
def test_the_slowest_are_the_slowest(seconds: list[float]) -> None:
    findings = _findings(*(_record(index, seconds=each) for index, each in enumerate(seconds)))
    assert [slow.seconds for slow in findings.slowest()] == sorted(seconds, reverse=True)[:5]
    assert all(seconds[slow.index] == slow.seconds for slow in findings.slowest())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30))
def test_most_are_never_wrong(lengths: list[int]) -> None:
    findings = _findings(*(_record(index, ((length,), "float32")) for index, length in enumerate(lengths)))
    wrong = {problem.index for problem in findings.problems()}
    right = {lengths[index] for index in set(range(len(lengths))) - wrong}
    assert len(right) == 1
    assert len(lengths) - len(wrong) == max(map(lengths.count, lengths))
