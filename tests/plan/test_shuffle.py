"""The keyed permutation: a bijection at any length, and one that looks random."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mp.plan.shuffle import keyed_permutation, shuffled


@pytest.mark.parametrize(
    "length", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 1023, 1025, 4096, 65537, 100_003]
)
def test_keyed_permutation_is_a_bijection(length: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (2**62, 5)]:
        result = keyed_permutation(np.arange(length), length, seed, epoch)
        assert result.dtype == np.int64
        assert (np.bincount(result, minlength=length) == 1).all()


@given(st.integers(1, 2**62), st.data())
def test_keyed_permutation_is_one_to_one_at_any_length(length: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, length - 1), unique=True, min_size=1, max_size=20))
    result = keyed_permutation(np.array(positions), length, 1, 2)
    assert ((result >= 0) & (result < length)).all()
    assert len(set(result.tolist())) == len(positions)
    one_by_one = [int(keyed_permutation(np.array([position]), length, 1, 2)[0]) for position in positions]
    assert result.tolist() == one_by_one


@given(st.integers((1 << 20) + 1, 2**62), st.data())
def test_a_part_of_the_permutation_is_that_of_the_whole(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 3000))
    start = data.draw(st.sampled_from([0, 1000, length - count]) | st.integers(0, length - count))
    part = shuffled(start, start + count, length, 3, 4)
    assert part.tolist() == keyed_permutation(np.arange(start, start + count), length, 3, 4).tolist()


def _chi_square_limit(cells: int) -> float:
    """What a chi-square value with cells-1 degrees of freedom stays below but for one time in a billion, about."""
    degrees = cells - 1
    return degrees * (1 - 2 / (9 * degrees) + 6.0 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty, 1931


@pytest.mark.parametrize("length", [1 << 20, 1_000_003, 3 << 19])
@pytest.mark.parametrize("key", [(0, 0), (0, 1), (1, 0), (12345, 7)])
def test_keyed_permutation_looks_random(length: int, key: tuple[int, int]) -> None:
    order = keyed_permutation(np.arange(length), length, *key)
    cells = 32
    joint = np.histogram2d(np.arange(length), order, cells, [[0, length], [0, length]])[0]
    assert ((joint - length / cells**2) ** 2 / (length / cells**2)).sum() < _chi_square_limit(cells**2)
    # What comes after what: differences of neighbours, over the circle.
    steps = np.bincount((np.diff(order) % length) * cells // length, minlength=cells)
    expected = (length - 1) / cells
    assert ((steps - expected) ** 2 / expected).sum() < _chi_square_limit(cells)
    # Parities of position and value are independent, and the low bits of neighbours too.
    bits = np.bincount((np.arange(length - 1) % 4) * 16 + (order[:-1] % 4) * 4 + order[1:] % 4, minlength=64)
    assert ((bits - (length - 1) / 64) ** 2 / ((length - 1) / 64)).sum() < _chi_square_limit(64)
    # About one sample stays in place in a random permutation (Poisson with mean 1).
    assert (order == np.arange(length)).sum() < 12


def test_small_permutations_are_all_reached() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(600):
        order = tuple(keyed_permutation(np.arange(4), 4, 0, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) >= 12  # a Feistel network on 4 values makes the even permutations at least


def test_epochs_of_the_keyed_permutation_are_unrelated() -> None:
    length = 100_000
    one, two = (keyed_permutation(np.arange(length), length, 0, epoch) for epoch in (0, 1))
    assert abs(np.corrcoef(one, two)[0, 1]) < 6 / math.sqrt(length)
    assert (one == two).sum() < 12
