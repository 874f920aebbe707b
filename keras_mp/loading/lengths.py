"""Lengths of samples by a function of the user's: a source whose `[i]` is a batch of lengths, for a `BatchLoader`."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from keras_mp.errors import short_repr


class LengthBatches:
    """What a function says of sample after sample, in batches.

    Args:
        function: callable from a sample's index to its length.
        count: samples in all.
        batch_size: of them in a batch.
    """

    def __init__(self, function: Callable[[int], int], count: int, batch_size: int) -> None:
        self._function = function
        self._count = count
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __getitem__(self, batch: int) -> npt.NDArray[np.int64]:
        """Lengths of the samples of `batch`: int64, shape (samples in it,).

        Raises:
            TypeError, ValueError: the function returned something else than a whole number from 0.
        """
        start = batch * self._batch_size
        samples = range(start, min(start + self._batch_size, self._count))
        return np.fromiter(map(self._measure, samples), np.int64, len(samples))

    def _measure(self, index: int) -> int:
        try:
            length = self._function(index)
        except Exception as error:
            error.add_note(f"keras_mp: this was lengths({index})")
            raise
        try:
            whole = operator.index(length)
        except TypeError:
            raise TypeError(f"lengths({index}) must be a whole number, got {short_repr(length, 80)}") from None
        if whole < 0:
            raise ValueError(f"lengths({index}) must be at least 0, got {whole}")
        return whole
