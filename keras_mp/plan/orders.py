"""Orders that draw samples with replacement: by a weight of each, or alike from each class. For `order=`.

What is drawn follows from (seed, epoch), as for any order, and a sample that is drawn again in an epoch gets other
random numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp import checks
from keras_mp.errors import short_repr
from keras_mp.plan.shuffle import Indices


class DrawnOrder:
    """Base of orders that draw from the samples of a source.

    Attributes:
        what: what there was of each sample, in a user's words.
        count: samples in the source.
        length: samples in an epoch.
    """

    what: str

    def __init__(self, count: int, length: int) -> None:
        self.count = count
        self.length = length

    def __call__(self, epoch: int, rng: np.random.Generator) -> Indices:
        """The samples of an epoch, drawn from `rng`: int64, shape (length,)."""
        raise NotImplementedError

    def check(self, count: int) -> None:
        """Whether it is an order of a source of `count` samples.

        Raises:
            ValueError: it is not.
        """
        if count != self.count:
            raise ValueError(
                f"order= was made of {self.count} {self.what}, but the source has {count} samples; give it one for "
                "each sample, in the source's order"
            )


class _Weighted(DrawnOrder):
    what = "weights"

    def __init__(self, weights: npt.NDArray[np.float64], length: int) -> None:
        super().__init__(len(weights), length)
        self._sums = np.cumsum(weights / weights.max())
        self._last = int(np.flatnonzero(weights)[-1])

    def __call__(self, epoch: int, rng: np.random.Generator) -> Indices:
        """The first sample whose weights, summed up, exceed a uniform number: never one of weight 0."""
        drawn = np.searchsorted(self._sums, rng.random(self.length) * self._sums[-1], side="right")
        chosen: Indices = np.minimum(drawn, self._last)  # the product may be rounded up to the sum of all
        return chosen

    def __repr__(self) -> str:
        return f"weighted(<{self.count} weights>, length={self.length})"


class _Balanced(DrawnOrder):
    what = "labels"

    def __init__(self, class_of: npt.NDArray[Any], length: int) -> None:
        super().__init__(len(class_of), length)
        self._by_class = np.argsort(class_of, kind="stable")
        self._counts = np.bincount(class_of)
        self._starts = np.cumsum(self._counts) - self._counts

    def __call__(self, epoch: int, rng: np.random.Generator) -> Indices:
        """Deals the epoch's places out to the classes, then draws a sample of its class for each place."""
        classes = rng.permutation(np.resize(rng.permutation(len(self._counts)), self.length))
        drawn: Indices = self._by_class[self._starts[classes] + rng.integers(self._counts[classes])]
        return drawn

    def __repr__(self) -> str:
        return f"balanced(<{self.count} labels of {len(self._counts)} classes>, length={self.length})"


def weighted(weights: npt.ArrayLike, length: int) -> DrawnOrder:
    """An order that draws samples with replacement, each with a probability in proportion to its weight.

    Args:
        weights: one number from 0 for each sample of the source: shape (samples,). They need not sum up to 1.
        length: samples in an epoch.

    Returns:
        A callable for `PoolDataset(order=...)`.

    Raises:
        TypeError, ValueError: the weights are not finite numbers from 0, or all are 0; or `length` is below 1.
    """
    array = _as_row(weights, "weights")
    if array.dtype.kind not in "iufb":
        raise TypeError(f"weights must be numbers, got {short_repr(weights, 80)} (dtype {array.dtype})")
    array = array.astype(np.float64)
    if (wrong := np.flatnonzero(~(np.isfinite(array) & (array >= 0)))).size:
        raise ValueError(f"weights must be finite and at least 0, but weights[{wrong[0]}] is {array[wrong[0]]}")
    if not array.any():
        raise ValueError(f"weights are all 0, got {short_repr(weights, 80)}; at least one must be greater")
    return _Weighted(array, checks.check_count(length, "length"))


def balanced(labels: npt.ArrayLike, length: int | None = None) -> DrawnOrder:
    """An order that draws as many samples of each class, with replacement, however many the source has of it.

    Args:
        labels: class of each sample of the source, numbers or strings: shape (samples,).
        length: samples in an epoch; None: as many as there are labels. Each class has its equal share of them, or one
            more.

    Returns:
        A callable for `PoolDataset(order=...)`.

    Raises:
        TypeError, ValueError: the labels are not a row of labels; or `length` is below 1.
    """
    class_of = classes_of(labels, "labels")
    return _Balanced(class_of, len(class_of) if length is None else checks.check_count(length, "length"))


def classes_of(labels: Any, name: str) -> npt.NDArray[np.intp]:
    """The class of each label, counted from 0: shape (labels,).

    Raises:
        TypeError, ValueError: the labels are not a row of labels.
    """
    array = _as_row(labels, name)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"{name}[{np.flatnonzero(np.isnan(array))[0]}] is nan, which is no class")
    try:
        return np.unique(array, return_inverse=True)[1]
    except TypeError as error:
        raise TypeError(f"{name} must be numbers or strings, all of one kind, got {short_repr(labels, 80)}") from error


def _as_row(values: Any, name: str) -> npt.NDArray[Any]:
    array = np.empty((0, 0)) if isinstance(values, str | bytes) else _as_array(values)
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be 1-d, one for each sample, got {short_repr(values, 80)}; of one-hot rows take "
            f"{name}.argmax(axis=1)"
        )
    if not array.size:
        raise ValueError(f"{name} is empty, got {short_repr(values, 80)}; there must be one for each sample")
    return array


def _as_array(values: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        return np.empty((0, 0))
