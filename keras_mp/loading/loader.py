"""From a request to a batch: read the samples, transform, collate. The same code in a worker, a thread or in-process.

A loader is what travels to the workers, once. A request says which batch of which epoch is wanted and which samples
make it; the result depends on nothing else (P2). Failures follow the error policy here, so a failed sample is either
raised or part of the result (P5). A batch none of whose samples is good is made of samples from elsewhere in the epoch,
drawn from (seed, epoch, batch): Keras waits for ever for a batch that does not come.

What the transform gets from an array or a list is its own copy: it may write into it, and the source stays as it is.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from keras_mp.errors import SampleFailure, sample_error, short_repr
from keras_mp.loading import collate as collating
from keras_mp.loading.randomness import Generators, Key, Seeder, takes_rng
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream, seed_sequence

OnError = Literal["raise", "skip", "replace"]

# So many samples from elsewhere are tried for a batch without a good one: where one in twenty is good, all of them fail
# in one such batch of half a million.
_MAX_SUBSTITUTES = 256

SAMPLES_DONE = -2  # the position that is noted when all samples have been read, and the batch is put together


class Loaded(NamedTuple):
    """A batch and the samples that failed on the way to it."""

    batch: Any
    failures: tuple[SampleFailure, ...]


class Loader(Protocol):
    """Loads batches. `note` is told the position of each sample before its turn, and `SAMPLES_DONE` after the last;
    `seed` seeds what `generators` are."""

    source: Any

    @property
    def runs_user_code(self) -> bool: ...

    @property
    def generators(self) -> Generators: ...

    def renewed(self) -> Loader: ...

    def load(self, request: Request, note: Callable[[int], None], seed: Seeder | None) -> Loaded: ...


def ignore_position(position: int) -> None:
    """The `note` of a place where nobody watches."""


@dataclasses.dataclass
class _Assembly:
    """A batch that is being made of samples.

    Attributes:
        failures: by position in the request; substitutes have the positions behind the request's samples.
        good: the rows of good samples, by position.
        odd: spec and value, by position, of samples that differ from the first good one: they have failed, unless it
            turns out that most are like them.
    """

    request: Request
    note: Callable[[int], None]
    seed: Seeder | None
    rows: collating.Samples | collating.Stack
    failures: dict[int, SampleFailure]
    good: dict[int, int] = dataclasses.field(default_factory=dict)
    odd: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def own_failures(self) -> tuple[SampleFailure, ...]:
        """Those to report. A substitute that failed was owed to nobody here: it is reported in its own place."""
        if not self.failures:
            return ()
        reported = set(range(len(self.request.samples))) | {position for position, _ in self.request.failed}
        return tuple(self.failures[position] for position in sorted(reported & self.failures.keys()))


class _UserCode:
    """What loaders have in common: functions and objects of the user's, as fields."""

    @functools.cached_property
    def generators(self) -> Generators:
        """What this code may draw from; searched for once."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every loader is a dataclass
        return Generators.of(**{field.name: getattr(self, field.name) for field in fields})

    def renewed(self) -> Any:
        """The same loader, with the generators that its code holds now."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:  # for a copy too
        return {name: value for name, value in self.__dict__.items() if name != "generators"}


@dataclasses.dataclass
class SampleLoader(_UserCode):
    """Loads a batch sample by sample.

    Attributes:
        source: what `source[index]` reads a sample from.
        transform: sample -> sample, or None.
        collate: list of samples -> batch, or None for stacking.
        batch_transform: batch -> batch, or None.
        seed: root of all randomness.
        on_error: "raise", "skip" (leave the sample out) or "replace" (by the nearest good sample before it).
        retries: how often a failing sample is tried again first.
    """

    source: Any
    transform: Callable[..., Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    batch_transform: Callable[..., Any] | None = None
    seed: int = 0
    on_error: OnError = "raise"
    retries: int = 0

    def __post_init__(self) -> None:
        self._transform_rng = takes_rng(self.transform)
        self._batch_rng = takes_rng(self.batch_transform)
        in_memory = isinstance(self.source, np.ndarray) or type(self.source) in (list, tuple)
        self._copies = in_memory and bool(self.transform or self.collate)
        plain = type(self.source) in (np.ndarray, np.memmap, list, tuple, range)
        self.runs_user_code = not plain or bool(self.transform or self.collate or self.batch_transform)

    def load(self, request: Request, note: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """Loads one batch.

        Raises:
            SampleError: user code failed and the policy is "raise", or every sample of the batch failed, and those
                that were tried in their place too.
        """
        capacity = len(request.samples)
        rows = collating.Samples(capacity, self.collate) if self.collate else collating.Stack(capacity)
        made = _Assembly(request, note, seed, rows, dict(request.failed))
        for position, index in enumerate(request.samples):
            row = position if self.on_error == "replace" else len(made.good)
            repeat = request.repeats[position] if request.repeats else 0
            key = Key(Stream.SAMPLE, self.seed, request.epoch, int(index), repeat) if self.runs_user_code else None
            self._put(made, row, position, int(index), key)
        if made.failures:
            if not made.good:
                self._put_substitutes(made)
            if made.odd:
                self._stack_majority(made)
            self._fill(made)
        note(SAMPLES_DONE)
        batch = self._finish(made.rows, capacity if self.on_error == "replace" else len(made.good), request, seed)
        return Loaded(batch, made.own_failures())

    def index_at(self, request: Request, position: int) -> int:
        """Source index of the sample at a position of the request, be it a substitute's."""
        own = len(request.samples)
        return int(request.samples[position] if position < own else self._substitutes(request)[position - own])

    def _put(self, made: _Assembly, row: int, position: int, index: int, key: Key | None) -> None:
        """Reads, transforms and stores one sample, and records what became of it.

        Raises:
            SampleError: it failed, and the policy is "raise".
        """
        made.note(position)
        if position in made.failures:
            return
        attempts = self.retries
        while True:
            stage, item = "source", "not read"
            try:
                if made.seed is not None and key is not None:
                    made.seed(key)
                item = value = self.source[index]
                if self._copies:
                    value = collating.copied(value)
                stage = "transform"
                if self.transform is not None:
                    value = (
                        self.transform(value, rng=key.generator())
                        if self._transform_rng and key
                        else self.transform(value)
                    )
                stage = "collate"
                made.rows.put(row, value)
                made.good[position] = row
                return
            except (Exception, SystemExit) as error:
                if attempts > 0:
                    attempts -= 1
                    continue
                text = item if stage == "source" else short_repr(item, 120)
                failure = _failure(error, stage, made.request, index, text)
                if self.on_error == "raise":
                    raise sample_error(failure, error) from error
                made.failures[position] = failure
                if stage == "collate" and made.good:
                    with contextlib.suppress(TypeError, ValueError):  # it could not stand in any batch
                        # A copy, as a transform may use its memory again.
                        made.odd[position] = collating.spec_of(value), collating.copied(value)
                return

    def _put_substitutes(self, made: _Assembly) -> None:
        """Makes a batch without a good sample of others: of one where samples are left out, of as many otherwise.

        Raises:
            SampleError: they failed too.
        """
        request, capacity = made.request, len(made.request.samples)
        wanted = capacity if self.on_error == "replace" else 1
        for position, index in enumerate(self._substitutes(request), capacity):
            if len(made.good) + len(made.odd) == wanted:
                break
            key = Key(Stream.SUBSTITUTE, self.seed, request.epoch, index, request.batch)
            self._put(made, len(made.good), position, index, key)
        if not made.good:
            tried = len(made.failures) - capacity
            others = f", and {tried} others of the epoch that were tried in their place" if tried else ""
            note = f" (all {capacity} samples of the batch failed{others}; this was the last)"
            raise sample_error(made.failures[max(made.failures)], None, note)

    def _substitutes(self, request: Request) -> list[int]:
        """Source indices of what may be served where all samples of a batch fail, in an order of their own."""
        own = {int(index) for index in request.samples}
        others = range(len(self.source)) if request.substitutes is None else request.substitutes
        root = seed_sequence(Stream.SUBSTITUTES, self.seed, request.epoch, int(request.samples[0]), request.batch)
        count = min(len(others), _MAX_SUBSTITUTES + len(own))
        places = np.random.Generator(np.random.PCG64(root)).choice(len(others), count, replace=False)
        drawn = [index for place in places.tolist() if (index := int(others[place])) not in own]
        return drawn[:_MAX_SUBSTITUTES]

    def _stack_majority(self, made: _Assembly) -> None:
        """Stacks anew if most samples are alike, but not like the first: that is the one which is wrong then."""
        request, rows = made.request, made.rows
        ((most, count),) = collections.Counter(spec for spec, _ in made.odd.values()).most_common(1)
        if count <= len(made.good) or not isinstance(rows, collating.Stack):
            return
        samples = {position: rows.row(row) for position, row in made.good.items()}
        samples |= {position: value for position, (_, value) in made.odd.items()}
        made.rows = collating.Stack(len(request.samples), next(v for spec, v in made.odd.values() if spec == most))
        made.good = {}
        in_place = self.on_error == "replace" and max(samples) < len(request.samples)
        for position in sorted(samples):
            row = position if in_place else len(made.good)
            try:
                made.rows.put(row, samples[position])
                made.good[position] = row
                made.failures.pop(position, None)
            except (TypeError, ValueError) as error:
                index = self.index_at(request, position)
                made.failures[position] = _failure(error, "collate", request, index, self._item(index))

    def _item(self, index: int) -> str:
        """What the source holds there, in words."""
        try:
            return short_repr(self.source[index], 120)
        except (Exception, SystemExit) as error:
            return f"not read a second time: {type(error).__name__}"

    def _fill(self, made: _Assembly) -> None:
        """Fills what is missing by repeating rows, and says in the failures what is served in a sample's place."""
        capacity = len(made.request.samples)
        served = {row: self.index_at(made.request, position) for position, row in made.good.items()}
        if self.on_error != "replace":
            if max(made.good) >= capacity:
                made.failures[0] = dataclasses.replace(made.failures[0], replaced_by=served[0])
            return
        source = min(served)
        for row in range(capacity):
            if row in served:
                source = row
            else:
                made.rows.repeat(source, row)
            if row in made.failures:
                made.failures[row] = dataclasses.replace(made.failures[row], replaced_by=served[source])

    def _finish(
        self, rows: collating.Samples | collating.Stack, count: int, request: Request, seed: Seeder | None
    ) -> Any:
        stage = "collate"
        try:
            key = Key(Stream.BATCH, self.seed, request.epoch, request.batch) if self.runs_user_code else None
            if seed is not None and key is not None:
                seed(key)
            batch = rows.finish(count)
            if self.batch_transform is not None:
                checked_batch(batch, stage)
                stage = "batch_transform"
                batch = (
                    self.batch_transform(batch, rng=key.generator())
                    if self._batch_rng and key
                    else self.batch_transform(batch)
                )
            return checked_batch(batch, stage)
        except (Exception, SystemExit) as error:
            raise _batch_error(error, stage, request) from error


@dataclasses.dataclass
class BatchLoader(_UserCode):
    """Loads a batch from an object whose `[i]` is a whole batch already."""

    source: Any
    seed: int = 0
    retries: int = 0
    runs_user_code: bool = dataclasses.field(default=True, init=False)

    def load(self, request: Request, note: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """Loads one batch.

        Raises:
            SampleError: `source[i]` failed.
        """
        note(0)
        attempts = self.retries
        while True:
            try:
                if seed is not None:
                    seed(Key(Stream.BATCH, self.seed, request.epoch, request.batch))
                return Loaded(checked_batch(self.source[request.samples[0]], "source"), ())
            except (Exception, SystemExit) as error:
                if attempts == 0:
                    raise _batch_error(error, "source", request) from error
                attempts -= 1


def checked_batch(batch: Any, stage: str) -> Any:
    """Returns `batch`, unless it is None: Keras would wait for ever for the batch it leaves out."""
    if batch is None:
        raise TypeError(f"{stage} returned None instead of a batch; did it forget to return?")
    return batch


def _batch_error(error: BaseException, stage: str, request: Request) -> Exception:
    return sample_error(_failure(error, stage, request, None, ""), error)


def _failure(error: BaseException, stage: str, request: Request, index: int | None, item: str) -> SampleFailure:
    return SampleFailure.of(
        error,
        stage=stage,
        index=index,
        item=item,
        epoch=request.epoch,
        batch=request.batch,
        where=f"process {os.getpid()}",
    )
