"""The control words at the start of a slot: what the worker that builds batches in it is at.

The worker writes them; the parent reads them, should the worker die or take too long. No lock guards them: each is one
aligned 64-bit word with one writer.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

CONTROL_BYTES = 64
NOT_STARTED = -1  # a position before the first sample

_BATCH, _POSITION, _SINCE = 0, 1, 2


class ControlWords:
    """Those of one slot, given its memory."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._words = memory.data[:CONTROL_BYTES].cast("q")

    def begin_batch(self, number: int) -> None:
        """Batch `number` of those in the slot comes next; those before it are ready."""
        self._words[_POSITION] = NOT_STARTED
        self._words[_BATCH] = number

    def begin_sample(self, position: int) -> None:
        """The sample at `position` of the batch is being processed."""
        self._words[_SINCE] = time.monotonic_ns()  # of a clock that all processes share
        self._words[_POSITION] = position

    @property
    def batch(self) -> int:
        """Which of the slot's batches is being built, from 0."""
        return self._words[_BATCH]

    @property
    def position(self) -> int:
        """Which of its samples is being processed."""
        return self._words[_POSITION]

    @property
    def sample_since(self) -> float:
        """When that began, in seconds of `time.monotonic`."""
        return self._words[_SINCE] / 1e9
