"""The record of failed samples: listed, counted, told once an epoch, and too many of them an error (P5)."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterable

from keras_mp.errors import SampleFailure, TooManyFailures

_KEPT = 1000


class FailureLog:
    """Failures of a dataset.

    Args:
        limit: how many samples may fail in one epoch: a count (int), a share (float), or None for no limit.
        epoch_samples: samples in an epoch, which a share is taken of.
    """

    def __init__(self, limit: float | None, epoch_samples: int) -> None:
        self._limit = limit
        self._epoch_samples = epoch_samples
        self._kept: collections.deque[SampleFailure] = collections.deque(maxlen=_KEPT)
        # By epoch, as a batch may be loaded more than once; with whether another sample was served.
        self._seen: dict[int, dict[tuple[int, int | None], bool]] = {}
        self.total = 0

    @property
    def kept(self) -> list[SampleFailure]:
        """The last thousand failures, oldest first."""
        return list(self._kept)

    def fresh(self, epoch_samples: int) -> FailureLog:
        """An empty log with the same limit."""
        return FailureLog(self._limit, epoch_samples)

    def add(self, failures: Iterable[SampleFailure]) -> None:
        """Takes note of what failed in one batch.

        Raises:
            TooManyFailures: the epoch has now more than the limit allows.
        """
        for failure in failures:
            seen = self._seen.setdefault(failure.epoch, {})
            if (failure.batch, failure.index) in seen:
                continue
            seen[failure.batch, failure.index] = failure.replaced_by is not None
            self._kept.append(failure)
            self.total += 1
            count = len(seen)
            if self._limit is None:
                continue
            allowed = self._limit * self._epoch_samples if isinstance(self._limit, float) else self._limit
            if count > allowed:
                raise TooManyFailures(
                    f"{count} of {self._epoch_samples} samples have failed in epoch {failure.epoch}, more than "
                    f"max_failures={self._limit} allows. The last: {failure.describe()}\n\nTraceback from "
                    f"{failure.where}:\n{failure.traceback}"
                )

    def record(self, failure: SampleFailure) -> None:
        """Lists a failure that was raised: nothing was left out or replaced, so it is not told again."""
        self._kept.append(failure)
        self.total += 1

    def tell_all(self) -> None:
        """`tell` for every epoch that has not been told."""
        for epoch in sorted(self._seen):
            self.tell(epoch)

    def tell(self, epoch: int) -> None:
        """Warns the user, once, of what failed in `epoch`, which is over."""
        seen = self._seen.pop(epoch, {})
        if not seen:
            return
        replaced = sum(seen.values())
        last = next((f for f in reversed(self._kept) if f.epoch == epoch), None)
        warnings.warn(
            f"keras_mp: {len(seen)} of {self._epoch_samples} samples failed in epoch {epoch} and were left out "
            f"({len(seen) - replaced}) or replaced by others of the epoch ({replaced}); `dataset.failures` lists them. "
            f"{'' if last is None else 'The last: ' + last.describe()}",
            RuntimeWarning,
            stacklevel=2,
        )
