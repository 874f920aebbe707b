"""Which number of workers is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mp.commands.tune import default_counts, fewest_within


@pytest.mark.parametrize(
    ("speeds", "workers"),
    [
        ({1: 10.0, 2: 20.0, 4: 20.9}, 2),
        ({1: 10.0, 2: 19.0, 4: 20.1}, 4),
        ({4: 20.0, 2: 20.0, 1: 5.0}, 2),
        ({0: 9.6, 1: 10.0}, 0),
        ({3: 0.0}, 3),
    ],
)
def test_the_fewest_close_to_the_best(speeds: dict[int, float], workers: int) -> None:
    assert fewest_within(speeds) == workers


@given(st.dictionaries(st.integers(0, 64), st.floats(0.0, 1e6), min_size=1))
def test_nothing_smaller_would_do(speeds: dict[int, float]) -> None:
    chosen, enough = fewest_within(speeds), 0.95 * max(speeds.values())
    assert speeds[chosen] >= enough
    assert all(speed < enough for count, speed in speeds.items() if count < chosen)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_what_is_measured_by_default(cores: int, counts: list[int]) -> None:
    assert default_counts(cores) == counts
