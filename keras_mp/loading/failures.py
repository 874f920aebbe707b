"""The record of failed samples: listed, counted, reported to the user once an epoch, and too many are an error (P5)."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable

from keras_mp.errors import SampleFailure, TooManyFailures, warn_user

_MAX_KEPT = 1000


class FailureLog:
    """Failures of a dataset.

    Args:
        limit: how many samples may fail in one epoch: a count (int), a share (float), or None for no limit.
        epoch_samples: samples in an epoch, which a share is taken of; None: that is not known.
    """

    def __init__(self, limit: float | None, epoch_samples: int | None) -> None:
        self._limit = limit
        self._epoch_samples = epoch_samples
        self._kept: collections.deque[SampleFailure] = collections.deque(maxlen=_MAX_KEPT)
        # By epoch, and by batch and sample, as a batch may be loaded more than once: whether another was served.
        self._seen: dict[int, dict[tuple[int, int | None, int | None], bool]] = {}
        self.total = 0

    @property
    def kept(self) -> list[SampleFailure]:
        """The last thousand failures, oldest first."""
        return list(self._kept)

    def _counted(self, count: int) -> str:
        if self._epoch_samples is None:
            return "1 sample" if count == 1 else f"{count} samples"
        return f"{count} of {self._epoch_samples} samples"

    def add(self, failures: Iterable[SampleFailure]) -> None:
        """Lists and counts what failed in one batch.

        Raises:
            TooManyFailures: the epoch has now more than the limit allows.
        """
        for failure in failures:
            seen = self._seen.setdefault(failure.epoch, {})
            sample = (failure.batch, failure.index, failure.offset)
            if sample in seen:
                continue
            seen[sample] = failure.replaced_by is not None
            self._kept.append(failure)
            self.total += 1
            if self._limit is None:
                continue
            allowed = self._limit * (self._epoch_samples or 0) if isinstance(self._limit, float) else self._limit
            if len(seen) > allowed:
                raise TooManyFailures(
                    f"{self._counted(len(seen))} have failed in epoch {failure.epoch}, more than "
                    f"max_failures={self._limit} allows. The last: {failure.describe()}\n\nTraceback from "
                    f"{failure.where}:\n{failure.traceback}"
                )

    def record(self, failure: SampleFailure) -> None:
        """Lists a failure that was raised: nothing was left out or replaced, so `warn` leaves it out."""
        self._kept.append(failure)
        self.total += 1

    def warn(self, epoch: int | None = None) -> None:
        """Warns the user, once, of what failed in `epoch`, which is over; None: in every epoch."""
        if epoch is None:
            for failed in sorted(self._seen):
                self.warn(failed)
            return
        seen = self._seen.pop(epoch, {})
        if not seen:
            return
        replaced = sum(seen.values())
        last = next((f for f in reversed(self._kept) if f.epoch == epoch), None)
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # Keras's progress bar may stand in this line
        warn_user(
            f"keras_mp: {self._counted(len(seen))} failed in epoch {epoch} and were left out "
            f"({len(seen) - replaced}) or replaced by others of the epoch ({replaced}); `dataset.failures` lists them. "
            f"{'' if last is None else 'The last: ' + last.describe()}"
        )
