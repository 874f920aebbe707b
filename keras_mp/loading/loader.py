"""From a request to a batch: read the samples, transform, collate. The same code in a worker, a thread or in-process.

A loader is what travels to the workers, once. A request says which batch of which epoch is wanted and which samples
make it; the result depends on nothing else (P2). Failures follow the error policy here, so a failed sample is either
raised or part of the result (P5). A batch none of whose samples is good is made of samples from elsewhere in the epoch,
drawn from (seed, epoch, batch): Keras waits for ever for a batch that does not come.

What the transform gets from an array or a list is its own copy: it may write into it, and the source stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from keras_mp.checks import length_of
from keras_mp.errors import SampleFailure, sample_error, short_repr
from keras_mp.loading.base import NOT_READ, SAMPLES_DONE, Loaded, Loader, Place, batch_error, check_batch, failure_of
from keras_mp.loading.builder import BatchBuilder
from keras_mp.loading.cache import SampleCache
from keras_mp.loading.collate import copied
from keras_mp.loading.padding import Padding
from keras_mp.loading.randomness import Key, Seeder, takes_rng
from keras_mp.loading.timing import BATCH_TRANSFORM, CACHE, COLLATE, LOAD, SOURCE, STAGES, TRANSFORM, StageTimes
from keras_mp.memory.files import Descriptor
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream, seed_sequence
from keras_mp.plan.views import is_in_memory, is_plain

OnError = Literal["raise", "skip", "replace"]

# So many samples from elsewhere are tried for a batch without a good one: where one in twenty is good, all of them fail
# in one such batch of half a million.
_MAX_SUBSTITUTES = 256


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
        load_sample: item of the source -> sample, before `transform`; or None.
        cache: keeps what that gave, or without it the item; or None.
    """

    source: Any
    transform: Callable[..., Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    batch_transform: Callable[..., Any] | None = None
    seed: int = 0
    on_error: OnError = "raise"
    retries: int = 0
    load_sample: Callable[..., Any] | None = None
    cache: SampleCache | None = None

    def __post_init__(self) -> None:
        self._namespace = b""
        self._transform_takes_rng = takes_rng(self.transform)
        self._batch_transform_takes_rng = takes_rng(self.batch_transform)
        functions = bool(self.transform or self.collate or self.batch_transform or self.load_sample)
        self.runs_user_code = functions or self.cache is not None or not is_plain(self.source)

    def __getstate__(self) -> dict[str, Any]:  # for a copy too; so whoever loads has the mark of what the code is now
        state = super().__getstate__()
        if self.cache is not None:
            state["_namespace"] = self.cache.namespace(self.load_sample, self.source)
        return state

    def open(self) -> None:
        if self.cache is not None:
            self.cache.open()

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def descriptors(self) -> list[Descriptor]:
        return [] if self.cache is None else self.cache.descriptors()

    def attach(self, fds: Sequence[int]) -> None:
        if self.cache is not None:
            self.cache.attach(fds)

    @property
    def has_numbered_samples(self) -> bool:
        """Whether `source[index]` is a sample, which a request names by that number."""
        return True

    @functools.cached_property
    def copies_items(self) -> bool:
        """Whether an item may be memory of the source itself, and is given to code that may write into it."""
        return is_in_memory(self.source) and bool(self.transform or self.load_sample or not self.stacks)

    @property
    def stacks(self) -> bool:
        """Whether samples are made a batch by code of ours, whose arrays nobody else holds."""
        return self.collate is None or isinstance(self.collate, Padding)

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """A batch without a good sample is made of others, and fails only if they do too."""
        times.begin_batch(request.epoch, request.batch, len(request.samples))
        return self.make(request, report_position, seed, times)

    def make(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """`load`, for a batch that has been begun."""
        builder = BatchBuilder(request, self.collate, self.on_error == "replace")
        timed = times if self.runs_user_code else None  # else a sample takes less than to time it
        for position, index in enumerate(request.samples):
            repeat = request.repeats[position] if request.repeats else 0
            key = self.key_of(Stream.SAMPLE, request.epoch, int(index), repeat) if self.runs_user_code else None
            report_position(position)
            self._add_sample(builder, position, int(index), key, seed, timed)
        if builder.failures:
            self._repair(builder, report_position, seed, timed)
        report_position(SAMPLES_DONE)
        if timed is not None:
            times.end_sample()
        return Loaded(self._finish(builder, seed, times), builder.reported_failures())

    def key_of(self, stream: Stream, epoch: int, index: int, repeat: int) -> Key:
        """The randomness of a sample."""
        return Key(stream, self.seed, epoch, index, repeat)

    def batch_key(self, request: Request) -> Key:
        """The randomness of a batch."""
        return Key(Stream.BATCH, self.seed, request.epoch, request.batch)

    def number_of(self, index: int) -> int:
        """What a failure names a sample by."""
        return index

    def failure(self, error: BaseException, stage: str, request: Request, index: int, item: str) -> SampleFailure:
        """The record of a failed sample."""
        return failure_of(error, stage, request, index, item)

    def index_at(self, request: Request, position: int) -> int:
        """Source index of the sample at a position of the request, be it a substitute's."""
        own = len(request.samples)
        return int(request.samples[position] if position < own else self.substitutes(request)[position - own])

    def _add_sample(
        self,
        builder: BatchBuilder,
        position: int,
        index: int,
        key: Key | None,
        seed: Seeder | None,
        times: StageTimes | None,
    ) -> None:
        """Reads and transforms one sample, and adds it to the batch, or its failure.

        Raises:
            SampleError: it failed, and the policy is "raise".
        """
        if position in builder.failures:  # known beforehand
            return
        attempts = self.retries
        while True:
            at = Place()
            sample = None
            if times is not None:
                times.item = at.item
                times.begin_sample(index)
            try:
                sample = self._read(at, index, key, seed, times)
                at.stage = "transform"
                if self.transform is not None:
                    rng = {"rng": key.generator()} if self._transform_takes_rng and key else {}
                    sample = self.transform(sample, **rng)
                    if times is not None:
                        times.lap(TRANSFORM)
                at.stage = "collate"
                builder.add(position, sample)
                if times is not None:
                    times.lap(COLLATE)
                return
            except (Exception, SystemExit) as error:
                if times is not None:
                    times.lap(STAGES.index(at.stage))
                if attempts > 0:
                    attempts -= 1
                    if times is not None:
                        times.retries += 1
                    continue
                item = self.item_in_words(at, index)
                failure = self.failure(error, at.stage, builder.request, index, item)
                if self.on_error == "raise":
                    raise sample_error(failure, error) from error
                builder.failures[position] = failure
                if at.stage == "collate":
                    builder.keep_misfit(position, sample)
                return

    def _read(self, at: Place, index: int, key: Key | None, seed: Seeder | None, times: StageTimes | None) -> Any:
        """The sample that `transform` gets: from the source and `load`, or what they gave before.

        `load` finds the random generators the same in every epoch, and `transform` as if there were neither it nor a
        cache (P2).
        """
        load, cache = self.load_sample, self.cache
        if seed is not None and key is not None:
            seed(key if load is None else Key(Stream.LOAD, self.seed, 0, index))
        sample = None if load is None and cache is not None else self.read_item(at, index, times)
        if cache is None and load is None:
            return sample
        place = b""
        if cache is not None:
            at.stage = "cache"
            place = cache.key(self._namespace, index, at.item, load is not None)
            found = cache.get(index, place)
            if times is not None:
                times.hits += found is not None
                times.misses += found is None
                times.lap(CACHE)
            if found is not None:
                (sample,) = found
                self._seed_again(key, seed)
                return sample
            if load is None:
                sample = self.read_item(at, index, times)
        if load is not None:
            at.stage = "load"
            sample = load(sample)
            if sample is None:
                raise TypeError("load returned None; did it forget to return the sample?")
            if times is not None:
                times.lap(LOAD)
        if cache is not None:
            at.stage = "cache"
            refusal = cache.put(index, place, sample)
            if times is not None:
                times.cache_refusal = times.cache_refusal or refusal
                times.lap(CACHE)
        self._seed_again(key, seed)
        return sample

    def read_item(self, at: Place, index: int, times: StageTimes | None) -> Any:
        """What the source holds there; a copy if it may be its own memory."""
        at.stage = "source"
        at.item = self.source[index]
        item = copied(at.item) if self.copies_items else at.item
        if times is not None:
            times.item = at.item
            times.lap(SOURCE)
        return item

    def _seed_again(self, key: Key | None, seed: Seeder | None) -> None:
        if seed is not None and key is not None:
            seed(key)

    def item_in_words(self, at: Place, index: int) -> str:
        if at.stage == "source":
            return NOT_READ
        return self.describe_item(index) if at.item is NOT_READ else short_repr(at.item, 120)

    def _repair(
        self,
        builder: BatchBuilder,
        report_position: Callable[[int], None],
        seed: Seeder | None,
        times: StageTimes | None,
    ) -> None:
        """Makes a whole batch of one in which samples failed, and says in the failures what is served in their place.

        Raises:
            SampleError: no sample is good, nor any of those that were tried in their place.
        """
        request, capacity = builder.request, builder.capacity
        if not builder.row_of:
            wanted = capacity if self.on_error == "replace" else 1
            for position, index in enumerate(self.substitutes(request), capacity):
                if len(builder.row_of) + len(builder.misfits) == wanted:
                    break
                key = self.key_of(Stream.SUBSTITUTE, request.epoch, index, request.batch)
                report_position(position)
                self._add_sample(builder, position, index, key, seed, times)
        if not builder.row_of:
            tried = len(builder.failures) - capacity
            others = f", and {tried} others of the epoch that were tried in their place" if tried else ""
            note = f" (all {capacity} samples of the batch failed{others}; this was the last)"
            raise sample_error(builder.failures[max(builder.failures)], None, note)
        for position, error in builder.use_majority().items():
            index = self.index_at(request, position)
            item = self.describe_item(index)
            builder.failures[position] = self.failure(error, "collate", request, index, item)
        for position, served in builder.fill_rows().items():
            if (failure := builder.failures.get(position)) is not None:
                replaced_by = self.number_of(self.index_at(request, served))
                builder.failures[position] = dataclasses.replace(failure, replaced_by=replaced_by)

    def substitutes(self, request: Request) -> list[int]:
        """Source indices of what may be served where all samples of a batch fail, in an order of their own."""
        own = {int(index) for index in request.samples}
        others = range(length_of(self.source)) if request.substitutes is None else request.substitutes
        root = seed_sequence(Stream.SUBSTITUTES, self.seed, request.epoch, int(request.samples[0]), request.batch)
        count = min(len(others), _MAX_SUBSTITUTES + len(own))
        chosen = np.random.Generator(np.random.PCG64(root)).choice(len(others), count, replace=False)
        drawn = [index for number in chosen.tolist() if (index := int(others[number])) not in own]
        return drawn[:_MAX_SUBSTITUTES]

    def describe_item(self, index: int) -> str:
        """What the source holds there, in words."""
        try:
            return short_repr(self.source[index], 120)
        except (Exception, SystemExit) as error:
            return f"not read a second time: {type(error).__name__}"

    def _finish(self, builder: BatchBuilder, seed: Seeder | None, times: StageTimes) -> Any:
        request, stage = builder.request, "collate"
        try:
            key = self.batch_key(request) if self.runs_user_code else None
            if seed is not None and key is not None:
                seed(key)
            batch = builder.finish()
            times.lap(COLLATE)
            if self.batch_transform is not None:
                check_batch(batch, stage)
                stage = "batch_transform"
                rng = {"rng": key.generator()} if self._batch_transform_takes_rng and key else {}
                batch = self.batch_transform(batch, **rng)
                times.lap(BATCH_TRANSFORM)
            return check_batch(batch, stage)
        except (Exception, SystemExit) as error:
            raise batch_error(error, stage, request) from error
