"""A batch while it is made of samples: which row each sample has, and what is made of the batch where some failed (P5).

A bad sample is left out ("skip") or another is repeated for it ("replace"), and it costs no other one, whichever of
the batch it is. Nothing is read here, and no code of the user's is called but `collate`.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Any

from keras_mp.errors import SampleFailure
from keras_mp.loading.collate import Samples, Stack, copied
from keras_mp.loading.padded_rows import PaddedRows
from keras_mp.loading.padding import Padding
from keras_mp.plan.request import Request


class BatchBuilder:
    """Collects the samples of one batch.

    A sample is known by its position in the request. Substitutes, from elsewhere in the epoch, have the positions
    behind the request's samples.

    Args:
        request: which batch.
        collate: list of samples -> batch; None: they are stacked.
        keeps_rows: whether sample k is row k of the batch ("replace"), or a row is given to good samples only.

    Attributes:
        request: which batch.
        capacity: rows in the batch, if all is well.
        row_of: rows of the good samples, by position.
        failures: by position.
        misfits: spec and value, by position, of samples that differ from the first good one: they have failed, unless
            it turns out that most are like them.
    """

    def __init__(self, request: Request, collate: Callable[[list[Any]], Any] | None, keeps_rows: bool) -> None:
        self.request = request
        self.capacity = len(request.samples)
        self.row_of: dict[int, int] = {}
        self.failures: dict[int, SampleFailure] = dict(request.failed)
        self.misfits: dict[int, tuple[Any, Any]] = {}
        self._keeps_rows = keeps_rows
        self._rows = _rows(request, collate)

    def add(self, position: int, sample: Any) -> None:
        """Makes `sample` part of the batch.

        Raises:
            TypeError, ValueError: it cannot be stacked on the samples before it.
        """
        row = position if self._keeps_rows and position < self.capacity else len(self.row_of)
        self._rows.put(row, sample)
        self.row_of[position] = row

    def keep_misfit(self, position: int, sample: Any) -> None:
        """Remembers a sample that `add` has refused."""
        if self.row_of and not isinstance(self._rows, Samples):  # else it was the first, and can be stacked on nothing
            with contextlib.suppress(TypeError, ValueError):  # a transform may use its memory again
                self.misfits[position] = self._rows.spec_of(sample), copied(sample)

    def use_majority(self) -> dict[int, Exception]:
        """Stacks anew if most samples are alike, but not like the first: that is the one which is wrong then.

        Returns:
            Errors of the samples that cannot be stacked on those, by position.
        """
        errors: dict[int, Exception] = {}
        if not self.misfits or isinstance(self._rows, Samples):
            return errors
        ((most, count),) = collections.Counter(spec for spec, _ in self.misfits.values()).most_common(1)
        if count <= len(self.row_of):
            return errors
        samples = {position: self._rows.row(row) for position, row in self.row_of.items()}
        samples |= {position: value for position, (_, value) in self.misfits.items()}
        self._rows = self._rows.restarted(next(value for spec, value in self.misfits.values() if spec == most))
        self.row_of = {}
        for position in sorted(samples):
            try:
                self.add(position, samples[position])
                self.failures.pop(position, None)
            except (TypeError, ValueError) as error:
                errors[position] = error
        return errors

    def fill_rows(self) -> dict[int, int]:
        """Fills rows without a sample by repeating the nearest good one before them, or else the first.

        Returns:
            By position in the request: the position of the sample that is served there.
        """
        served = {row: position for position, row in self.row_of.items()}
        if not self._keeps_rows:
            return {0: served[0]} if max(self.row_of) >= self.capacity else {}
        source = min(served)
        replaced: dict[int, int] = {}
        for row in range(self.capacity):
            if row in served:
                source = row
            else:
                self._rows.put(row, self._rows.row(source))
            replaced[row] = served[source]
        return replaced

    def finish(self) -> Any:
        """The batch of all rows that have a sample."""
        return self._rows.finish(self.capacity if self._keeps_rows else len(self.row_of))

    def reported_failures(self) -> tuple[SampleFailure, ...]:
        """Those of this batch. A substitute that failed was owed to nobody here: it is reported in its own place."""
        if not self.failures:
            return ()
        reported = set(range(self.capacity)) | {position for position, _ in self.request.failed}
        return tuple(self.failures[position] for position in sorted(reported & self.failures.keys()))


def _rows(request: Request, collate: Callable[[list[Any]], Any] | Padding | None) -> Stack | PaddedRows | Samples:
    capacity = len(request.samples)
    if collate is None:
        return Stack(capacity)
    if isinstance(collate, Padding):
        return PaddedRows(capacity, collate, stretch=request.stretch)
    return Samples(capacity, collate)
