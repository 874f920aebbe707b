"""Lengths of samples, told by a function of the user's: a loader whose batches are lengths."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import numpy as np

from keras_mp.errors import sample_error, short_repr
from keras_mp.loading.base import Loaded, Loader, failure_of
from keras_mp.loading.randomness import Key, Seeder
from keras_mp.loading.timing import SOURCE, StageTimes
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream


@dataclasses.dataclass
class LengthLoader(Loader):
    """Loads the lengths of a batch's samples: int64, shape (samples,).

    Attributes:
        source: callable from a sample's index to its length.
        seed: for a function that draws random numbers.
        retries: how often a sample that fails is tried again.
    """

    source: Callable[[int], int]
    seed: int = 0
    retries: int = 0
    runs_user_code = True

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """Loads one batch of lengths; every sample must have one."""
        times.begin_batch(request.epoch, request.batch, len(request.samples))
        if seed is not None:
            seed(Key(Stream.BATCH, self.seed, request.epoch, request.batch))
        lengths = np.empty(len(request.samples), np.int64)
        for position, index in enumerate(request.samples):
            report_position(position)
            lengths[position] = self._length_of(int(index), request)
        times.lap(SOURCE)
        return Loaded(lengths, ())

    def _length_of(self, index: int, request: Request) -> int:
        attempts = self.retries
        while True:
            try:
                return _check_length(self.source(index))
            except (Exception, SystemExit) as error:
                if attempts == 0:
                    failure = failure_of(error, "lengths", request, index, f"lengths({index})")
                    raise sample_error(failure, error) from error
                attempts -= 1


def _check_length(length: object) -> int:
    try:
        whole = operator.index(length)  # type: ignore[arg-type]  # that is what is found out
    except TypeError:
        raise TypeError(f"a length must be a whole number, got {short_repr(length, 80)}") from None
    if whole < 0:
        raise ValueError(f"a length must be at least 0, got {whole}")
    return whole
