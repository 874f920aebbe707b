"""The permutation of an epoch: kept for a moderate number of samples, computed where it is needed for more."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from keras_mp.plan.seeds import Stream, seed_sequence

Indices = npt.NDArray[np.int64]

# A permutation of this many samples takes 8 MB and 20 ms; beyond it a keyed bijection needs neither.
_MATERIALISE_LIMIT = 1 << 20
_FEISTEL_ROUNDS = 8
_BLOCK = 1024  # positions that are computed together: for a batch of 32 it takes almost as long as for these


def shuffled(start: int, stop: int, length: int, seed: int, epoch: int) -> Indices:
    """Part of an epoch's permutation of `range(length)`.

    Args:
        start, stop: the positions that are wanted.
        length: size of the permuted range.
        seed: root of all randomness.
        epoch: the epoch whose permutation is wanted.

    Returns:
        What stands at these positions: int64, shape (stop - start,).
    """
    if length <= _MATERIALISE_LIMIT:
        return _permutation(length, seed, epoch)[start:stop]
    if not 0 < stop - start < _BLOCK:
        return keyed_permutation(np.arange(start, stop, dtype=np.int64), length, seed, epoch)
    first, last = start // _BLOCK, (stop - 1) // _BLOCK
    block = _block(first, length, seed, epoch)
    if last > first:
        block = np.concatenate([block, _block(last, length, seed, epoch)])
    return block[start - first * _BLOCK : stop - first * _BLOCK]


@functools.lru_cache(maxsize=64)
def _block(number: int, length: int, seed: int, epoch: int) -> Indices:
    start = number * _BLOCK
    block = keyed_permutation(np.arange(start, min(start + _BLOCK, length), dtype=np.int64), length, seed, epoch)
    block.flags.writeable = False
    return block


@functools.lru_cache(maxsize=8)
def _permutation(length: int, seed: int, epoch: int) -> Indices:
    order = np.random.Generator(np.random.PCG64(seed_sequence(Stream.SHUFFLE, seed, epoch))).permutation(length)
    order.flags.writeable = False
    return order


def keyed_permutation(positions: Indices, length: int, seed: int, epoch: int) -> Indices:
    """Maps positions to a pseudo-random permutation of range(length), in constant memory.

    A balanced Feistel network is a bijection on 2**(2k) numbers whatever its round function (Luby and Rackoff, "How to
    construct pseudorandom permutations from pseudorandom functions", SIAM J. Comput. 17(2), 1988). Applying it again to
    results that fall outside range(length) restricts it to that range (cycle-walking: Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002). The domain is less than four times `length`, so a position walks fewer
    than four rounds on average.

    Args:
        positions: int64, any shape, values in 0..length-1.
        length: size of the permuted range.
        seed: root of all randomness.
        epoch: the epoch whose permutation is wanted.

    Returns:
        int64 array of the same shape, values in 0..length-1.
    """
    half = max(1, (int(length - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = seed_sequence(Stream.SHUFFLE, seed, epoch).generate_state(_FEISTEL_ROUNDS, np.uint64)
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        values = result[outside]
        left, right = values >> shift, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[outside] = (left << shift) | right
        outside = result >= length
    return result.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
