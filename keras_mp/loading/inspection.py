"""What is found in samples, looked at where they are loaded: shapes, dtypes, NaN and Inf, errors, seconds.

An inspecting loader makes batches as the loader that it is made of does, by the same code, random numbers and retries,
but gives a list of `Inspected` in place of each. Nothing that fails in the user's code ends it (P5).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from keras_mp.errors import SampleError, SampleFailure, short_repr
from keras_mp.loading.base import SAMPLES_DONE, Loaded, Loader
from keras_mp.loading.batch_loader import BatchLoader
from keras_mp.loading.builder import BatchBuilder
from keras_mp.loading.collate import Stack, leaves_of
from keras_mp.loading.loader import SampleLoader
from keras_mp.loading.randomness import Key, Seeder
from keras_mp.loading.timing import StageTimes
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream

# What may differ in things that are alike: "equal", nothing; "rows", the length of the first axis; "lengths", that of
# any axis. Numbers of axes, dtypes and structure never may.
Likeness = Literal["equal", "rows", "lengths"]

_ITEM_LENGTH = 120


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a sample or a batch.

    Attributes:
        path: where in it, such as "sample['image']".
        shape: its shape; None: it is no array.
        dtype: name of its dtype, "str", "bytes", or of its type if it is no array.
        nans, infs: how many of its numbers are NaN, and how many infinite.
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: str
    nans: int = 0
    infs: int = 0


@dataclasses.dataclass(frozen=True)
class Inspected:
    """What is found in one sample, or in one batch.

    Attributes:
        unit: which of the two it is.
        index: of the sample in the source; of the batch in its epoch.
        item: what the source holds there, or of which samples the batch is made, in words.
        likeness: in what it must be like the others.
        seconds: what it took, to read and transform it or to make the batch, without the looking.
        leaves: its arrays, in order; none if it failed.
        failure: how it failed.
    """

    unit: Literal["sample", "batch"]
    index: int
    item: str
    likeness: Likeness
    seconds: float
    leaves: tuple[Leaf, ...] = ()
    failure: SampleFailure | None = None


def inspecting(loader: Loader) -> Loader:
    """The loader that says what is found in the samples or batches of `loader`.

    Raises:
        TypeError: nothing is known of loaders of its kind.
    """
    fields = dataclasses.fields(loader)  # type: ignore[arg-type]  # every loader is a dataclass
    arguments = {field.name: getattr(loader, field.name) for field in fields}
    if isinstance(loader, SampleLoader):
        return SampleInspector(**{**arguments, "on_error": "skip"})
    if isinstance(loader, BatchLoader):
        return BatchInspector(**arguments)
    raise TypeError(f"the samples of a {type(loader).__name__} cannot be inspected")


@dataclasses.dataclass
class SampleInspector(SampleLoader):
    """Looks at each sample, and, where the user's code makes something of a batch, at that."""

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """A list of `Inspected`: one for each sample, and maybe one for the batch."""
        makes_batches = bool(self.collate or self.batch_transform)
        builder = _InspectingBuilder(request, self.collate, makes_batches)
        likeness: Likeness = "lengths" if self.collate else "equal"
        found = []
        times.begin_batch(request.epoch, request.batch, builder.capacity)
        for position, index in enumerate(map(int, request.samples)):
            key = Key(Stream.SAMPLE, self.seed, request.epoch, index) if self.runs_user_code else None
            report_position(position)
            builder.looking_s = 0.0
            began = time.monotonic()
            self._add_sample(builder, position, index, key, seed, times)
            seconds = time.monotonic() - began - builder.looking_s
            failure = builder.failures.get(position)
            item = short_repr(times.item, _ITEM_LENGTH) if failure is None else failure.item
            leaves = builder.leaves.get(position, ())
            found.append(Inspected("sample", index, item, likeness, seconds, leaves, failure))
        report_position(SAMPLES_DONE)
        times.end_sample()
        if builder.row_of:
            is_odd = any(leaf.nans or leaf.infs for each in found for leaf in each.leaves)
            batch = self._look_at_batch(builder, seed, times)
            if is_odd:  # what its samples have is not its own
                leaves = tuple(dataclasses.replace(leaf, nans=0, infs=0) for leaf in batch.leaves)
                batch = dataclasses.replace(batch, leaves=leaves)
            found.append(batch)
        return Loaded(found, ())

    def _look_at_batch(self, builder: BatchBuilder, seed: Seeder | None, times: StageTimes) -> Inspected:
        request = builder.request
        item = samples_in_words(request.samples)
        began = time.monotonic()
        try:
            batch = self._finish(builder, seed, times)
        except SampleError as error:
            seconds = time.monotonic() - began
            return Inspected("batch", request.batch, item, "lengths", seconds, (), error.failure)
        seconds = time.monotonic() - began
        return Inspected("batch", request.batch, item, "lengths", seconds, tuple(_look(batch, "batch")))


@dataclasses.dataclass
class BatchInspector(BatchLoader):
    """Looks at each batch of an object that gives whole ones."""

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """A list of one `Inspected`."""
        (index,) = map(int, request.samples)
        began = time.monotonic()
        try:
            batch = super().load(request, report_position, seed, times).batch
        except SampleError as error:
            seconds = time.monotonic() - began
            return Loaded([Inspected("batch", index, f"[{index}]", "rows", seconds, (), error.failure)], ())
        seconds = time.monotonic() - began
        return Loaded([Inspected("batch", index, f"[{index}]", "rows", seconds, tuple(_look(batch, "batch")))], ())


def samples_in_words(samples: Sequence[int]) -> str:
    """Which samples a batch is made of, by their source indices."""
    return f"sample {samples[0]}" if len(samples) == 1 else f"samples {samples[0]} to {samples[-1]}"


class _InspectingBuilder(BatchBuilder):
    """Looks at samples when they are added. They become part of a batch only if one `is_made`."""

    def __init__(self, request: Request, collate: Callable[[list[Any]], Any] | None, is_made: bool) -> None:
        super().__init__(request, collate, keeps_rows=False)
        self.leaves: dict[int, tuple[Leaf, ...]] = {}
        self.looking_s = 0.0
        self._collate, self._is_made = collate, is_made

    def add(self, position: int, sample: Any) -> None:
        """Looks at `sample`.

        Raises:
            TypeError, ValueError: it cannot be stacked at all.
        """
        began = time.monotonic()
        if self._collate is None:
            Stack(1).put(0, sample)
        self.leaves[position] = tuple(_look(sample, "sample"))
        if self._is_made:
            # One that is not like the others is left out of the batch: its leaves tell that already.
            with contextlib.suppress(TypeError, ValueError):
                super().add(position, sample)
        self.looking_s += time.monotonic() - began


def _look(nest: Any, path: str) -> Iterator[Leaf]:
    for place, value in leaves_of(nest, path):
        array = np.asarray(value) if hasattr(value, "__array__") or not hasattr(value, "__len__") else _array(value)
        if array is None or (array.dtype.hasobject and not hasattr(value, "__array__")):
            yield Leaf(place, None, type(value).__name__)
            continue
        name = {"U": "str", "S": "bytes"}.get(array.dtype.kind) or array.dtype.newbyteorder("=").name
        yield Leaf(place, array.shape, name, *_count_odd(array))


def _array(value: Any) -> Any:
    """A sequence as an array, if it makes one."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):  # lists of unequal lengths
        return None


def _count_odd(array: Any) -> tuple[int, int]:
    """How many numbers are NaN, and how many infinite."""
    if array.dtype.kind in "biuUSOMm":
        return 0, 0
    try:
        if np.isfinite(array).all():
            return 0, 0
        return int(np.count_nonzero(np.isnan(array))), int(np.count_nonzero(np.isinf(array)))
    except TypeError:  # a structured dtype
        return 0, 0
