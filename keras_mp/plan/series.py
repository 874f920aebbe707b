"""Windows of a time series, as `keras.utils.timeseries_dataset_from_array` cuts them: a source."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.checks import check_count


@dataclasses.dataclass(frozen=True)
class TimeSeries:
    """A source whose `[i]` is a window of `data`, or (window, target).

    Attributes:
        data: the time steps that are used, along the first axis.
        targets: the target of the window that begins at each step, or None.
        starts: number of possible first steps.
        length: steps in a window.
        stride: steps from one window's first to the next one's.
        rate: steps from one step of a window to the next.
    """

    data: npt.NDArray[Any]
    targets: npt.NDArray[Any] | None
    starts: int
    length: int
    stride: int
    rate: int

    def __len__(self) -> int:
        return -(-self.starts // self.stride)

    def __getitem__(self, index: int) -> Any:
        start = range(0, self.starts, self.stride)[index]
        # A copy, as a transform may write into it.
        window = self.data[start : start + self.length * self.rate : self.rate].copy()
        return window if self.targets is None else (window, self.targets[start].copy())


def time_series(
    data: Any,
    targets: Any,
    sequence_length: int,
    sequence_stride: int,
    sampling_rate: int,
    start_index: int | None,
    end_index: int | None,
) -> TimeSeries:
    """The windows of `data[start_index:end_index]`, with the arguments of `timeseries_dataset_from_array`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or there is no window.
    """
    steps = _check_array(data, "data")
    goals = None if targets is None else _check_array(targets, "targets")
    count = len(steps)
    length = check_count(sequence_length, "sequence_length")
    stride = _check_below(sequence_stride, "sequence_stride", 1, count)
    rate = _check_below(sampling_rate, "sampling_rate", 1, count)
    start = 0 if start_index is None else _check_below(start_index, "start_index", 0, count)
    end = count if end_index is None else _check_below(end_index, "end_index", 1, count)
    if end <= start:
        raise ValueError(f"end_index must be above start_index, got start_index={start_index}, end_index={end_index}")
    starts = end - start - (length - 1) * rate
    if starts < 1:
        raise ValueError(
            f"sequence_length={length} with sampling_rate={rate} spans {(length - 1) * rate + 1} steps, but there are "
            f"{end - start}; make the windows shorter or use more of the data"
        )
    if goals is not None:
        goals = goals[start:end]
        starts = min(starts, len(goals))
        if starts < 1:
            raise ValueError(f"targets has {len(targets)} entries, none of them at start_index={start} or after it")
    return TimeSeries(steps[start:end], goals, starts, length, stride, rate)


def _check_array(value: Any, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array.ndim == 0 or array.dtype.hasobject:
        raise TypeError(
            f"{name} must be an array of numbers whose first axis is time, got shape {array.shape} and dtype "
            f"{array.dtype}; pass a NumPy array"
        )
    return array


def _check_below(value: Any, name: str, least: int, bound: int) -> int:
    number = check_count(value, name, least)
    if number >= bound:
        raise ValueError(f"{name} must be below the length of the data, {bound}, got {number}")
    return number
