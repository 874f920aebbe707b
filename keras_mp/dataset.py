"""The datasets that users make: `PoolDataset` from samples, `parallelize` from an object that gives whole batches."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import keras

from keras_mp import checks
from keras_mp.engines.choice import EngineChoice, Pool
from keras_mp.loaded import LoadedDataset
from keras_mp.loading.batch_loader import BatchLoader
from keras_mp.loading.flows import FlowBatches, is_flow
from keras_mp.loading.loader import OnError, SampleLoader
from keras_mp.memory.pickling import dump_user_object
from keras_mp.plan.batching import ENDLESS, Batching


class PoolDataset(LoadedDataset):
    """Samples and a function, loaded, preprocessed and batched by worker processes: a dataset for `model.fit`.

    Args:
        source: the samples: anything with `len()` (or `shape`) and `[i]`: a list of paths, an array, a memmap, rows, a
            Hugging Face or torch dataset; a `keras_mp.PerWorker` of what cannot be sent to workers. Large arrays in it
            are shared with the workers, not copied to each; memmaps are opened again.
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
        use_multiprocessing: False: threads instead of processes. They share the source and the functions, and one that
            hangs cannot be ended: `close()` leaves it behind.
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
            `concurrent.futures.Executor`. A `dask.distributed.Client`, or "ray": a cluster, see docs/clusters.md.
            "keras": Keras's own process pool runs `dataset[i]`.
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
            EngineChoice.of(workers, use_multiprocessing, pool, timeout),
            seed_is_drawn=seed is None,
            max_queue_size=checks.check_count(max_queue_size, "max_queue_size"),
            max_failures=checks.check_max_failures(max_failures),
        )
        if self._choice.shares_pool:
            for name in ("transform", "collate", "batch_transform"):
                dump_user_object(getattr(loader, name), name, [])

    @property
    def batch_axis(self) -> int | None:
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
            f"shuffle={plan.shuffle}, seed={plan.seed}, epoch={self.epoch}, {self._choice}{shard})"
        )


class _ParallelDataset(LoadedDataset):
    """What `parallelize` returns: an object whose `[i]` is a whole batch, its batches loaded by workers."""

    def __init__(self, batches: Any, loader: BatchLoader, plan: Batching, choice: EngineChoice, **options: Any) -> None:
        super().__init__(loader, plan, choice, max_failures=None, **options)
        self._batches = batches

    def on_epoch_begin(self) -> None:
        self._call("on_epoch_begin")
        super().on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._call("on_epoch_end")
        super().on_epoch_end()

    def set_epoch(self, epoch: int) -> None:
        if epoch > self.epoch:
            self._call("on_epoch_end")
        super().set_epoch(epoch)

    def _run_due_hook(self) -> None:
        if self._hook_is_due:
            self._hook_is_due = False
            self._call("on_epoch_end")

    def stream(
        self, epochs: int = 1, claim: bool = False, together: int = 1, convert: Callable[[Any], Any] | None = None
    ) -> Generator[list[Any]]:
        if epochs == 1 or self._hook("on_epoch_end") is None:
            yield from super().stream(epochs, claim, together, convert)
            return
        for _ in range(epochs):  # an epoch's batches depend on the hook, which is called after the last one's
            yield from super().stream(1, claim, together, convert)

    def _hook(self, name: str) -> Callable[[], Any] | None:
        """A hook of the user's object, if it has one that does something."""
        call: Callable[[], Any] | None = getattr(self._batches, name, None)
        return None if getattr(call, "__func__", None) is getattr(keras.utils.PyDataset, name) else call

    def _call(self, name: str) -> None:
        """Calls a hook of the user's object in this process, then gives the workers the state it left behind."""
        call = self._hook(name)
        if call is None:
            return
        call()
        with self._lock:
            self._send_changes()
            self._prefetch.renew()

    @property
    def batch_axis(self) -> int | None:
        return None

    def __repr__(self) -> str:
        count = "endless" if self._plan.is_endless else len(self)
        return (
            f"parallelize({type(self._batches).__name__}, {count} batches, seed={self._plan.seed}, "
            f"epoch={self.epoch}, {self._choice})"
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
        use_multiprocessing: False: threads instead of processes. They share the source and the functions, and one that
            hangs cannot be ended: `close()` leaves it behind.
        max_queue_size: batches in flight, those ready but not yet taken included.
        seed: seeds `random`, `numpy.random` and the generators that `py_dataset` holds before each batch, with its
            epoch and number. None: drawn once.
        retries: how often a failing batch is tried again first.
        timeout: seconds that one batch may take in a worker.
        pool: as for `PoolDataset`.

    Returns:
        A `keras.utils.PyDataset` with the methods of `PoolDataset`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    length = _count_batches(py_dataset)
    batches = FlowBatches(py_dataset) if is_flow(py_dataset) else py_dataset
    loader = BatchLoader(batches, checks.check_seed(seed), checks.check_count(retries, "retries", 0))
    return _ParallelDataset(
        py_dataset,
        loader,
        Batching(length, 1, seed=loader.seed),
        EngineChoice.of(workers, use_multiprocessing, pool, timeout),
        seed_is_drawn=seed is None,
        max_queue_size=checks.check_count(max_queue_size, "max_queue_size"),
    )


def _count_batches(py_dataset: Any) -> int:
    if isinstance(py_dataset, LoadedDataset):
        raise TypeError(
            f"py_dataset is a {py_dataset!r} already, which loads on workers of its own; pass workers= to it"
        )
    if isinstance(py_dataset, keras.utils.PyDataset) and not hasattr(py_dataset, "__len__"):
        count = py_dataset.num_batches
        return ENDLESS if count is None else checks.check_count(count, "py_dataset.num_batches")
    return checks.check_source(py_dataset, "py_dataset")
