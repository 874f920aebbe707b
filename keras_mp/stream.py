"""Samples that cannot be asked for by number, read from shards one after the other: `StreamDataset`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from keras_mp import checks
from keras_mp.callers import current_call, is_keras
from keras_mp.engines.choice import EngineChoice, Pool, Running
from keras_mp.engines.lanes import LaneEngine
from keras_mp.engines.measure import measure_lengths
from keras_mp.errors import warn_user
from keras_mp.loaded import LoadedDataset
from keras_mp.loading.lane_reader import CountedShards, check_read
from keras_mp.loading.loader import OnError
from keras_mp.loading.stream_loader import StreamLoader
from keras_mp.memory.pickling import dump_user_object
from keras_mp.plan.batching import ENDLESS
from keras_mp.plan.course import Course
from keras_mp.plan.lanes import Checkpoint, LanePlan
from keras_mp.plan.passes import Asked
from keras_mp.plan.progress import Progress


class StreamDataset(LoadedDataset):
    """Samples that are read one after the other, from tar files, Parquet, JSON lines, logs, or generators without end.

    A fixed number of lanes each read some of the shards, and take turns in making batches. So the data depends on the
    shards, `seed`, `lanes` and the epoch alone, not on the number of workers nor on what becomes of them. See
    docs/streams.md.

    Args:
        shards: what is read: a list of paths, or of anything that can be pickled. More shards than workers, please.
        read: shard -> iterator of its samples, the same ones each time; runs in a worker. With a parameter named
            `start`, it is called with the number of samples to leave out, where that is cheaper than reading them.
        transform: sample -> x, (x, y), ..., as for `PoolDataset`; `rng` depends on (seed, epoch, shard, place in it).
        batch_size: samples in a batch.
        shuffle: how many samples of a lane are shuffled with each other, in blocks; the order of the shards is
            shuffled too. Each lane holds a block of samples in memory, as `read` gave them. 0: nothing is shuffled.
        lanes: how many. A worker can be busy with one lane at a time, so have as many as workers, or more.
        length: samples in an epoch, for `len()`, progress bars and `fit(dataset)` without `steps_per_epoch`; `count()`
            finds it. None: not known, or endless.
        seed: root of all randomness. None: drawn once, shown in `repr`.
        drop_remainder: leave out the last batch if it is not full.
        collate, batch_transform, workers, use_multiprocessing, max_queue_size, max_queue_bytes: as for `PoolDataset`.
        on_error: what a failing sample does, as for `PoolDataset`. Where `read` fails and this is not "raise", the rest
            of that shard is left out, and listed as one failure.
        max_failures: as for `PoolDataset`; a share (float) needs `length`.
        retries: how often a failing sample is tried again, and a failing shard opened again, first.
        timeout: seconds that one batch may take in a worker, with the reading of a block of samples.
        pool: as for `PoolDataset`, but not "keras".

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        KerasMPError: a function cannot be sent to worker processes.
    """

    def __init__(
        self,
        shards: Any,
        read: Callable[..., Any],
        transform: Callable[..., Any] | None = None,
        *,
        batch_size: int = 32,
        shuffle: int = 0,
        lanes: int = 16,
        length: int | None = None,
        seed: int | None = None,
        drop_remainder: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_transform: Callable[..., Any] | None = None,
        workers: int | Literal["auto"] | None = None,
        use_multiprocessing: bool = True,
        max_queue_size: int | None = None,
        max_queue_bytes: int | None = None,
        on_error: OnError = "raise",
        max_failures: float | None = None,
        retries: int = 0,
        timeout: float | None = None,
        pool: Pool = None,
    ) -> None:
        count = checks.check_source(shards, "shards")
        checks.check_choice(on_error, "on_error", ("raise", "skip", "replace"))
        if isinstance(shuffle, bool):
            raise TypeError(
                f"shuffle must be the number of samples that are shuffled with each other, got {shuffle}; pass, say, "
                "shuffle=1000, or 0"
            )
        block = checks.check_count(shuffle, "shuffle", 0)
        declared = checks.check_count_or_none(length, "length")
        limit = checks.check_max_failures(max_failures)
        if isinstance(limit, float) and declared is None:
            raise ValueError(f"max_failures={limit} is a share of the epoch, which needs length=; pass it, or a count")
        choice = EngineChoice.of(workers, use_multiprocessing, pool, timeout, max_queue_size, max_queue_bytes)
        if choice.by_keras:
            raise ValueError(
                "pool='keras' has each batch asked for by its number in another process, and a stream has none; leave "
                "out pool="
            )
        loader = StreamLoader(
            shards,
            checks.check_callable(transform, "transform"),
            checks.check_callable(collate, "collate"),
            checks.check_callable(batch_transform, "batch_transform"),
            checks.check_seed(seed),
            on_error,
            checks.check_count(retries, "retries", 0),
            read=check_read(read),
            lanes=checks.check_count(lanes, "lanes"),
            block=block,
        )
        plan = LanePlan(
            ENDLESS if declared is None else declared,
            checks.check_count(batch_size, "batch_size"),
            block > 0,
            loader.seed,
            bool(drop_remainder),
            shards=count,
            lanes=loader.lanes,
            block=block,
        )
        plan.check()
        super().__init__(loader, plan, choice, seed_is_drawn=seed is None, max_failures=limit)
        if choice.shares_pool:
            functions = {"read": read, "transform": transform, "collate": collate, "batch_transform": batch_transform}
            for name, function in functions.items():
                dump_user_object(function, name, [])

    def __len__(self) -> int:
        """Number of batches in the current epoch: in a resumed one, those that were left.

        Raises:
            TypeError: the stream was made without `length`.
        """
        if not self._plan.counts_batches:
            raise TypeError(
                "this StreamDataset was made with length=None, so it has no len(); pass length=, the samples in an "
                "epoch, which count() finds, or give fit() steps_per_epoch="
            )
        return super().__len__()

    def count(self) -> int:
        """How many samples the shards have, found by reading all of them once, on this dataset's workers.

        Nothing is transformed. With `on_error="raise"` a shard that fails is an error; else what it gave before counts.
        Of a `read` without end it does not return.

        Returns:
            The number, for `length=`.

        Raises:
            SampleError: a shard failed.
            PoolClosed: the dataset was closed.
        """
        self._check_open()
        loader = self._stream_loader
        counted = CountedShards(loader.shards(), loader.on_error != "raise")
        return int(measure_lengths(counted, len(loader.source), self._choice, loader.seed, loader.retries, 1).sum())

    def shard(self, num_shards: int | None = None, index: int | None = None) -> StreamDataset:
        """This process's part of the stream, for data-parallel training: the lanes index, index + num_shards, ...

        With a declared `length`, each trainer has length // (num_shards * batch_size) batches, though nobody knows how
        many samples its lanes have. Where they have more, the rest is left out of that epoch; where they have less, the
        first batches of its lanes come again, with other random numbers. Without `length` a trainer's epoch ends where
        its lanes end: `fit(dataset, steps_per_epoch=...)` has all take as many steps, the next epoch following.

        Args:
            num_shards: number of parts, which divides `lanes`. None, together with `index`: as many as there are
                processes that train together, as for `PoolDataset.shard`.
            index: which one, from 0.

        Raises:
            TypeError: one of them is missing.
            ValueError: the index is out of range, or the lanes, shards or samples cannot be divided into so many parts.
        """
        return super().shard(num_shards, index)

    # -- where it is ---------------------------------------------------------------------------------------------

    def state_of(self, progress: Progress) -> dict[str, Any]:
        plan, course = self._lane_plan, self._course
        with course.lock:
            progress = course.place(plan, progress)
            first = min(progress.missing | {progress.position})
            checkpoint = course.nearest(plan, progress.epoch, first)
        return {**super().state_of(progress), "stream": checkpoint.dump()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        plan, course = self._lane_plan, self._course
        checkpoint = Checkpoint.load(state.get("stream"), plan)
        with course.lock:
            course.clear()
            course.set(plan, state["epoch"], checkpoint)
        if self._runtime is not None and isinstance(self._runtime.engine, LaneEngine):
            self._runtime.engine.forget()

    load_state_dict.__doc__ = LoadedDataset.load_state_dict.__doc__

    @property
    def _lane_plan(self) -> LanePlan:
        plan = self._position.plan
        if not isinstance(plan, LanePlan):
            raise TypeError("a stream's plan is one of lanes")
        return plan

    @property
    def _stream_loader(self) -> StreamLoader:
        loader = self._loader
        if not isinstance(loader, StreamLoader):
            raise TypeError("a stream's loader is one of lanes")
        return loader

    def _make_runtime_state(self) -> None:
        super()._make_runtime_state()
        self._course = Course()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_course")
        return state

    def _running(self) -> Running:
        with self._lock:
            is_new = self._runtime is None
            running = super()._running()
            if is_new:
                running.engine = LaneEngine(running.engine, self._lane_plan.for_share((1, 0)), self._course)
            return running

    def _place_of(self, epoch: int, place: int) -> tuple[int, int]:
        if self._plan.counts_batches:
            return epoch, place
        with self._course.lock:
            return self._course.locate(self._lane_plan, epoch, place, ENDLESS)

    def _follow(self, asked: Asked) -> None:
        """A pass of Keras's goes on over the ends of epochs: the current one is the one that it is in."""
        if asked.run is None or not asked.counts or self._plan.counts_batches:
            return
        epoch, before = self._place_of(asked.run.progress.epoch, asked.position)[0], self._position.epoch
        if epoch > before:
            self._position.claim(epoch - before)
            self._say_what_came_of(before)

    def on_epoch_begin(self) -> None:
        """Keras calls this before an epoch.

        Raises:
            ValueError: it would never end: the stream has no `length`, and `fit` was given no `steps_per_epoch`.
            RuntimeError: another call of Keras's is in the middle of a pass over this dataset.
        """
        call = current_call() if is_keras(sys._getframe(1), self) else None
        if call is not None and not call.steps and not self._plan.counts_batches:
            steps = "steps_per_epoch" if call.name == "fit" else "steps"
            raise ValueError(
                f"{call.name}() would never end: this StreamDataset was made with length=None, and {steps}="
                f"{call.steps!r} was received. Pass {steps}=, or make the dataset with length=, which count() finds, "
                f"or call {call.name}(dataset.to_tf_dataset()), which ends by itself"
            )
        super().on_epoch_begin()

    def _say_what_came_of(self, epoch: int | None) -> None:
        super()._say_what_came_of(epoch)
        engine = None if self._runtime is None else self._runtime.engine
        if isinstance(engine, LaneEngine):
            for told in [told for told in list(engine.too_long) if epoch in (None, told)]:
                warn_user(engine.too_long.pop(told))

    @property
    def batch_axis(self) -> int | None:
        plan, loader = self._plan, self._stream_loader
        return None if loader.on_error == "skip" or not loader.stacks else plan.uniform_size

    def __repr__(self) -> str:
        plan = self._lane_plan
        shard = f", shard={plan.shard} of {plan.num_shards}" if plan.num_shards > 1 else ""
        samples = f"{plan.length} samples, {plan.num_batches} batches" if plan.counts_batches else "batches"
        return (
            f"StreamDataset({plan.shards} shards, {plan.lanes} lanes, {samples} of {plan.batch_size}, "
            f"shuffle={plan.block}, seed={plan.seed}, epoch={self.epoch}, {self._where}{shard})"
        )
