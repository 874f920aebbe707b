"""Which samples make batch i of epoch e: pure index arithmetic, the same in every process and on every shard.

The order of an epoch is a function of (length, seed, epoch) alone (P2), and every sample is in it exactly once (P1).

Sharding. With `n` shards, global step `t` takes the next `n * batch_size` samples of the epoch's order and shard `i`
the `i`-th run of `batch_size` of them, so the shards' batches of one step, concatenated, are the batch an unsharded
dataset with `batch_size=n * batch_size` would give. The rest at the end is spread evenly, sizes differing by at most
one; when it is smaller than the number of shards, the last step takes one sample per shard and the step before it is
that much smaller, so that no shard ever goes without a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream, seed_sequence

Indices = npt.NDArray[np.int64]
Order = Callable[[int, np.random.Generator], Any]

# The length of a source that never ends.
ENDLESS = sys.maxsize

# A permutation of this many samples takes 8 MB and 20 ms; beyond it a keyed bijection needs neither.
_MATERIALISE_LIMIT = 1 << 20
_FEISTEL_ROUNDS = 8
_MAX_SUBSTITUTES = 32  # in an order: they travel with every request
# An epoch and the one read ahead of it; another for who looks elsewhere meanwhile.
_EPOCHS_KEPT = 3


@dataclasses.dataclass(frozen=True)
class Batching:
    """The plan of all epochs.

    Attributes:
        length: number of samples in the source.
        batch_size: samples a batch (on each shard).
        shuffle: whether each epoch has its own permutation.
        seed: root of all randomness.
        drop_remainder: leave out the samples that do not fill a batch on every shard.
        num_shards: into how many parts the epoch is split.
        shard: which part this is.
        order: optional callable (epoch, rng) -> sequence of sample indices that replaces the permutation.
    """

    length: int
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    drop_remainder: bool = False
    num_shards: int = 1
    shard: int = 0
    order: Order | None = None

    @functools.cached_property
    def epoch_length(self) -> int:
        """Samples in an epoch's order, over all shards, before `drop_remainder`."""
        return self.length if self.order is None else len(self._custom_order(0))

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches an epoch, the same on every shard."""
        step = self.batch_size * self.num_shards
        return self.epoch_length // step if self.drop_remainder else -(-self.epoch_length // step)

    @property
    def is_endless(self) -> bool:
        """Whether there is no last batch."""
        return self.length == ENDLESS

    @property
    def is_ordered(self) -> bool:
        """Whether it has an order of its own, which is none of Keras's business."""
        return self.shuffle or self.order is not None

    def for_shard(self, num_shards: int, shard: int) -> Batching:
        """The plan of one of `num_shards` parts.

        Raises:
            ValueError: it is a part already, or its samples cannot be divided so that all have as many batches.
        """
        if self.num_shards != 1:
            raise ValueError(f"this dataset is shard {self.shard} of {self.num_shards} already")
        if self.batch_size == 1 and not self.drop_remainder and self.epoch_length % num_shards:
            raise ValueError(
                f"{self.epoch_length} samples in batches of one cannot give num_shards={num_shards} the same "
                "number of batches; pass drop_remainder=True, or batch_size=2 or more"
            )
        plan = dataclasses.replace(self, num_shards=num_shards, shard=shard)
        if plan.num_batches == 0 or plan.epoch_length < num_shards:
            raise ValueError(
                f"{plan.epoch_length} samples are too few for a batch on each of num_shards={num_shards} with "
                f"batch_size={plan.batch_size}, drop_remainder={plan.drop_remainder}"
            )
        return plan

    def once(self, count: int | None = None) -> Batching:
        """The plan of epochs in which each sample of the source comes once, in order, and undivided.

        Args:
            count: how many samples to draw by chance in each epoch, of an endless source the first; None: all.
        """
        whole = dataclasses.replace(self, shuffle=False, order=None, drop_remainder=False, num_shards=1, shard=0)
        if count is None or count >= self.length:
            return whole
        if self.is_endless:
            return dataclasses.replace(whole, length=count)

        def draw(epoch: int, rng: np.random.Generator) -> Indices:
            return np.sort(rng.choice(self.length, count, replace=False))

        return dataclasses.replace(whole, order=draw)

    def request(self, epoch: int, batch: int) -> Request:
        """What is to be loaded for `batch` of `epoch`."""
        samples = self.samples(epoch, batch)
        if not self.is_ordered:
            return Request(epoch, batch, range(int(samples[0]), int(samples[-1]) + 1))
        repeats, substitutes = self.repeats(epoch, batch), self.substitutes(epoch, batch)
        return Request(epoch, batch, samples.tolist(), () if repeats is None else repeats.tolist(), substitutes)

    def span(self, batch: int) -> tuple[int, int]:
        """Positions [start, stop) in the epoch's order that make this shard's `batch`."""
        if not 0 <= batch < self.num_batches:
            raise IndexError(f"batch {batch} is out of range for {self.num_batches} batches")
        step = self.batch_size * self.num_shards
        start, stop = batch * step, min((batch + 1) * step, self.epoch_length)
        rest = self.epoch_length - (self.num_batches - 1) * step
        if rest < self.num_shards and self.num_batches > 1:
            missing = self.num_shards - rest
            if batch == self.num_batches - 1:
                start -= missing
            elif batch == self.num_batches - 2:
                stop -= missing
        each, extra = divmod(stop - start, self.num_shards)
        first = start + self.shard * each + min(self.shard, extra)
        return first, first + each + (self.shard < extra)

    def samples(self, epoch: int, batch: int) -> Indices:
        """Source indices of `batch` in `epoch`: int64, shape (samples in the batch,)."""
        start, stop = self.span(batch)
        if self.order is not None:
            return self._custom_order(epoch)[start:stop]
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        if self.length <= _MATERIALISE_LIMIT:
            return _permutation(self.length, self.seed, epoch)[start:stop]
        return keyed_permutation(np.arange(start, stop, dtype=np.int64), self.length, self.seed, epoch)

    def repeats(self, epoch: int, batch: int) -> Indices | None:
        """How often each sample of `batch` came before in the epoch; None if none does, as without `order`."""
        if self.order is None:
            return None
        start, stop = self.span(batch)
        earlier = self._earlier_in(epoch)[start:stop]
        return earlier if earlier.any() else None

    def substitutes(self, epoch: int, batch: int) -> list[int] | None:
        """A few samples of an epoch's `order` other than those of `batch`. None without one: all of the source is."""
        if self.order is None:
            return None
        order, (start, stop) = self._order_of(epoch), self.span(batch)
        others = len(order) - (stop - start)
        count = min(others, _MAX_SUBSTITUTES)
        places = stop + np.arange(count) * others // max(count, 1)
        return list(dict.fromkeys(order[places % len(order)].tolist()))

    # Caches of this object's own, as an order need not be hashable; they hold no reference to it, so it ends with its
    # last user.

    @functools.cached_property
    def _order_of(self) -> Callable[[int], Indices]:
        if self.order is None:
            raise ValueError("no custom order was given")
        return functools.lru_cache(_EPOCHS_KEPT)(functools.partial(_evaluate_order, self.order, self.seed, self.length))

    @functools.cached_property
    def _earlier_in(self) -> Callable[[int], Indices]:
        order_of = self._order_of
        return functools.lru_cache(_EPOCHS_KEPT)(lambda epoch: _count_earlier(order_of(epoch)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_order_of", "_earlier_in")}

    def _custom_order(self, epoch: int) -> Indices:
        order = self._order_of(epoch)
        known = self.__dict__.get("epoch_length")
        if known is not None and len(order) != known:
            raise ValueError(
                f"order(epoch={epoch}) returned {len(order)} indices, but order(epoch=0) returned {known}; Keras needs "
                "the same number of batches in every epoch: return the same number each time"
            )
        return order


@functools.lru_cache(maxsize=8)
def _permutation(length: int, seed: int, epoch: int) -> Indices:
    order = np.random.Generator(np.random.PCG64(seed_sequence(Stream.SHUFFLE, seed, epoch))).permutation(length)
    order.flags.writeable = False
    return order


def _evaluate_order(order: Order, seed: int, length: int, epoch: int) -> Indices:
    raw = order(epoch, np.random.Generator(np.random.PCG64(seed_sequence(Stream.ORDER, seed, epoch))))
    indices = np.asarray(raw if isinstance(raw, np.ndarray | Sequence) else list(raw))
    if indices.ndim != 1 or indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"order(epoch={epoch}) must return a non-empty 1-d sequence of integers, got shape {indices.shape} and "
            f"dtype {indices.dtype}"
        )
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= length:
        raise ValueError(f"order(epoch={epoch}) returned index {low if low < 0 else high}, outside 0..{length - 1}")
    result = indices.astype(np.int64)
    result.flags.writeable = False
    return result


def _count_earlier(indices: Indices) -> Indices:
    """For each position of an order, how often its index stands before it."""
    by_index = np.argsort(indices, kind="stable")
    ordered = indices[by_index]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.empty(len(indices), dtype=np.int64)
    counts[by_index] = np.arange(len(indices)) - np.repeat(starts, np.diff(np.r_[starts, len(indices)]))
    return counts


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
