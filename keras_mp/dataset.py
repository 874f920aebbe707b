"""The datasets that users make: `PoolDataset` from samples, `parallelize` from an object that gives whole batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any, Literal

import keras
import numpy as np

from keras_mp import checks
from keras_mp.engines.choice import EngineChoice, Pool
from keras_mp.engines.measure import measure_lengths
from keras_mp.errors import short_repr
from keras_mp.loaded import LoadedDataset
from keras_mp.loading.batch_loader import BatchLoader
from keras_mp.loading.cache import SampleCache
from keras_mp.loading.flows import FlowBatches, is_flow
from keras_mp.loading.loader import OnError, SampleLoader
from keras_mp.loading.randomness import takes_rng
from keras_mp.memory.pickling import check_user_object
from keras_mp.plan.batching import ENDLESS, Batching
from keras_mp.plan.buckets import Buckets
from keras_mp.plan.orders import DrawnOrder
from keras_mp.plan.shuffle import Indices


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
        collate: list of samples -> batch. None: every leaf is stacked, straight into shared memory. `keras_mp.pad()`:
            so are samples that differ in length.
        batch_transform: batch -> batch, in the worker, after `collate`; `rng` as above, by (seed, epoch, batch).
        shuffle: a new permutation of the samples in every epoch.
        seed: root of all randomness. None: drawn once, shown in `repr`.
        drop_remainder: leave out the last batch if it is not full.
        workers: worker processes. None: the usable cores. 0: load in-process. "auto": begins with the usable cores and
            finds, while the first epoch runs, how many are enough; the data stays the same.
        use_multiprocessing: False: threads instead of processes. They share the source and the functions, and one that
            hangs cannot be ended: `close()` leaves it behind.
        max_queue_size: batches in flight, those ready but not yet taken included. None: two for each worker, but at
            least ten, and more of those that take less than 2 ms and travel several at a time.
        max_queue_bytes: bytes of the arrays in these batches, which may lower their number, but not below one. None: a
            quarter of the memory that is available when the dataset is made.
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
            `concurrent.futures.Executor`. A `dask.distributed.Client`, or "ray": a cluster, see docs/cluster.md.
            "keras": Keras's own process pool runs `dataset[i]`.
        order: callable (epoch, rng) -> sample indices, for weighted or curriculum sampling, in place of `shuffle`. May
            be longer or shorter than the source, but of the same length in every epoch. A sample that comes again in an
            epoch gets other random numbers. `keras_mp.balanced` and `keras_mp.weighted` make such orders.
        buckets: `keras_mp.Buckets`: batches of samples of like length, which come mixed, in an order drawn from (seed,
            epoch). `shuffle` then permutes the samples of each bucket, `batch_size` is that of buckets which say none,
            and `drop_remainder` leaves out what does not fill a batch of its bucket. Lengths that a function tells are
            evaluated now, by the workers, without `timeout`.
        load: item of the source -> sample, before `transform`: the costly part that is the same in every epoch, such as
            decoding. It draws no random numbers.
        cache: where what `load` gave (without `load`: what the source gave) is kept. "ram": in memory that all workers
            share, which ends with the dataset. A path: in that folder, for other runs too. See docs/caching.md.
        cache_bytes: how much is kept at most; after that nothing is added. None: in memory, half of what is available
            when the dataset is made; in a folder, what there is room for.
        cache_version: part of what a kept sample is known by, besides the code of `load`, the item, and size and time
            of change of files that it names. Change it where these do not show that samples are others now.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        KerasMPError: the source or a function cannot be sent to worker processes.
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
        workers: int | Literal["auto"] | None = None,
        use_multiprocessing: bool = True,
        max_queue_size: int | None = None,
        max_queue_bytes: int | None = None,
        on_error: OnError = "raise",
        max_failures: float | None = None,
        retries: int = 0,
        timeout: float | None = None,
        pool: Pool = None,
        order: Callable[..., Any] | None = None,
        buckets: Buckets | None = None,
        load: Callable[..., Any] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        cache_version: int | str | None = None,
    ) -> None:
        length = checks.check_source(source)
        checks.check_choice(on_error, "on_error", ("raise", "skip", "replace"))
        if order is not None and shuffle:
            raise ValueError(
                "order= decides the order of samples, so shuffle=True has no meaning; leave one of them out"
            )
        if not isinstance(buckets, Buckets | None):
            raise TypeError(f"buckets must be a keras_mp.Buckets or None, got {short_repr(buckets, 80)}")
        if order is not None and buckets is not None:
            raise ValueError(
                "order= may draw any number of samples from a bucket, so buckets= could not give every epoch the same "
                "number of batches; leave one of them out"
            )
        if isinstance(order, DrawnOrder):
            order.check(length)
        loader: SampleLoader = SampleLoader(
            source,
            checks.check_callable(transform, "transform"),
            checks.check_callable(collate, "collate"),
            checks.check_callable(batch_transform, "batch_transform"),
            checks.check_seed(seed),
            on_error,
            checks.check_count(retries, "retries", 0),
            _check_load(load),
            SampleCache.of(cache, cache_bytes, cache_version, length),
        )
        choice = EngineChoice.of(workers, use_multiprocessing, pool, timeout, max_queue_size, max_queue_bytes)
        if loader.cache is not None:
            if loader.cache.is_in_memory and not choice.shares_memory:
                raise ValueError(
                    f"cache='ram' is memory that workers of keras_mp share, which those of pool={pool!r} cannot; pass "
                    "a folder as cache=, or leave out pool="
                )
            loader.cache.namespace(load, source)  # an error now, if there is to be one
        batching = checks.check_count(batch_size, "batch_size"), bool(shuffle), loader.seed, bool(drop_remainder)
        if buckets is None:
            plan = Batching(length, *batching, order=checks.check_callable(order, "order"))
        else:
            plan = buckets.plan(_lengths_of(buckets, length, choice, loader), *batching)
        plan.check()
        super().__init__(
            loader,
            plan,
            choice,
            seed_is_drawn=seed is None,
            max_failures=checks.check_max_failures(max_failures),
        )
        if self._choice.shares_pool:
            functions = {"transform": transform, "collate": collate, "batch_transform": batch_transform, "load": load}
            for name, value in {**functions, "source": source}.items():
                check_user_object(value, name)

    @property
    def batch_axis(self) -> int | None:
        plan, loader = self._plan, self._loader
        if not isinstance(loader, SampleLoader) or loader.on_error == "skip" or not loader.stacks:
            return None
        return plan.uniform_size

    def __repr__(self) -> str:
        plan = self._plan
        shard = f", shard={plan.shard} of {plan.num_shards}" if plan.num_shards > 1 else ""
        return (
            f"PoolDataset({plan.length} samples, {plan.num_batches} batches of {plan.describe_size()}, "
            f"shuffle={plan.shuffle}, seed={plan.seed}, epoch={self.epoch}, {self._where}{shard})"
        )


def _check_load(load: Any) -> Any:
    """A callable without randomness, or None.

    Raises:
        TypeError, ValueError: it is not.
    """
    if takes_rng(checks.check_callable(load, "load")):
        raise ValueError(
            f"load={short_repr(load, 80)} takes rng, but it must give the same sample in every epoch; draw random "
            "numbers in `transform`"
        )
    return load


def _lengths_of(buckets: Buckets, count: int, choice: EngineChoice, loader: SampleLoader) -> Indices:
    """Lengths of all samples: int64, shape (count,).

    Raises:
        TypeError, ValueError: there are none, or not as many as samples.
        KerasMPError: a function that tells them failed.
    """
    lengths = buckets.lengths
    if not isinstance(lengths, np.ndarray):
        return measure_lengths(lengths, count, choice, loader.seed, loader.retries)
    if len(lengths) != count:
        raise ValueError(
            f"buckets has {len(lengths)} lengths, but the source has {count} samples; give a length for each sample, "
            "in the source's order"
        )
    return lengths


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
            f"epoch={self.epoch}, {self._where})"
        )


def parallelize(
    py_dataset: Any,
    workers: int | Literal["auto"] | None = None,
    *,
    use_multiprocessing: bool = True,
    max_queue_size: int | None = None,
    max_queue_bytes: int | None = None,
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
        workers: worker processes. None: the usable cores. 0: load in-process. "auto": as for `PoolDataset`.
        use_multiprocessing: False: threads instead of processes. They share the source and the functions, and one that
            hangs cannot be ended: `close()` leaves it behind.
        max_queue_size: batches in flight, those ready but not yet taken included. None: two for each worker, but at
            least ten, and more of those that take less than 2 ms and travel several at a time.
        max_queue_bytes: bytes of the arrays in these batches; as for `PoolDataset`.
        seed: seeds `random`, `numpy.random` and the generators that `py_dataset` holds before each batch, with its
            epoch and number. None: drawn once.
        retries: how often a failing batch is tried again first.
        timeout: seconds that one batch may take in a worker.
        pool: as for `PoolDataset`.

    Returns:
        A `keras.utils.PyDataset` with the methods of `PoolDataset`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        KerasMPError: `py_dataset` cannot be sent to worker processes.
    """
    length = _count_batches(py_dataset)
    batches = FlowBatches(py_dataset) if is_flow(py_dataset) else py_dataset
    loader = BatchLoader(batches, checks.check_seed(seed), checks.check_count(retries, "retries", 0))
    choice = EngineChoice.of(workers, use_multiprocessing, pool, timeout, max_queue_size, max_queue_bytes)
    if choice.shares_pool:
        check_user_object(batches, "py_dataset")
    return _ParallelDataset(
        py_dataset, loader, Batching(length, 1, seed=loader.seed), choice, seed_is_drawn=seed is None
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
