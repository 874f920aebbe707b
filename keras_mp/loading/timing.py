"""Where the time of a batch went: seconds by stage, and the slowest samples of each. Always on, so it must cost little.

Samples are timed one by one only where code of the user's runs for them; a batch of rows of an array is timed whole.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any, NamedTuple

from keras_mp.errors import short_repr

# In the order in which a sample, and then its batch, goes through them. "write": from the batch to shared memory.
STAGES = ("source", "load", "cache", "transform", "collate", "batch_transform", "write")
SOURCE, LOAD, CACHE, TRANSFORM, COLLATE, BATCH_TRANSFORM, WRITE = range(len(STAGES))

_log = logging.getLogger("keras_mp")  # for what a thread of ours has to say, where a warning would be an error to it

SLOWEST_KEPT = 5
_MAX_SPANS = 1024  # of one batch


@dataclasses.dataclass(frozen=True)
class SlowSample:
    """One of the slowest samples of a stage.

    Attributes:
        seconds: what it took there.
        index: its index in the source.
        item: what the source holds there, in words.
        epoch, batch: where it was served.
        stage: which one.
    """

    seconds: float
    index: int
    item: str
    epoch: int
    batch: int
    stage: str


class Span(NamedTuple):
    """A stretch of a batch's time, for a timeline.

    Attributes:
        begun: in seconds of `time.monotonic`.
        seconds: its length.
        stage: index in `STAGES`.
        sample: its index in the source; -1: the whole batch.
    """

    begun: float
    seconds: float
    stage: int
    sample: int


class Work(NamedTuple):
    """What making a batch, or a few small ones, took.

    Attributes:
        batches: how many.
        samples: how many were asked for.
        begun: when it was begun, in seconds of `time.monotonic`.
        total_s: from its beginning to its end, what belongs to no stage included.
        cpu_s: processor time of the thread that made it.
        seconds: by stage, in the order of `STAGES`.
        retries: how often a failing one was tried again.
        slowest: samples that were among the slowest of their stage so far, where they were loaded.
        spans: what was done when, if that was asked for.
        hits, misses: samples that a cache had, and had not.
        cache_refusal: why it takes no more, in words; empty if it does.
    """

    batches: int
    samples: int
    begun: float
    total_s: float
    cpu_s: float
    seconds: tuple[float, ...]
    retries: int
    slowest: tuple[SlowSample, ...]
    spans: tuple[Span, ...] = ()
    hits: int = 0
    misses: int = 0
    cache_refusal: str = ""


class SlowestSamples:
    """What a sample must exceed to be among the slowest; kept by whoever loads several batches with one loader."""

    def __init__(self) -> None:
        self.limits = [0.0] * len(STAGES)
        self._kept: list[list[float]] = [[] for _ in STAGES]

    def add(self, stage: int, seconds: float) -> None:
        """Takes a sample's time into account."""
        kept = sorted([*self._kept[stage], seconds], reverse=True)[:SLOWEST_KEPT]
        self._kept[stage] = kept
        if len(kept) == SLOWEST_KEPT:
            self.limits[stage] = kept[-1]


class StageTimes:
    """A stopwatch for one batch, or a few small ones, used by the thread that makes them.

    Args:
        slowest: of the batches before.
        traced: keep every span, for a timeline.

    Attributes:
        item: what the source holds for the sample that is being timed.
        retries: how often a sample was begun again.
        hits, misses: samples that a cache had, and had not.
        cache_refusal: why it takes no more, in words; empty if it does.
    """

    __slots__ = (
        "_batches",
        "_begun",
        "_cpu",
        "_index",
        "_key",
        "_last",
        "_limits",
        "_samples",
        "_seconds",
        "_slow",
        "_slowest",
        "_spans",
        "cache_refusal",
        "hits",
        "item",
        "misses",
        "retries",
    )

    def __init__(self, slowest: SlowestSamples, traced: bool = False) -> None:
        self.item: Any = None
        self.retries = self.hits = self.misses = 0
        self.cache_refusal = ""
        self._seconds = [0.0] * len(STAGES)
        self._slowest, self._limits = slowest, slowest.limits
        self._slow: list[SlowSample] = []
        self._spans: list[Span] | None = [] if traced else None
        self._index = -1
        self._key = (0, 0)
        self._batches = self._samples = 0
        self._cpu = time.thread_time()
        self._begun = self._last = time.monotonic()

    def begin_batch(self, epoch: int, batch: int, samples: int) -> None:
        """What follows is for that batch."""
        self._key = epoch, batch
        self._batches += 1
        self._samples += samples
        self.end_sample()

    def begin_sample(self, index: int) -> None:
        """What follows is for the sample `index`."""
        self._index, self._last = index, time.monotonic()

    def end_sample(self) -> None:
        """What follows is for the batch as a whole."""
        self._index, self._last = -1, time.monotonic()

    def lap(self, stage: int) -> None:
        """The time since the last call of any of these went into `stage`."""
        now = time.monotonic()
        seconds = now - self._last
        self._seconds[stage] += seconds
        if seconds > self._limits[stage] and self._index >= 0:
            self._slowest.add(stage, seconds)
            self._slow.append(SlowSample(seconds, self._index, short_repr(self.item, 120), *self._key, STAGES[stage]))
        if self._spans is not None and len(self._spans) < _MAX_SPANS:
            self._spans.append(Span(self._last, seconds, stage, self._index))
        self._last = now

    def result(self) -> Work:
        """All of it, once the batches are made."""
        return Work(
            self._batches,
            self._samples,
            self._begun,
            time.monotonic() - self._begun,
            time.thread_time() - self._cpu,
            tuple(self._seconds),
            self.retries,
            tuple(self._slow),
            tuple(self._spans or ()),
            self.hits,
            self.misses,
            self.cache_refusal,
        )


class WorkTotals:
    """What all batches of a dataset took so far. Any thread may add to it.

    Attributes:
        batches, samples: how many were loaded, those included that nobody took.
        nbytes: of the batches' arrays.
        total_s, cpu_s, seconds, retries: sums of those of `Work`.
        queued_s: how long batches waited for a worker, in seconds.
        slowest: by stage, slowest first.
        hits, misses: sums of those of `Work`.
        cache_refusal: the first one; it is logged.
    """

    def __init__(self) -> None:
        self.batches = self.samples = self.retries = self.nbytes = self.hits = self.misses = 0
        self.cache_refusal = ""
        self.total_s = self.cpu_s = self.queued_s = 0.0
        self.seconds = [0.0] * len(STAGES)
        self.slowest: dict[str, list[SlowSample]] = {}
        self._lock = threading.Lock()

    def add(self, work: Work, nbytes: int = 0) -> None:
        """Adds what was loaded at once."""
        with self._lock:
            self.batches += work.batches
            self.samples += work.samples
            self.nbytes += nbytes
            self.total_s += work.total_s
            self.cpu_s += work.cpu_s
            self.retries += work.retries
            self._add_cache(work)
            for stage, seconds in enumerate(work.seconds):
                if seconds:
                    self.seconds[stage] += seconds
            for sample in work.slowest:
                kept = self.slowest.get(sample.stage, [])
                # A batch may have been loaded twice.
                others = [other for other in kept if other.index != sample.index or other.epoch != sample.epoch]
                ranked = sorted([*others, sample], key=lambda each: each.seconds, reverse=True)
                self.slowest[sample.stage] = ranked[:SLOWEST_KEPT]

    def _add_cache(self, work: Work) -> None:
        self.hits += work.hits
        self.misses += work.misses
        if work.cache_refusal and not self.cache_refusal:
            self.cache_refusal = work.cache_refusal
            _log.warning("keras_mp: %s. What it has not is loaded again whenever it is needed.", work.cache_refusal)
