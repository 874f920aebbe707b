"""on_error="skip" and "replace": one bad sample costs that sample, whichever it is, and no run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import keras_mp


@dataclasses.dataclass
class Shaped:
    """Gives samples of shape (2,), but for those in `odd`."""

    odd: dict[int, Any]

    def __call__(self, value: int) -> Any:
        return self.odd.get(value, {"x": np.full(2, float(value)), "y": value})


def _odd(size: int) -> dict[str, Any]:
    return {"x": np.full(size, -1.0), "y": -1}


@pytest.mark.parametrize("policy", ["skip", "replace"])
@pytest.mark.parametrize("where", [[0], [7], [0, 1], [0, 3, 7], [0, 4]])
def test_the_shape_of_most_samples_is_the_batch_s(policy: Any, where: list[int], engine: dict[str, Any]) -> None:
    """Whatever place the odd ones have, also where they are of several shapes, or something else altogether."""
    odd = {value: _odd(5) for value in where[:2]} | dict.fromkeys(where[2:], "a string")
    with keras_mp.PoolDataset(range(16), Shaped(odd), batch_size=8, on_error=policy, **engine) as train:
        with pytest.warns(RuntimeWarning, match=f"{len(where)} of 16 samples failed"):
            batch, other = list(train)
        failures = train.failures
    good = [value for value in range(8) if value not in where]
    expected = good
    if policy == "replace":
        expected = [max((v for v in good if v <= value), default=good[0]) for value in range(8)]
    assert batch["y"].tolist() == expected
    assert batch["x"].tolist() == [[value, value] for value in expected]
    assert other["y"].tolist() == list(range(8, 16))
    assert [(failure.index, failure.item, failure.stage) for failure in failures] == [
        (i, str(i), "collate") for i in where
    ]
    for failure in failures:
        assert "shape (5,), but (2,) in" in failure.message or "of type str" in failure.message


def test_a_transform_may_use_its_memory_again() -> None:
    memory = np.empty(2)

    def fill(value: int) -> Any:
        memory[:] = value
        return memory[: 1 if value == 0 else 2]

    with keras_mp.PoolDataset(range(4), fill, batch_size=4, on_error="skip", workers=0) as train:
        with pytest.warns(RuntimeWarning, match="1 of 4"):
            assert [batch.tolist() for batch in train] == [[[1, 1], [2, 2], [3, 3]]]


def test_without_a_majority_the_first_sample_decides() -> None:
    with keras_mp.PoolDataset(
        range(4), Shaped({0: _odd(5), 2: _odd(3)}), batch_size=2, on_error="skip", workers=0
    ) as train:
        with pytest.warns(RuntimeWarning, match="2 of 4"):
            assert [batch["y"].tolist() for batch in train] == [[-1], [-1]]


def test_with_raise_the_second_sample_is_the_one_that_does_not_fit(engine: dict[str, Any]) -> None:
    with keras_mp.PoolDataset(range(8), Shaped({0: _odd(5)}), batch_size=8, **engine) as train:
        with pytest.raises(keras_mp.SampleError, match="in the first sample of the batch") as caught:
            train[0]
    assert caught.value.failure.index == 1


@dataclasses.dataclass
class Broken:
    """Fails on some samples; gives the others with random numbers of their own."""

    bad: frozenset[int]

    def __call__(self, value: int, rng: np.random.Generator) -> Any:
        if value in self.bad:
            raise ValueError(f"{value} is broken")
        return np.array([value, rng.random()])


def _broken(bad: Any, engine: dict[str, Any], **options: Any) -> keras_mp.PoolDataset:
    options = {"batch_size": 4, "on_error": "skip", "seed": 3, **options, **engine}
    return keras_mp.PoolDataset(range(17), Broken(frozenset(bad)), **options)


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_a_batch_without_a_good_sample_is_made_of_others(policy: Any, engine: dict[str, Any]) -> None:
    bad = [4, 5, 6, 7, 9, 16]  # the second batch, and the last one, which has but one sample
    with _broken(bad, engine, on_error=policy, shuffle=False) as train:
        with pytest.warns(
            RuntimeWarning, match=r"6 of 17 samples failed in epoch 0 and were left out \(\d\) or replaced"
        ):
            first = list(train)
        assert sorted(failure.index or 0 for failure in train.failures) == bad
        assert all("is broken" in failure.message for failure in train.failures)
        served = {failure.index: failure.replaced_by for failure in train.failures}
        with pytest.warns(RuntimeWarning, match="6 of 17"):
            second = list(train)
    with _broken(bad, {"workers": 0}, on_error=policy) as again:
        with pytest.warns(RuntimeWarning):
            repeated = list(again)
    if policy == "skip":
        assert [len(batch) for batch in first] == [4, 1, 3, 4, 1]
        assert {index for index, by in served.items() if by is not None} == {4, 16}
        assert [served[4], served[16]] == [first[1][0, 0], first[4][0, 0]]
    else:
        assert [len(batch) for batch in first] == [4, 4, 4, 4, 1]
        assert [served[index] for index in (4, 5, 6, 7)] == first[1][:, 0].tolist()
        assert len(set(first[1][:, 0])) == 4
        assert served[9] == 8
    values = np.concatenate(first)
    assert not set(bad) & set(values[:, 0])
    assert len(set(values[:, 1])) == len(values) - (policy == "replace")  # a substitute is not its own twin
    assert first[1].tolist() != second[1].tolist()
    for one, other in zip(first, repeated, strict=True):
        assert one.tolist() == other.tolist()


def test_only_max_failures_ends_a_run() -> None:
    with pytest.warns(RuntimeWarning, match="4 of 17"), _broken(range(4, 8), {"workers": 0}, max_failures=3) as train:
        with pytest.raises(keras_mp.TooManyFailures, match="4 of 17"):
            list(train)


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_where_nothing_is_good_the_error_names_the_last_failure(policy: Any, engine: dict[str, Any]) -> None:
    with _broken(range(17), engine, on_error=policy) as train:
        with pytest.raises(keras_mp.SampleError, match="all 4 samples of the batch failed, and 13 others of the epoch"):
            train[0]
        with pytest.raises(keras_mp.SampleError, match=r"ValueError: \d+ is broken"):
            train[1]


def test_there_may_be_no_other() -> None:
    with _broken(range(17), {"workers": 0}, batch_size=17) as train:
        with pytest.raises(keras_mp.SampleError, match="all 17 samples of the batch failed; this was the last"):
            train[0]


def test_a_huge_source_is_not_tried_to_its_end() -> None:
    with keras_mp.PoolDataset(range(10**12), always_fails, batch_size=4, on_error="skip", workers=0) as train:
        with pytest.raises(keras_mp.SampleError, match="and 256 others"):
            train[0]


def always_fails(value: int) -> Any:
    raise ValueError("broken")


def test_one_good_sample_is_found(engine: dict[str, Any]) -> None:
    with _broken(set(range(17)) - {12}, engine) as train, pytest.warns(RuntimeWarning, match="16 of 17"):
        assert [batch[:, 0].tolist() for batch in train] == [[12]] * 5
        train.close()


def _validation(epoch: int, rng: np.random.Generator) -> list[int]:
    return [0, 1, 2, 8, 9, 10, 11, 9]


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_an_order_s_substitutes_are_of_that_order(policy: Any, engine: dict[str, Any]) -> None:
    """What it leaves out of the source may be what the model is to be tested on."""
    with _broken([0, 1, 2, 8], engine, order=_validation, on_error=policy) as train:
        with pytest.warns(RuntimeWarning, match="4 of 8"):
            first, second = list(train)
            train.close()
    assert set(first[:, 0]) <= {9, 10, 11}
    assert second[:, 0].tolist() == [9, 10, 11, 9]
    with _broken([8, 9, 10, 11], engine, order=_validation, batch_size=8) as train:
        with pytest.warns(RuntimeWarning, match="5 of 8|4 of 8"):
            assert next(iter(train))[:, 0].tolist() == [0, 1, 2]
            train.close()


def test_shards_are_given_different_ones() -> None:
    bad = {2, 3}  # one step's samples on both of them
    with keras_mp.PoolDataset(
        range(200), Broken(frozenset(bad)), batch_size=1, on_error="skip", seed=1, workers=0
    ) as train:
        parts = [train.shard(2, index) for index in range(2)]
        with pytest.warns(RuntimeWarning):
            served = [list(part)[1][0, 0] for part in parts]
            for part in parts:
                part.close()
    assert len(set(served)) == 2


def test_the_export_gets_them_too() -> None:
    with (
        _broken([*range(4, 8), 16], {"workers": 2}, on_error="replace") as train,
        pytest.warns(RuntimeWarning, match="5 of 17"),
    ):
        assert [len(batch) for batch in train.to_tf_dataset()] == [4, 4, 4, 4, 1]
        train.close()


def test_collate_of_the_user_s_gets_a_substitute() -> None:
    with (
        _broken([0, 1, 2, 3], {"workers": 0}, collate=np.stack) as train,
        pytest.warns(RuntimeWarning, match="4 of 17"),
    ):
        assert [len(batch) for batch in train] == [1, 4, 4, 4, 1]
        train.close()
