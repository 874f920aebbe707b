"""Sources made of sources: a part, several one after the other, side by side, or windows of an array.

A view holds its sources and, at most, an array of indices; a sample is read when it is asked for, straight from the
source that has it. It is a source like any other (`len` and `[i]`), travels to the workers with its sources, and those
of their arrays that are large lie in shared memory once, however many views look at them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from keras_mp import checks
from keras_mp.errors import short_repr
from keras_mp.plan.listing import Listing
from keras_mp.plan.orders import classes_of
from keras_mp.plan.seeds import Stream, seed_sequence
from keras_mp.plan.shuffle import Indices


class View:
    """Base of views.

    Attributes:
        sources: what samples are read from.
        count: how many samples there are.
    """

    def __init__(self, sources: tuple[Any, ...], count: int) -> None:
        self.sources = sources
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        """Sample `index`; negative ones count from the end.

        Raises:
            IndexError: there is no such sample.
        """
        number = operator.index(index)
        if not -self.count <= number < self.count:
            raise IndexError(f"sample {number} is out of range: {self!r} has {self.count}")
        return self.read(number % self.count)

    def __iter__(self) -> Iterator[Any]:
        return map(self.read, range(self.count))

    def read(self, index: int) -> Any:
        """Sample `index`, from 0 to the last."""
        raise NotImplementedError

    def over(self, sources: tuple[Any, ...]) -> Self:
        """The same view of other sources, which hold the same samples."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, sources=sources)
        return other

    def __repr__(self) -> str:
        sources = ", ".join(short_repr(source, 60) for source in self.sources)
        return f"{type(self).__name__.lower()}({self.count} samples of {sources})"


class Part(View):
    """Some samples of a source: those at positions [start, start + count) of `order`.

    The parts of a source share one `order`, so what they hold is the same memory. A part of a part is a part of the
    source.
    """

    def __init__(self, source: Any, order: npt.NDArray[Any], start: int, count: int) -> None:
        super().__init__((source,), count)
        self._order = order
        self._start = start

    @classmethod
    def both(cls, source: Any, order: Indices, first: int) -> tuple[Part, Part]:
        """The first samples of `order`, and the rest of them."""
        if isinstance(source, Part):
            order, source = source._order[source._start + order], source.sources[0]
        order = order.astype(np.min_scalar_type(len(source)))
        return cls(source, order, 0, first), cls(source, order, first, len(order) - first)

    def read(self, index: int) -> Any:
        """Sample `index`, from 0 to the last."""
        return self.sources[0][int(self._order[self._start + index])]


class Concat(View):
    """All samples of one source, then all of the next."""

    def __init__(self, sources: tuple[Any, ...], counts: list[int]) -> None:
        super().__init__(sources, sum(counts))
        self._ends = np.cumsum(counts)

    def read(self, index: int) -> Any:
        """Sample `index`, from 0 to the last."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number][index - (int(self._ends[number - 1]) if number else 0)]


class Zip(View):
    """Samples of several sources side by side."""

    def read(self, index: int) -> tuple[Any, ...]:
        """Sample `index`, from 0 to the last."""
        return tuple([source[index] for source in self.sources])


class Windows(View):
    """Runs of a sequence, which overlap where `stride` is less than `length`."""

    def __init__(self, array: Any, length: int, stride: int) -> None:
        super().__init__((array,), (len(array) - length) // stride + 1)
        self._length = length
        self._stride = stride

    def read(self, index: int) -> Any:
        """Sample `index`, from 0 to the last."""
        start = index * self._stride
        return self.sources[0][start : start + self._length]


def is_in_memory(source: Any) -> bool:
    """Whether `source[i]` may be memory of the source itself: of an array, a list, or a view of them."""
    if isinstance(source, View):
        return any(map(is_in_memory, source.sources))
    return isinstance(source, np.ndarray) or type(source) in (list, tuple)


def is_plain(source: Any) -> bool:
    """Whether reading from it runs no code of the user's."""
    if isinstance(source, View):
        return all(map(is_plain, source.sources))
    return type(source) in (np.ndarray, np.memmap, list, tuple, range)


def replace_leaves(source: Any, replace: Callable[[Any], Any]) -> Any:
    """The same source with its arrays and lists replaced by equal ones; what stands in it twice, by one.

    Args:
        source: an array, a list, a view, the files of a folder, or any other source, in which nothing is replaced.
        replace: gives what is to stand in the place of an array or list, or None: it stays.
    """
    return _replaced(source, replace, {})


def _replaced(source: Any, replace: Callable[[Any], Any], made: dict[int, Any]) -> Any:
    # Not a function within `replace_leaves`: one that calls itself is a cycle, which would keep what `replace` holds.
    if id(source) not in made:
        made[id(source)] = source
        if type(source) in (np.ndarray, list, tuple) and (other := replace(source)) is not None:
            made[id(source)] = other
        elif isinstance(source, Listing):
            if (paths := _replaced(source.paths, replace, made)) is not source.paths:
                made[id(source)] = dataclasses.replace(source, paths=paths)
        elif isinstance(source, View):
            sources = tuple(_replaced(each, replace, made) for each in source.sources)
            if any(map(operator.is_not, sources, source.sources)):
                made[id(source)] = source.over(sources)
    return made[id(source)]


def split(source: Any, fraction: float, *, seed: int | None = 0, stratify: Any = None) -> tuple[View, View]:
    """Divides a source in two, at random, say for training and validation.

    Args:
        source: anything with `len()` and `[i]`.
        fraction: share of the samples that the first part gets, between 0.0 and 1.0; rounded to whole samples.
        seed: of the choice; the same seed gives the same parts. None: nothing is drawn, the first part gets the samples
            that come first (of each class).
        stratify: label of each sample, numbers or strings: each class is then divided by `fraction`, to one sample.

    Returns:
        Two sources that have each sample of `source` in one of them, in the order of `source`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or a part would be empty.
    """
    count = checks.check_source(source)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.floating):
        raise TypeError(f"fraction must be a float, got {short_repr(fraction, 80)}")
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie between 0.0 and 1.0, got {fraction!r}: it is the first part's share")
    first = round(count * fraction)
    if first in (0, count):
        raise ValueError(
            f"fraction={fraction!r} of {count} samples are {first}, which leaves nothing for the "
            f"{'second' if first else 'first'} part; choose another fraction, or more samples"
        )
    order = np.arange(count)
    if seed is not None:
        root = seed_sequence(Stream.SPLIT, checks.check_count(seed, "seed", 0), 0)
        order = np.random.Generator(np.random.PCG64(root)).permutation(count)
    chosen = order[:first] if stratify is None else _choose_alike(order, _labels_of(stratify, count), first)
    is_first = np.zeros(count, dtype=bool)
    is_first[chosen] = True
    return Part.both(source, np.concatenate([np.flatnonzero(is_first), np.flatnonzero(~is_first)]), first)


def _labels_of(stratify: Any, count: int) -> npt.NDArray[np.intp]:
    class_of = classes_of(stratify, "stratify")
    if len(class_of) != count:
        raise ValueError(f"stratify has {len(class_of)} labels, but the source has {count} samples; give one for each")
    return class_of


def _choose_alike(order: Indices, class_of: npt.NDArray[np.intp], first: int) -> Indices:
    """`first` of the samples, as many of each class as is its share, to one sample (the largest remainders)."""
    counts = np.bincount(class_of)
    quotas, rests = np.divmod(counts * first, len(order))
    quotas[np.argsort(-rests, kind="stable")[: first - quotas.sum()]] += 1
    by_class = order[np.argsort(class_of[order], kind="stable")]
    places = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_class[places < np.repeat(quotas, counts)]


def concat(*sources: Any) -> View:
    """The samples of several sources, one source after the other.

    With `order=keras_mp.weighted(...)` it mixes data sets in any proportion.

    Args:
        sources: each anything with `len()` and `[i]`.

    Returns:
        A source.

    Raises:
        TypeError, ValueError: there is none, or one is not a source, or empty.
    """
    return Concat(sources, _check_sources(sources, "concat"))


def windows(array: Any, length: int, stride: int = 1) -> View:
    """The windows of a sequence: `array[0:length]`, `array[stride:stride + length]`, and so on. Nothing is copied.

    Args:
        array: an array, a memmap, or anything whose `[start:stop]` is a part of it; its first axis is cut.
        length: elements in a window. What is left at the end and does not fill one is left out.
        stride: elements from one window's start to the next one's.

    Returns:
        A source of (len(array) - length) // stride + 1 samples.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or no window fits.
    """
    count = checks.check_source(array, "array")
    if isinstance(array, View):
        raise TypeError(
            f"array must give a part for [start:stop], which {array!r} does not; take windows of its source"
        )
    length = checks.check_count(length, "length")
    stride = checks.check_count(stride, "stride")
    if length > count:
        raise ValueError(f"length={length} is greater than the array, which has {count}; not one window fits")
    return Windows(array, length, stride)


def zip(*sources: Any) -> View:
    """Samples of several sources side by side, say inputs and targets: sample `i` is the tuple of their samples `i`.

    Args:
        sources: each anything with `len()` and `[i]`, all of the same length.

    Returns:
        A source.

    Raises:
        TypeError, ValueError: there is none, or one is not a source, or they differ in length.
    """
    counts = _check_sources(sources, "zip")
    for number, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"zip() needs sources of equal length, but sources[0] has {counts[0]} samples and sources[{number}] "
                f"has {count}"
            )
    return Zip(sources, counts[0])


def _check_sources(sources: tuple[Any, ...], name: str) -> list[int]:
    if not sources:
        raise TypeError(f"{name}() needs at least one source")
    return [checks.check_source(source, f"sources[{number}]") for number, source in enumerate(sources)]
