"""From a request to a batch: read the samples, transform, collate. The same code in a worker, a thread or in-process.

A loader is what travels to the workers, once. A request says which batch of which epoch is wanted and which samples
make it; the result depends on nothing else (P2). Failures follow the error policy here, so a failed sample is either
raised or part of the result (P5). A batch none of whose samples is good is made of samples from elsewhere in the epoch,
drawn from (seed, epoch, batch): Keras waits for ever for a batch that does not come.

What the transform gets from an array or a list is its own copy: it may write into it, and the source stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from keras_mp.errors import SampleFailure, sample_error, short_repr
from keras_mp.loading.builder import BatchBuilder
from keras_mp.loading.collate import copied
from keras_mp.loading.randomness import Generators, Key, Seeder, takes_rng
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream, seed_sequence
from keras_mp.plan.views import is_in_memory, is_plain

OnError = Literal["raise", "skip", "replace"]

# So many samples from elsewhere are tried for a batch without a good one: where one in twenty is good, all of them fail
# in one such batch of half a million.
_MAX_SUBSTITUTES = 256

SAMPLES_DONE = -2  # the position that is reported when all samples have been read, and the batch is put together


class Loaded(NamedTuple):
    """A batch and the samples that failed on the way to it."""

    batch: Any
    failures: tuple[SampleFailure, ...]


def ignore_position(position: int) -> None:
    """The `report_position` where nobody watches."""


class Loader:
    """Base of loaders: dataclasses whose fields are functions and objects of the user's.

    Attributes:
        source: what samples or batches are read from.
        runs_user_code: whether anything that is called is the user's.
    """

    source: Any
    runs_user_code: bool

    def load(self, request: Request, report_position: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """Loads one batch. Several threads may do so at once.

        Args:
            request: which batch.
            report_position: called with the position in the request of each sample before its turn, and with
                `SAMPLES_DONE` after the last.
            seed: seeds `generators`; called with the key of a sample or batch before its code runs. None: they are
                left alone.

        Raises:
            SampleError: code of the user's failed, and what failed cannot be left out.
        """
        raise NotImplementedError

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
class SampleLoader(Loader):
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
        self._transform_takes_rng = takes_rng(self.transform)
        self._batch_transform_takes_rng = takes_rng(self.batch_transform)
        self._copies = is_in_memory(self.source) and bool(self.transform or self.collate)
        functions = bool(self.transform or self.collate or self.batch_transform)
        self.runs_user_code = functions or not is_plain(self.source)

    def load(self, request: Request, report_position: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """A batch without a good sample is made of others, and fails only if they do too."""
        builder = BatchBuilder(request, self.collate, self.on_error == "replace")
        for position, index in enumerate(request.samples):
            repeat = request.repeats[position] if request.repeats else 0
            key = Key(Stream.SAMPLE, self.seed, request.epoch, int(index), repeat) if self.runs_user_code else None
            report_position(position)
            self._add_sample(builder, position, int(index), key, seed)
        if builder.failures:
            self._repair(builder, report_position, seed)
        report_position(SAMPLES_DONE)
        return Loaded(self._finish(builder, seed), builder.reported_failures())

    def index_at(self, request: Request, position: int) -> int:
        """Source index of the sample at a position of the request, be it a substitute's."""
        own = len(request.samples)
        return int(request.samples[position] if position < own else self._substitutes(request)[position - own])

    def _add_sample(
        self, builder: BatchBuilder, position: int, index: int, key: Key | None, seed: Seeder | None
    ) -> None:
        """Reads and transforms one sample, and adds it to the batch, or its failure.

        Raises:
            SampleError: it failed, and the policy is "raise".
        """
        if position in builder.failures:  # known beforehand
            return
        attempts = self.retries
        while True:
            stage, item = "source", "not read"
            try:
                if seed is not None and key is not None:
                    seed(key)
                item = sample = self.source[index]
                if self._copies:
                    sample = copied(sample)
                stage = "transform"
                if self.transform is not None:
                    rng = {"rng": key.generator()} if self._transform_takes_rng and key else {}
                    sample = self.transform(sample, **rng)
                stage = "collate"
                builder.add(position, sample)
                return
            except (Exception, SystemExit) as error:
                if attempts > 0:
                    attempts -= 1
                    continue
                text = item if stage == "source" else short_repr(item, 120)
                failure = _failure(error, stage, builder.request, index, text)
                if self.on_error == "raise":
                    raise sample_error(failure, error) from error
                builder.failures[position] = failure
                if stage == "collate":
                    builder.keep_misfit(position, sample)
                return

    def _repair(self, builder: BatchBuilder, report_position: Callable[[int], None], seed: Seeder | None) -> None:
        """Makes a whole batch of one in which samples failed, and says in the failures what is served in their place.

        Raises:
            SampleError: no sample is good, nor any of those that were tried in their place.
        """
        request, capacity = builder.request, builder.capacity
        if not builder.row_of:
            wanted = capacity if self.on_error == "replace" else 1
            for position, index in enumerate(self._substitutes(request), capacity):
                if len(builder.row_of) + len(builder.misfits) == wanted:
                    break
                key = Key(Stream.SUBSTITUTE, self.seed, request.epoch, index, request.batch)
                report_position(position)
                self._add_sample(builder, position, index, key, seed)
        if not builder.row_of:
            tried = len(builder.failures) - capacity
            others = f", and {tried} others of the epoch that were tried in their place" if tried else ""
            note = f" (all {capacity} samples of the batch failed{others}; this was the last)"
            raise sample_error(builder.failures[max(builder.failures)], None, note)
        for position, error in builder.use_majority().items():
            index = self.index_at(request, position)
            builder.failures[position] = _failure(error, "collate", request, index, self._describe_item(index))
        for position, served in builder.fill_rows().items():
            if (failure := builder.failures.get(position)) is not None:
                replaced_by = self.index_at(request, served)
                builder.failures[position] = dataclasses.replace(failure, replaced_by=replaced_by)

    def _substitutes(self, request: Request) -> list[int]:
        """Source indices of what may be served where all samples of a batch fail, in an order of their own."""
        own = {int(index) for index in request.samples}
        others = range(len(self.source)) if request.substitutes is None else request.substitutes
        root = seed_sequence(Stream.SUBSTITUTES, self.seed, request.epoch, int(request.samples[0]), request.batch)
        count = min(len(others), _MAX_SUBSTITUTES + len(own))
        chosen = np.random.Generator(np.random.PCG64(root)).choice(len(others), count, replace=False)
        drawn = [index for number in chosen.tolist() if (index := int(others[number])) not in own]
        return drawn[:_MAX_SUBSTITUTES]

    def _describe_item(self, index: int) -> str:
        """What the source holds there, in words."""
        try:
            return short_repr(self.source[index], 120)
        except (Exception, SystemExit) as error:
            return f"not read a second time: {type(error).__name__}"

    def _finish(self, builder: BatchBuilder, seed: Seeder | None) -> Any:
        request, stage = builder.request, "collate"
        try:
            key = Key(Stream.BATCH, self.seed, request.epoch, request.batch) if self.runs_user_code else None
            if seed is not None and key is not None:
                seed(key)
            batch = builder.finish()
            if self.batch_transform is not None:
                _check_batch(batch, stage)
                stage = "batch_transform"
                rng = {"rng": key.generator()} if self._batch_transform_takes_rng and key else {}
                batch = self.batch_transform(batch, **rng)
            return _check_batch(batch, stage)
        except (Exception, SystemExit) as error:
            raise _batch_error(error, stage, request) from error


@dataclasses.dataclass
class BatchLoader(Loader):
    """Loads a batch from an object whose `[i]` is a whole batch already."""

    source: Any
    seed: int = 0
    retries: int = 0
    runs_user_code = True

    def load(self, request: Request, report_position: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """Loads one batch; its position is that of the one sample."""
        report_position(0)
        attempts = self.retries
        while True:
            try:
                if seed is not None:
                    seed(Key(Stream.BATCH, self.seed, request.epoch, request.batch))
                return Loaded(_check_batch(self.source[request.samples[0]], "source"), ())
            except (Exception, SystemExit) as error:
                if attempts == 0:
                    raise _batch_error(error, "source", request) from error
                attempts -= 1


def _check_batch(batch: Any, stage: str) -> Any:
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
