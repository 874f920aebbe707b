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
from keras_mp.loading.recording import Event, Lane, own_lane

# In the order in which a sample, and then its batch, goes through them. "write": from the batch to shared memory.
STAGES = ("source", "load", "cache", "transform", "collate", "batch_transform", "write")
SOURCE, LOAD, CACHE, TRANSFORM, COLLATE, BATCH_TRANSFORM, WRITE = range(len(STAGES))

_log = logging.getLogger("keras_mp")  # for what a thread of ours has to say, where a warning would be an error to it

SLOWEST_KEPT = 5
_MAX_EVENTS = 1024  # of one batch


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
        events: for each batch that, and its stages, if that was asked for.
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
    events: tuple[Event, ...] = ()
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
        traced: keep every event, for a timeline.

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
        "_events",
        "_index",
        "_key",
        "_lane",
        "_last",
        "_limits",
        "_samples",
        "_seconds",
        "_slow",
        "_slowest",
        "_stages",
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
        self._events: list[Event] = []  # of the batches before this one; of this one, it comes first
        self._stages: list[Event] | None = [] if traced else None
        self._lane: Lane = own_lane() if traced else (0, 0)
        self._index = -1
        self._key = (0, 0)
        self._batches = self._samples = 0
        self._cpu = time.thread_time()
        self._begun = self._last = time.monotonic()

    def begin_batch(self, epoch: int, batch: int, samples: int) -> None:
        """What follows is for that batch."""
        self.end_batch()
        self._key = epoch, batch
        self._batches += 1
        self._samples += samples
        self.end_sample()
        if self._stages is not None:
            self._stages.append(Event(self._lane, "batch", f"batch {batch}", self._last, None, epoch, batch, samples))

    def end_batch(self) -> None:
        """What follows is for no batch."""
        if self._stages:
            batch, *stages = self._stages
            left_out = "" if len(stages) < _MAX_EVENTS else "of its samples only the first are shown"
            self._events.append(batch._replace(seconds=time.monotonic() - batch.begun, text=left_out))
            self._events += stages
            self._stages.clear()

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
        if self._stages is not None and (len(self._stages) <= _MAX_EVENTS or self._index < 0):
            self._stages.append(
                Event(self._lane, "stage", STAGES[stage], self._last, seconds, *self._key, number=self._index)
            )
        self._last = now

    def result(self) -> Work:
        """All of it, once the batches are made."""
        self.end_batch()
        return Work(
            self._batches,
            self._samples,
            self._begun,
            time.monotonic() - self._begun,
            time.thread_time() - self._cpu,
            tuple(self._seconds),
            self.retries,
            tuple(self._slow),
            tuple(self._events),
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
