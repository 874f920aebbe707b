"""Functions for the workers of `test_trace`: a worker that gets one imports this module, and no Keras with it."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt


def double(row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Twice the sample."""
    return 2 * row


def hang_at_three(row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Never ends at the sample 3."""
    while row[0] == 3:
        pass
    return row


def fail(row: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Fails on every sample."""
    raise ValueError("no good")


def pair(row: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The sample as input and target."""
    return row, row
