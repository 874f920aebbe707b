"""The datasets that users make: `PoolDataset` from samples, `parallelize` from an object that gives whole batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

import keras

from keras_mp import checks
from keras_mp.batching import Batching
from keras_mp.epochs import EpochTracker
from keras_mp.loaded import LoadedDataset, Pool
from keras_mp.loading import BatchLoader, OnError, SampleLoader
from keras_mp.wire import dump_user_object

_STATE_VERSION = 1


class PoolDataset(LoadedDataset):
    """Samples and a function, loaded, preprocessed and batched by worker processes: a dataset for `model.fit`.

    Args:
        source: the samples: anything with `len()` and `[i]`: a list of paths, an array, a memmap, rows, a Hugging Face
            or torch dataset. Large arrays in it are shared with the workers, not copied to each; memmaps are opened
            again.
        transform: sample -> x, (x, y), (x, y, sample_weight), or any nest of arrays and scalars. Runs in a worker. A
            parameter named `rng` gets a `numpy.random.Generator` that depends on (seed, epoch, sample) only. It may
            write into a sample from an array or a list, which is a copy (what stands on a memmap is read-only). None:
            the sample as it is.
        batch_size: samples in a batch (on each shard).
        collate: list of samples -> batch. None: every leaf is stacked, straight into shared memory.
        batch_transform: batch -> batch, in the worker, after `collate`; `rng` as above, by (seed, epoch, batch).
        shuffle: a new permutation of the samples in every epoch.
        seed: root of all randomness. None: drawn once, shown in `repr`.
        drop_remainder: leave out the last batch if it is not full.
        workers: worker processes. None: the usable cores. 0: load in-process.
        use_multiprocessing: False: threads instead of processes.
        max_queue_size: batches in flight, those ready but not yet taken included.
        on_error: what a failing sample does: "raise"; "skip", leave it out, which makes the batch smaller; "replace",
            by the nearest good sample before it in the batch (or the first good one), which keeps the batch's shape.
            A batch without a good sample is made of samples from elsewhere in the epoch. Where shapes differ in a
            batch, those that are not like most of it have failed. So has a sample that ended two worker processes, or
            for which `timeout` was exceeded twice.
        max_failures: with "skip" or "replace", how many samples of an epoch may fail before `TooManyFailures` is
            raised: a count (int) or a share of the epoch (float).
        retries: how often a failing sample is tried again first.
        timeout: seconds that one batch may take in a worker process; after that the worker is replaced and the batch
            run again, once; then it is an error, or (see `on_error`) the sample is that took more than a quarter of
            the time. Threads and executors cannot be ended, so they have no such limit.
        pool: None: worker processes shared by all datasets with this number of them. A `WorkerPool`, or any
            `concurrent.futures.Executor`. "keras": Keras's own process pool runs `dataset[i]`.
        order: callable (epoch, rng) -> sample indices, for weighted or curriculum sampling, in place of `shuffle`. May
            be longer or shorter than the source, but of the same length in every epoch. A sample that comes again in an
            epoch gets other random numbers.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        KerasMPError: a function cannot be sent to worker processes.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[..., Any] | None = None,
        *,
        batch_size: int = 32,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_transform: Callable[..., Any] | None = None,
        shuffle: bool = False,
        seed: int | None = None,
        drop_remainder: bool = False,
        workers: int | None = None,
        use_multiprocessing: bool = True,
        max_queue_size: int = 10,
        on_error: OnError = "raise",
        max_failures: float | None = None,
        retries: int = 0,
        timeout: float | None = None,
        pool: Pool = None,
        order: Callable[..., Any] | None = None,
    ) -> None:
        length = checks.check_source(source)
        checks.check_choice(on_error, "on_error", ("raise", "skip", "replace"))
        if order is not None and shuffle:
            raise ValueError(
                "order= decides the order of samples, so shuffle=True has no meaning; leave one of them out"
            )
        loader: SampleLoader = SampleLoader(
            source,
            checks.check_callable(transform, "transform"),
            checks.check_callable(collate, "collate"),
            checks.check_callable(batch_transform, "batch_transform"),
            checks.check_seed(seed),
            on_error,
            checks.check_count(retries, "retries", 0),
        )
        plan = Batching(
            length,
            checks.check_count(batch_size, "batch_size"),
            bool(shuffle),
            loader.seed,
            bool(drop_remainder),
            order=checks.check_callable(order, "order"),
        )
        if plan.num_batches == 0:
            raise ValueError(
                f"drop_remainder=True leaves no batch: {plan.epoch_length} samples are fewer than "
                f"batch_size={batch_size}"
            )
        super().__init__(
            loader,
            plan,
            workers=workers,
            use_multiprocessing=use_multiprocessing,
            max_queue_size=max_queue_size,
            timeout=timeout,
            pool=pool,
            max_failures=checks.check_max_failures(max_failures),
        )
        self._seed_drawn = seed is None
        if self._processes and pool is None:
            for name in ("transform", "collate", "batch_transform"):
                dump_user_object(getattr(loader, name), name, [])

    def shard(self, num_shards: int, index: int) -> PoolDataset:
        """This process's part of the dataset, for data-parallel training.

        Shards are disjoint, cover every epoch, and have the same number of batches; see `batching` for which samples go
        where. `batch_size` is the size on each shard.

        Args:
            num_shards: number of parts.
            index: which one, from 0.

        Raises:
            ValueError: the index is out of range, or there are fewer samples than shards.
        """
        num_shards = checks.check_count(num_shards, "num_shards")
        index = checks.check_count(index, "index", 0)
        if index >= num_shards:
            raise ValueError(f"index must be below num_shards={num_shards}, got {index}")
        if self._plan.batch_size == 1 and not self._plan.drop_remainder and self._plan.epoch_length % num_shards:
            raise ValueError(
                f"{self._plan.epoch_length} samples in batches of one cannot give num_shards={num_shards} the same "
                "number of batches; pass drop_remainder=True, or batch_size=2 or more"
            )
        if self._plan.num_shards != 1:
            raise ValueError(f"this dataset is shard {self._plan.shard} of {self._plan.num_shards} already")
        plan = dataclasses.replace(self._plan, num_shards=num_shards, shard=index)
        if plan.num_batches == 0 or plan.epoch_length < num_shards:
            raise ValueError(
                f"{plan.epoch_length} samples are too few for a batch on each of num_shards={num_shards} with "
                f"batch_size={plan.batch_size}, drop_remainder={plan.drop_remainder}"
            )
        part = copy.copy(self)
        part._runtime = None
        part._pool = self._pool
        part._plan = plan
        part._tracker = EpochTracker(plan.num_batches, requests_seen=not isinstance(self._pool, str))
        part._tracker.set_epoch(self.epoch)
        part._failures = self._failures.fresh(plan.epoch_length // num_shards)
        return part

    def state_dict(self) -> dict[str, Any]:
        """Where in its epochs the dataset is: plain numbers and lists, fit for JSON.

        What counts is what was handed out: by an iteration (also inside its loop) or by `dataset[i]`. In `fit` on
        TensorFlow that runs ahead of what the model was trained on; `keras_mp.BackupAndRestore` knows the difference.
        """
        return self._state(self.epoch, self._tracker.left_after())

    def _state(self, epoch: int, left: list[int]) -> dict[str, Any]:
        whole = len(left) in (0, self._plan.num_batches)
        state = {"version": _STATE_VERSION, **self._identity(), "epoch": epoch + (not left)}
        return {**state, "remaining": None if whole and left == sorted(left) else left}

    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "length": plan.length,
            "epoch_length": plan.epoch_length,
            "batch_size": plan.batch_size,
            "shuffle": plan.shuffle,
            "drop_remainder": plan.drop_remainder,
            "num_shards": plan.num_shards,
            "shard": plan.shard,
            "seed": plan.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state_dict()` was taken: the current epoch is then what was left of that one.

        Iteration, `dataset[i]`, `len(dataset)`, the next pass of Keras and an export made now give the batches that
        had not been handed out, bit for bit, whatever the number of workers. The epoch after that is whole again.
        A dataset made with `seed=None` takes the seed of the state.

        Args:
            state: what `state_dict()` returned, for a dataset of the same source, seed and batches.

        Raises:
            ValueError: it is of another dataset or version; the message says which number differs.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"state has version {state.get('version')!r}, but this keras_mp reads {_STATE_VERSION}")
        if self._seed_drawn and "seed" in state:
            self._reseed(checks.check_count(state["seed"], "seed", 0))
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"state is of another dataset: {name} is {state.get(name)!r} there and {mine!r} here; make the "
                    "dataset as it was when the state was taken"
                )
        left = state["remaining"]
        self.set_epoch(state["epoch"])
        self._tracker.set_epoch(self.epoch, None if left is None else [int(batch) for batch in left])

    def _reseed(self, seed: int) -> None:
        self._loader = dataclasses.replace(cast(SampleLoader, self._loader), seed=seed)
        self._plan = dataclasses.replace(self._plan, seed=seed)
        self._seed_drawn = False
        if self._runtime is not None:
            self._drop_requests()
            self._runtime.engine.update(self._loader)

    @property
    def _batch_axis(self) -> int | None:
        plan, loader = self._plan, self._loader
        if not isinstance(loader, SampleLoader) or loader.on_error == "skip" or loader.collate:
            return None
        whole = plan.drop_remainder or plan.epoch_length % (plan.batch_size * plan.num_shards) == 0
        return plan.batch_size if whole else None

    def __repr__(self) -> str:
        plan = self._plan
        shard = f", shard={plan.shard} of {plan.num_shards}" if plan.num_shards > 1 else ""
        return (
            f"PoolDataset({plan.length} samples, {plan.num_batches} batches of {plan.batch_size}, "
            f"shuffle={plan.shuffle}, seed={plan.seed}, epoch={self.epoch}, {self._workers_text()}{shard})"
        )


class _ParallelDataset(LoadedDataset):
    """What `parallelize` returns: an object whose `[i]` is a whole batch, its batches loaded by workers."""

    def __init__(self, batches: Any, loader: BatchLoader, plan: Batching, **options: Any) -> None:
        super().__init__(loader, plan, **options)
        self._batches = batches

    def on_epoch_begin(self) -> None:
        self._tell("on_epoch_begin")
        super().on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._tell("on_epoch_end")
        super().on_epoch_end()

    def set_epoch(self, epoch: int) -> None:
        if epoch > self.epoch:
            self._tell("on_epoch_end")
        super().set_epoch(epoch)

    def _stream(self, epochs: int, convert: Callable[[Any], Any], together: int) -> Generator[list[Any]]:
        if self._hook("on_epoch_end") is None:
            yield from super()._stream(epochs, convert, together)
            return
        for _ in range(epochs):  # an epoch's batches depend on the hook, which is called after the last one's
            for batch in self:
                yield [convert(batch)]

    def _hook(self, name: str) -> Callable[[], Any] | None:
        """A hook of the user's object, if it has one that does something."""
        call: Callable[[], Any] | None = getattr(self._batches, name, None)
        return None if getattr(call, "__func__", None) is getattr(keras.utils.PyDataset, name) else call

    def _tell(self, hook: str) -> None:
        """Calls a hook of the user's object in this process, then gives the workers the state it left behind."""
        call = self._hook(hook)
        if call is None:
            return
        call()
        if self._runtime is not None:
            self._drop_requests()
            self._runtime.engine.update(self._loader)

    @property
    def _batch_axis(self) -> int | None:
        return None

    def __repr__(self) -> str:
        return (
            f"parallelize({type(self._batches).__name__}, {len(self)} batches, seed={self._plan.seed}, "
            f"epoch={self.epoch}, {self._workers_text()})"
        )


def parallelize(
    py_dataset: Any,
    workers: int | None = None,
    *,
    use_multiprocessing: bool = True,
    max_queue_size: int = 10,
    seed: int | None = None,
    retries: int = 0,
    timeout: float | None = None,
    pool: Pool = None,
) -> LoadedDataset:
    """Loads the batches of an existing dataset on worker processes, without a change to it.

    Args:
        py_dataset: a `keras.utils.PyDataset`, or any object with `len()` whose `[i]` is a whole batch. Its
            `on_epoch_begin` and `on_epoch_end` are called in this process, when Keras would call them, and what they
            change reaches the workers.
        workers: worker processes. None: the usable cores. 0: load in-process.
        use_multiprocessing: False: threads instead of processes.
        max_queue_size: batches in flight, those ready but not yet taken included.
        seed: seeds `random` and `numpy.random` before each batch, with its epoch and number. None: drawn once.
        retries: how often a failing batch is tried again first.
        timeout: seconds that one batch may take in a worker.
        pool: as for `PoolDataset`.

    Returns:
        A `keras.utils.PyDataset` with the methods of `PoolDataset`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    length = _count_batches(py_dataset)
    loader = BatchLoader(py_dataset, checks.check_seed(seed), checks.check_count(retries, "retries", 0))
    return _ParallelDataset(
        py_dataset,
        loader,
        Batching(length, 1, seed=loader.seed),
        workers=workers,
        use_multiprocessing=use_multiprocessing,
        max_queue_size=max_queue_size,
        timeout=timeout,
        pool=pool,
    )


def _count_batches(py_dataset: Any) -> int:
    if isinstance(py_dataset, LoadedDataset):
        raise TypeError(
            f"py_dataset is a {py_dataset!r} already, which loads on workers of its own; pass workers= to it"
        )
    if isinstance(py_dataset, keras.utils.PyDataset) and not hasattr(py_dataset, "__len__"):
        count = py_dataset.num_batches
        if count is None:
            raise ValueError(
                "py_dataset has num_batches=None (it never ends); give it a length, or use steps_per_epoch"
            )
        return checks.check_count(count, "py_dataset.num_batches")
    return checks.check_source(py_dataset, "py_dataset")
