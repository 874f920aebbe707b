"""What a dataset has done so far, in numbers: `Stats`. The sentences and pictures made of them are in `report`."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from keras_mp.loading.base import Loaded
from keras_mp.loading.recording import Recorder
from keras_mp.loading.timing import STAGES, SlowSample, WorkTotals
from keras_mp.plan.request import Request
from keras_mp.trace import Trace

KERAS_POOL = "Keras's pool"  # the engine's name where Keras runs it, in processes whose numbers do not come back


@dataclasses.dataclass(frozen=True)
class StageStats:
    """One stage of the work on samples or batches.

    Attributes:
        total_s: seconds spent in it, by all workers together.
        mean_s: of these, on each batch.
        slowest: the slowest samples, slowest first; none where it is timed by the batch.
    """

    total_s: float = 0.0
    mean_s: float = 0.0
    slowest: tuple[SlowSample, ...] = ()


@dataclasses.dataclass(frozen=True)
class Training:
    """What `PipelineMonitor` has measured of the training on a dataset in its last epoch.

    Attributes:
        epoch: of Keras's counting.
        batches: trained on.
        elapsed_s: how long that took.
        wait_s: how long of this no batch was there to train on.
        step_s: how long a step took once its batch was there: the median.
        stats: of the dataset, in that time.
    """

    epoch: int
    batches: int
    elapsed_s: float
    wait_s: float
    step_s: float
    stats: Stats

    @property
    def wait_fraction(self) -> float:
        """Share of the time that the training waited for data, from 0 to 1."""
        return min(1.0, self.wait_s / self.elapsed_s) if self.elapsed_s else 0.0

    @property
    def samples_per_second(self) -> float:
        """Samples trained on per second, by the size of the batches that were loaded in that time."""
        size = self.stats.samples / max(1, self.stats.loaded_batches)
        return self.batches * size / self.elapsed_s if self.elapsed_s else 0.0


@dataclasses.dataclass(frozen=True)
class Stats:
    """Numbers of a dataset, from its first batch on, or between two moments (`since=`).

    `stats["name"]` is `stats.name`.

    Attributes:
        engine: where batches are loaded.
        epoch: the current one.
        elapsed_s: the time that the numbers are of, in seconds.
        batches: taken by whoever trains or iterates.
        loaded_batches: loaded, those included that nobody has taken yet.
        samples: in these.
        bytes: of the arrays in these.
        failures: samples that failed.
        retries: how often a failing sample was tried again.
        cache_hits: samples that the cache had.
        cache_misses: samples that had to be loaded.
        cache_bytes: bytes that it has, now.
        wait_s: how long whoever took batches waited for them, in seconds.
        first_wait_s: of this, for the first batch of each pass or iteration, for which little or nothing was ready.
        used_s: how long whoever took batches was busy with them, from each to asking for the next, within an epoch.
        steps: how many such times that is the sum of.
        wait_is_of_training: whether that is the training itself, or a loop. In `fit` on TensorFlow, and in an export,
            it is a thread of TensorFlow's, which waits longer: `PipelineMonitor` knows what the training waited.
        queue_s: how long batches waited for a worker, summed over batches.
        work_s: how long workers were at batches, summed over workers.
        cpu_s: processor time of that.
        process_cpu_s: processor time of this process, the training included, since the first batch was asked for.
        stages: by name: "source" (`source[i]`), "load", "cache", "transform", "collate", "batch_transform", "write".
        workers: how many there are to be.
        pids: process ids of those that run.
        busy_s: of each of these, seconds at batches; with a pool that datasets share, at those of all of them.
        ready_s: of each of these, seconds since it was ready.
        pool_busy_s: as `busy_s`, of all workers together, those included that have ended.
        pool_ready_s: as `ready_s`, of all of these.
        restarts: workers that had to be replaced.
        timeouts: of these, those that were ended because a batch took too long.
        queued: batches that wait for a worker, now.
        running: batches that are with one, now.
        slots: pieces of shared memory for batches, now.
        slot_bytes: their bytes, now.
    """

    engine: str = "not started"
    epoch: int = 0
    elapsed_s: float = 0.0
    batches: int = 0
    loaded_batches: int = 0
    samples: int = 0
    bytes: int = 0
    failures: int = 0
    retries: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes: int = 0
    wait_s: float = 0.0
    first_wait_s: float = 0.0
    used_s: float = 0.0
    steps: int = 0
    wait_is_of_training: bool = True
    queue_s: float = 0.0
    work_s: float = 0.0
    cpu_s: float = 0.0
    process_cpu_s: float = 0.0
    stages: dict[str, StageStats] = dataclasses.field(default_factory=dict)
    workers: int = 0
    pids: tuple[int, ...] = ()
    busy_s: tuple[float, ...] = ()
    ready_s: tuple[float, ...] = ()
    pool_busy_s: float = 0.0
    pool_ready_s: float = 0.0
    restarts: int = 0
    timeouts: int = 0
    queued: int = 0
    running: int = 0
    slots: int = 0
    slot_bytes: int = 0

    @property
    def worker_busy_fraction(self) -> float:
        """Share of the workers' time that they were at batches, from 0 to 1; 0 where nothing is known of it."""
        if self.pool_ready_s:
            return min(1.0, self.pool_busy_s / self.pool_ready_s)
        ready = self.elapsed_s * max(1, self.workers)
        return min(1.0, self.work_s / ready) if ready else 0.0

    @property
    def service_s(self) -> float:
        """Seconds that one worker needs for one batch, on average."""
        return self.work_s / self.loaded_batches if self.loaded_batches else 0.0

    @property
    def use_s(self) -> float:
        """Seconds from taking a batch to asking for the next, on average: a step of the training, or of a loop."""
        return self.used_s / self.steps if self.steps else 0.0

    @property
    def batch_wait_s(self) -> float:
        """Seconds that whoever took a batch waited for it, on average, the first ones of passes left out."""
        return max(0.0, self.wait_s - self.first_wait_s) / self.steps if self.steps else 0.0

    def __getitem__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise KeyError(name)
        return getattr(self, name)

    def since(self, earlier: Stats) -> Stats:
        """The difference to `earlier`: counts and seconds since then, and what is now as it is now.

        Raises:
            TypeError: `earlier` is no `Stats`.
        """
        if not isinstance(earlier, Stats):
            raise TypeError(f"since must be what stats() returned before, got {type(earlier).__name__}")
        change: dict[str, Any] = {name: getattr(self, name) - getattr(earlier, name) for name in _SUMS}
        batches = max(1, change["loaded_batches"])
        stages = {}
        for name, stage in self.stages.items():
            before = earlier.stages.get(name, StageStats())
            total = stage.total_s - before.total_s
            new = tuple(sample for sample in stage.slowest if sample not in before.slowest)
            stages[name] = StageStats(total, total / batches, new)
        for name in ("busy_s", "ready_s"):
            then = dict(zip(earlier.pids, getattr(earlier, name), strict=True))
            now = zip(self.pids, getattr(self, name), strict=True)
            change[name] = tuple(value - then.get(pid, 0.0) for pid, value in now)
        return dataclasses.replace(self, stages=stages, **change)


class HandedOut:
    """When the batches of passes and exports were handed out, the last of them."""

    def __init__(self) -> None:
        self.count = 0
        self._times: collections.deque[float] = collections.deque(maxlen=_MAX_TIMES)

    def add(self, of_a_pass: bool = True) -> None:
        """One is handed out now; what is no batch of a pass, or export, is left out."""
        if of_a_pass:
            self._times.append(time.monotonic())
            self.count += 1

    def time(self, number: int) -> float | None:
        """When batch `number`, from 0, was handed out, in seconds of `time.monotonic`; None if that is not known."""
        index = number - (self.count - len(self._times))
        return self._times[index] if 0 <= index < len(self._times) else None


class ServedSoFar:
    """What has been taken from a dataset so far, and what that took.

    Attributes:
        batches: how many.
        wait_s: how long whoever took them waited, in seconds.
        first_wait_s, used_s, steps, wait_is_of_training: see `Stats`.
        training: what `PipelineMonitor` has measured last.
        handed_out: when batches of passes and exports were.
        recorder: gets what happens when, where there is a timeline of it.
        trace: that timeline, the last one.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.trace: Trace | None = None
        self.batches = 0
        self.wait_s = self.first_wait_s = self.used_s = 0.0
        self.steps = 0
        self.wait_is_of_training = True
        self.training: Training | None = None
        self.handed_out = HandedOut()
        self._started_at: float | None = None
        self._cpu_at_start_s = 0.0
        self._taken_at: float | None = None  # when the last batch was, while the next one of the same pass may follow
        self._final: Stats | None = None
        self._work = WorkTotals()

    def start(self) -> None:
        """The first batch is about to be asked for."""
        if self._started_at is None:
            self._started_at = time.monotonic()
            self._cpu_at_start_s = time.process_time()

    def begin(self, wait_is_of_training: bool, is_first: bool = True) -> None:
        """Somebody is about to take a batch, maybe the first one of a pass or an iteration."""
        self.wait_is_of_training = wait_is_of_training
        if is_first:
            self._taken_at = None

    def end(self, stats: Stats) -> None:
        """The dataset is closed: `stats`, its last numbers, are those of now from now on."""
        self._final = dataclasses.replace(stats, queued=0, running=0, slots=0, slot_bytes=0)

    def mark(self, request: Request) -> Request:
        """The request as it is to be asked for: with a timeline, if there is one."""
        return request if self.recorder.recording is None else request._replace(traced=True)

    def serve(self, key: tuple[int, int], load: Callable[..., Loaded], *arguments: Any) -> Loaded:
        """Calls `load`, which waits for the batch of that epoch and number."""
        began, before, self._taken_at = time.monotonic(), self._taken_at, None
        if before is not None:
            self.used_s += began - before
            self.steps += 1
        try:
            loaded = load(*arguments)
        except Exception as error:
            self.recorder.add_wait(*key, began, type(error).__name__)
            raise
        self._taken_at = now = time.monotonic()
        self.wait_s += now - began
        self.batches += 1
        if before is None:
            self.first_wait_s += now - began
        self.recorder.add_wait(*key, began)
        if loaded.work is not None:
            self._work.add(loaded.work, loaded.nbytes or 0)
            self.recorder.add(loaded.work.events)
        return loaded

    def write_trace(self) -> None:
        """Writes what there is of the timeline to its file; that fails with a warning."""
        if self.trace is not None:
            self.trace.update()

    def stats(self, engine: dict[str, Any], **numbers: Any) -> Stats:
        """The numbers of now.

        Args:
            engine: those of the engine; with "work" among them, if that keeps count of it.
            numbers: further fields.
        """
        if self._final is not None:
            return self._final
        work: WorkTotals = engine.get("work", self._work)
        batches = max(1, work.batches)
        stages = {
            name: StageStats(total, total / batches, tuple(work.slowest.get(name, ())))
            for name, total in zip(STAGES, work.seconds, strict=True)
        }
        return Stats(
            **{name: value for name, value in engine.items() if name in _FIELDS},
            elapsed_s=0.0 if self._started_at is None else time.monotonic() - self._started_at,
            **{name: getattr(self, name) for name in _OF_WHO_TAKES},
            loaded_batches=work.batches,
            samples=work.samples,
            bytes=work.nbytes,
            retries=work.retries,
            cache_hits=work.hits,
            cache_misses=work.misses,
            queue_s=work.queued_s,
            work_s=work.total_s,
            cpu_s=work.cpu_s,
            process_cpu_s=0.0 if self._started_at is None else time.process_time() - self._cpu_at_start_s,
            stages=stages,
            **numbers,
        )


_MAX_TIMES = 1 << 16  # enough for an epoch of so many steps
_OF_WHO_TAKES = ("batches", "wait_s", "first_wait_s", "used_s", "steps", "wait_is_of_training")
_FIELDS = frozenset(field.name for field in dataclasses.fields(Stats))
_SUMS = (
    "elapsed_s",
    "batches",
    "loaded_batches",
    "samples",
    "bytes",
    "failures",
    "retries",
    "cache_hits",
    "cache_misses",
    "wait_s",
    "first_wait_s",
    "used_s",
    "steps",
    "queue_s",
    "work_s",
    "cpu_s",
    "process_cpu_s",
    "pool_busy_s",
    "pool_ready_s",
    "restarts",
    "timeouts",
)
