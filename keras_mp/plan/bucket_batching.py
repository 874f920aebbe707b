"""How samples that are divided among buckets make batches: the same number in every epoch, and on every shard.

In an epoch the samples stand sorted by bucket, within a bucket in the epoch's (shuffled) order. A step is a run of that
sequence: of `num_shards` times the bucket's batch size, each shard taking its part of it, as in `batching`. The runs
follow from how many samples each bucket has, so they are the same in every epoch; which samples are in them, and the
order of the steps, are drawn for each epoch. Each sample is in one run, so it comes exactly once (P1).

Runs are contiguous, so what does not fill a step of a bucket with at least one sample a shard is simply the beginning
of the next bucket's: a few samples are padded to the longer shape then. At the end of the last bucket it is the other
way round: steps before it give samples to it, and begin earlier. Without shards neither ever happens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.plan.batching import EPOCHS_KEPT, MAX_SUBSTITUTES, Batching
from keras_mp.plan.seeds import Stream, seed_sequence
from keras_mp.plan.shuffle import Indices, shuffled


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BucketBatching(Batching):
    """The plan of all epochs of a dataset with buckets; `batch_size` is the greatest of `sizes`.

    Attributes:
        bucket_of: bucket of each sample: unsigned integers, shape (length,).
        sizes: samples in a batch (on each shard), for each bucket.
        boundaries: as in `Buckets`.
    """

    bucket_of: npt.NDArray[Any]
    sizes: tuple[int, ...]
    boundaries: tuple[int, ...]

    @functools.cached_property
    def counts(self) -> Indices:
        """Samples in each bucket."""
        return np.bincount(self.bucket_of, minlength=len(self.sizes))

    @functools.cached_property
    def steps(self) -> Indices:
        """For each step its bucket and the positions [start, stop) of its samples: int64, shape (steps, 3).

        Raises:
            ValueError: there is no way to give each shard at least one sample in each step.
        """
        return divide(self.counts, self.sizes, self.num_shards, self.drop_remainder)

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches an epoch, the same on every shard."""
        return len(self.steps)

    @property
    def is_ordered(self) -> bool:
        """It has an order of its own: that in which the buckets' batches are mixed."""
        return True

    @property
    def uniform_size(self) -> int | None:
        """Samples in every batch; None if that varies."""
        _, starts, stops = self.steps.T
        whole = (stops - starts == self.batch_size * self.num_shards).all()
        return self.batch_size if whole else None

    @functools.cached_property
    def buckets_digest(self) -> str | None:
        """Tells plans of different buckets apart."""
        digest = hashlib.sha256(repr((self.sizes, self.boundaries)).encode())
        digest.update(self.bucket_of.tobytes())
        return digest.hexdigest()[:16]

    def describe_size(self) -> str:
        """The sizes of batches, in words."""
        least, most = min(self.sizes), max(self.sizes)
        return f"{most if least == most else f'{least} to {most}'} from {len(self.sizes)} buckets"

    def check(self) -> None:
        """Whether there is a batch at all, and as many on every shard.

        Raises:
            ValueError: there is not.
        """
        if self.num_batches == 0:
            shards = f" on each of num_shards={self.num_shards}" if self.num_shards > 1 else ""
            raise ValueError(
                f"drop_remainder=True leaves no batch: the buckets have {self.counts.tolist()} samples, and none fills "
                f"a batch of {list(self.sizes)}{shards}"
            )

    def samples(self, epoch: int, batch: int) -> Indices:
        """Source indices of `batch` in `epoch`: int64, shape (samples in the batch,)."""
        _, start, stop = self._step(epoch, batch)
        first, last = self.part(start, stop)
        return self._epoch_of(epoch)[0][first:last]

    def substitutes(self, epoch: int, batch: int) -> list[int] | None:
        """A few samples of the same bucket other than those of `batch`; None if it has no others."""
        bucket, start, stop = self._step(epoch, batch)
        begin = int(self.counts[:bucket].sum())
        start, stop = max(start - begin, 0), max(stop - begin, 0)
        count = int(self.counts[bucket])
        others = count - (stop - start)
        if not others:
            return None
        places = stop + np.arange(min(others, MAX_SUBSTITUTES)) * others // min(others, MAX_SUBSTITUTES)
        chosen: list[int] = self._epoch_of(epoch)[0][begin + places % count].tolist()
        return chosen

    def _step(self, epoch: int, batch: int) -> tuple[int, int, int]:
        if not 0 <= batch < self.num_batches:
            raise IndexError(f"batch {batch} is out of range for {self.num_batches} batches")
        bucket, start, stop = self.steps[self._epoch_of(epoch)[1][batch]].tolist()
        return bucket, start, stop

    @functools.cached_property
    def _epoch_of(self) -> Callable[[int], list[Indices]]:
        arguments = (self.bucket_of, self.steps[:, 0], self.shuffle, self.seed)
        return functools.lru_cache(EPOCHS_KEPT)(functools.partial(_draw_epoch, *arguments))


def divide(counts: npt.ArrayLike, sizes: Sequence[int], num_shards: int, drop_remainder: bool) -> Indices:
    """Divides samples that stand sorted by bucket into steps.

    Args:
        counts: samples in each bucket.
        sizes: samples in a batch of each bucket, on each shard.
        num_shards: how many batches make a step.
        drop_remainder: only whole steps.

    Returns:
        Bucket, start and stop of each step, in order: int64, shape (steps, 3). Each has at least `num_shards` samples.

    Raises:
        ValueError: there are too few samples for that.
    """
    in_bucket = np.asarray(counts, dtype=np.int64)
    if drop_remainder:
        step = np.asarray(sizes, dtype=np.int64) * num_shards
        whole = in_bucket // step
        bucket = np.repeat(np.arange(len(whole)), whole)
        number = np.arange(len(bucket)) - (np.cumsum(whole) - whole)[bucket]
        starts = (np.cumsum(in_bucket) - in_bucket)[bucket] + number * step[bucket]
        return np.stack([bucket, starts, starts + step[bucket]], axis=1)
    buckets: list[Indices] = []
    samples: list[Indices] = []
    carried = 0
    for index, (count, size) in enumerate(zip(in_bucket.tolist(), sizes, strict=True)):
        full, carried = divmod(count + carried, size * num_shards)
        runs = np.full(full, size * num_shards, dtype=np.int64)
        if 0 < carried < num_shards and full and size > 1:  # the step before has enough for both
            runs[-1] -= num_shards - carried
            carried = num_shards
        if carried >= num_shards:
            runs, carried = np.append(runs, carried), 0
        samples.append(runs)
        buckets.append(np.full(len(runs), index, dtype=np.int64))
    runs = np.concatenate(samples)
    if carried:
        runs = _collect(runs, num_shards, carried)
        buckets.append(np.flatnonzero(in_bucket)[-1:])
    stops = np.cumsum(runs)
    return np.stack([np.concatenate(buckets), np.r_[0, stops[:-1]], stops], axis=1)


def _collect(samples: Indices, num_shards: int, left: int) -> Indices:
    """Samples of each step, with a last one for the `left` samples at the end, which steps before it make a whole.

    Raises:
        ValueError: there are too few samples for that.
    """
    total = int(samples.sum()) + left
    samples, missing = np.append(samples, num_shards), num_shards - left
    for step in np.flatnonzero(samples > num_shards)[::-1].tolist():
        given = min(missing, int(samples[step]) - num_shards)
        samples[step] -= given
        missing -= given
        if not missing:
            return samples
    raise ValueError(
        f"{total} samples in batches of these sizes cannot give num_shards={num_shards} the same number of batches, "
        "none of them empty; pass drop_remainder=True, or greater batch_sizes"
    )


def _draw_epoch(bucket_of: npt.NDArray[Any], steps: Indices, shuffle: bool, seed: int, epoch: int) -> list[Indices]:
    """Of one epoch: the samples sorted by bucket, and the order of the steps.

    The first two steps are of different buckets where there are two: whoever looks at the first two batches for what
    varies in them (Keras, for TensorFlow) sees that their shapes do.
    """
    count = len(bucket_of)
    order = shuffled(0, count, count, seed, epoch) if shuffle else np.arange(count)
    order = order[np.argsort(bucket_of[order], kind="stable")]
    mixed = np.random.Generator(np.random.PCG64(seed_sequence(Stream.BUCKET_ORDER, seed, epoch))).permutation(
        len(steps)
    )
    others = np.flatnonzero(steps[mixed] != steps[mixed[0]])
    if len(others):
        mixed[[1, others[0]]] = mixed[[others[0], 1]]
    return [order, mixed]
