"""Batches of samples of like length: what a user says of them, and which bucket a sample is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp import checks
from keras_mp.errors import short_repr
from keras_mp.plan.bucket_batching import BucketBatching
from keras_mp.plan.shuffle import Indices


class Buckets:
    """Batches of samples of like length, for `PoolDataset(buckets=...)`.

    Bucket `i` holds the samples whose length is below `boundaries[i]` and not below the boundary before it; the last
    one, of which there is one more than boundaries, all from the last boundary up (as `tf.data`'s
    `bucket_by_sequence_length` has it). A batch is made of one bucket, so padding it to the bucket's longest possible
    sample, `boundaries[i] - 1`, wastes little and gives as many shapes as there are buckets.

    Args:
        lengths: length of each sample: whole numbers from 0, as many as the source has samples. Or a callable from a
            sample's index to its length, which the dataset's workers evaluate once for all samples when it is made.
        boundaries: whole numbers from 1, each greater than the one before.
        batch_sizes: samples in a batch for each bucket, one more than there are boundaries. None: the dataset's
            `batch_size` for all.
        max_tokens: what a padded batch holds at most, in the unit of `lengths`: the batch size of bucket `i` is then
            `max_tokens // boundaries[i]`, and of the last bucket `max_tokens` by the longest length. Not together with
            `batch_sizes`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike | Callable[[int], int],
        boundaries: Sequence[int],
        batch_sizes: Sequence[int] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if batch_sizes is not None and max_tokens is not None:
            raise ValueError(
                f"batch_sizes={short_repr(batch_sizes, 80)} and max_tokens={max_tokens!r} both decide how many samples "
                "a batch has; leave one of them out"
            )
        self.lengths: Indices | Callable[[int], int] = lengths if callable(lengths) else check_lengths(lengths)
        self.boundaries = _check_numbers(boundaries, "boundaries")
        for before, after in zip(self.boundaries, self.boundaries[1:], strict=False):
            if after <= before:
                raise ValueError(
                    f"boundaries must increase, but {after} comes after {before}; pass sorted(set(boundaries))"
                )
        self.max_tokens = None if max_tokens is None else checks.check_count(max_tokens, "max_tokens")
        self.batch_sizes = None if batch_sizes is None else _check_numbers(batch_sizes, "batch_sizes")
        if self.batch_sizes is not None and len(self.batch_sizes) != len(self.boundaries) + 1:
            raise ValueError(
                f"batch_sizes must have one entry for each of the {len(self.boundaries) + 1} buckets that "
                f"{len(self.boundaries)} boundaries make (the last is of all lengths from {self.boundaries[-1]} up), "
                f"got {len(self.batch_sizes)}"
            )

    def plan(self, lengths: Indices, batch_size: int, shuffle: bool, seed: int, drop_remainder: bool) -> BucketBatching:
        """The plan of a dataset with these buckets.

        Args:
            lengths: of all samples: int64, shape (samples in the source,).
            batch_size: samples in a batch where neither `batch_sizes` nor `max_tokens` says it.
            shuffle: whether the samples of a bucket are permuted in each epoch.
            seed: root of all randomness.
            drop_remainder: leave out the samples of a bucket that do not fill a batch on every shard.

        Raises:
            ValueError: `max_tokens` is too few for a sample.
        """
        number = len(self.boundaries) + 1
        bucket_of = np.searchsorted(self.boundaries, lengths, side="right")
        counts = np.bincount(bucket_of, minlength=number).tolist()
        sizes = self.batch_sizes or (batch_size,) * number
        if self.max_tokens is not None:
            longest = max(int(lengths.max()), self.boundaries[-1])
            sizes = _sizes_by_tokens(self.max_tokens, (*self.boundaries, longest), counts)
        return BucketBatching(
            len(lengths),
            max(size for size, count in zip(sizes, counts, strict=True) if count),
            shuffle,
            seed,
            drop_remainder,
            bucket_of=bucket_of.astype(np.min_scalar_type(number)),  # one or two bytes: they are sorted fast
            sizes=sizes,
            boundaries=self.boundaries,
        )

    def __repr__(self) -> str:
        sizes = f", batch_sizes={self.batch_sizes}" if self.batch_sizes else ""
        tokens = f", max_tokens={self.max_tokens}" if self.max_tokens else ""
        return f"Buckets({short_repr(self.lengths, 80)}, {self.boundaries}{sizes}{tokens})"


def check_lengths(lengths: Any) -> Indices:
    """Lengths as int64, shape (samples,).

    Raises:
        TypeError, ValueError: they are not whole numbers from 0, or there are none.
    """
    try:
        array = np.asarray(lengths)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"lengths must be a 1-d sequence of whole numbers, or callable, got {short_repr(lengths, 80)} (shape "
            f"{array.shape}, dtype {array.dtype}); pass, say, [len(sample) for sample in source]"
        )
    if not array.size:
        raise ValueError("lengths is empty; it must have an entry for each sample of the source")
    low = int(array.argmin())
    if array[low] < 0:
        raise ValueError(f"lengths must be at least 0, but lengths[{low}] is {array[low]}")
    return array.astype(np.int64)


def _sizes_by_tokens(max_tokens: int, limits: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    for bucket, (limit, count) in enumerate(zip(limits, counts, strict=True)):
        if count and limit > max_tokens:
            what = "boundary" if bucket < len(limits) - 1 else "longest length"
            raise ValueError(
                f"max_tokens={max_tokens} is fewer than the {what} {limit} of bucket {bucket}, so not even one of its "
                f"{count} samples would fit in a batch; raise max_tokens to {limit}, or lower the boundary"
            )
    return tuple(max(1, max_tokens // limit) for limit in limits)


def _check_numbers(values: Any, name: str) -> tuple[int, ...]:
    """Whole numbers from 1, at least one of them.

    Raises:
        TypeError, ValueError: they are not.
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence of whole numbers, got {short_repr(values, 80)}")
    numbers = tuple(checks.check_count(value, f"{name}[{index}]") for index, value in enumerate(values))
    if not numbers:
        raise ValueError(f"{name} is empty; it must have at least one number")
    return numbers
