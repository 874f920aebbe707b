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
from typing import Any, Self

import numpy as np

from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream, seed_sequence
from keras_mp.plan.shuffle import Indices, shuffled

Order = Callable[[int, np.random.Generator], Any]

# The length of a source that never ends.
ENDLESS = sys.maxsize

MAX_SUBSTITUTES = 32  # they travel with every request
# An epoch and the one read ahead of it; another for who looks elsewhere meanwhile.
EPOCHS_KEPT = 3


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

    @property
    def uniform_size(self) -> int | None:
        """Samples in every batch; None if that varies."""
        whole = self.drop_remainder or self.epoch_length % (self.batch_size * self.num_shards) == 0
        return self.batch_size if whole else None

    @property
    def buckets_digest(self) -> str | None:
        """Tells plans of different buckets apart; None without buckets."""
        return None

    @property
    def counts_batches(self) -> bool:
        """Whether the number of batches is known."""
        return not self.is_endless

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a state to fit."""
        return {
            "length": self.length,
            "epoch_length": self.epoch_length,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "order": self.order is not None,
            "buckets": self.buckets_digest,
            "drop_remainder": self.drop_remainder,
            "num_shards": self.num_shards,
            "shard": self.shard,
            "seed": self.seed,
        }

    def describe_size(self) -> str:
        """The size of batches, in words."""
        return str(self.batch_size)

    def for_shard(self, num_shards: int, shard: int) -> Self:
        """The plan of one of `num_shards` parts.

        Raises:
            ValueError: it is a part already, or its samples cannot be divided so that all have as many batches.
        """
        if self.num_shards != 1:
            raise ValueError(f"this dataset is shard {self.shard} of {self.num_shards} already")
        plan = dataclasses.replace(self, num_shards=num_shards, shard=shard)
        plan.check()
        return plan

    def check(self) -> None:
        """Whether there is a batch at all, and as many on every shard.

        Raises:
            ValueError: there is not.
        """
        count, shards = self.epoch_length, self.num_shards
        if self.batch_size == 1 and not self.drop_remainder and count % shards:
            raise ValueError(
                f"{count} samples in batches of one cannot give num_shards={shards} the same number of batches; pass "
                "drop_remainder=True, or batch_size=2 or more"
            )
        if self.num_batches == 0 and shards == 1:
            raise ValueError(
                f"drop_remainder=True leaves no batch: {count} samples are fewer than batch_size={self.batch_size}"
            )
        if self.num_batches == 0 or count < shards:
            raise ValueError(
                f"{count} samples are too few for a batch on each of num_shards={shards} with "
                f"batch_size={self.batch_size}, drop_remainder={self.drop_remainder}"
            )

    def once(self, count: int | None = None) -> Batching:
        """The plan of epochs in which each sample of the source comes once, in order, and undivided.

        Args:
            count: how many samples to draw by chance in each epoch, of an endless source the first; None: all.
        """
        whole = Batching(self.length, self.batch_size, seed=self.seed)
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
        return self.part(start, stop)

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """This shard's part of a step: of positions [start, stop) in the epoch's order."""
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
        return shuffled(start, stop, self.length, self.seed, epoch)

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
        count = min(others, MAX_SUBSTITUTES)
        places = stop + np.arange(count) * others // max(count, 1)
        return list(dict.fromkeys(order[places % len(order)].tolist()))

    # Caches of this object's own, as an order need not be hashable; they hold no reference to it, so it ends with its
    # last user.

    @functools.cached_property
    def _order_of(self) -> Callable[[int], Indices]:
        if self.order is None:
            raise ValueError("no custom order was given")
        return functools.lru_cache(EPOCHS_KEPT)(functools.partial(_evaluate_order, self.order, self.seed, self.length))

    @functools.cached_property
    def _earlier_in(self) -> Callable[[int], Indices]:
        order_of = self._order_of
        return functools.lru_cache(EPOCHS_KEPT)(lambda epoch: _count_earlier(order_of(epoch)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def _custom_order(self, epoch: int) -> Indices:
        order = self._order_of(epoch)
        known = self.__dict__.get("epoch_length")
        if known is not None and len(order) != known:
            raise ValueError(
                f"order(epoch={epoch}) returned {len(order)} indices, but order(epoch=0) returned {known}; Keras needs "
                "the same number of batches in every epoch: return the same number each time"
            )
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
