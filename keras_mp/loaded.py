"""What Keras sees of a dataset of ours, whatever its batches are made of: a `keras.utils.PyDataset`.

Keras is told `workers=1`, so it asks for one batch after the other from a plain loop, and this module reads ahead on
its own workers. Keras's own queue would have the batches it read ahead before a model was built (JAX, torch) come out
again in the first real pass, lose as many at its end, and wait a tenth of a second at the end of every epoch. With
`pool="keras"` the queue and the process pool are Keras's.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import itertools
import multiprocessing
import operator
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, Literal

import keras
import numpy as np

from keras_mp import checks
from keras_mp.batching import Batching
from keras_mp.engines import Engine, ExecutorEngine, InlineEngine
from keras_mp.epochs import EpochTracker
from keras_mp.errors import PoolClosed, SampleFailure
from keras_mp.failures import FailureLog
from keras_mp.loading import Loaded, Loader, Request
from keras_mp.pool import WorkerPool, check_workers, shared_pool
from keras_mp.readahead import ReadAhead

if TYPE_CHECKING:
    import tensorflow as tf

Pool = WorkerPool | concurrent.futures.Executor | Literal["keras"] | None


@dataclasses.dataclass
class _Runtime:
    """What lives only while batches are being loaded: never copied, never pickled."""

    engine: Engine
    ahead: ReadAhead
    pool: WorkerPool | None = None  # keeps a shared pool alive


class LoadedDataset(keras.utils.PyDataset):
    """What `PoolDataset` and the result of `parallelize` have in common: epochs, read-ahead, export, ends."""

    def __init__(
        self,
        loader: Loader,
        plan: Batching,
        *,
        workers: int | None,
        use_multiprocessing: bool,
        max_queue_size: int,
        timeout: float | None,
        pool: Pool,
        max_failures: float | None = None,
    ) -> None:
        checks.check_pool(pool)
        max_queue_size = checks.check_count(max_queue_size, "max_queue_size")
        if isinstance(pool, WorkerPool):
            if workers not in (None, pool.workers) or not use_multiprocessing:
                raise ValueError(
                    f"pool={pool!r} decides how batches are loaded, but workers={workers!r} and use_multiprocessing="
                    f"{use_multiprocessing!r} were given as well; leave them out"
                )
            workers = pool.workers
        if pool is not None and workers == 0:
            raise ValueError(f"workers=0 loads in-process, but pool={pool!r} was given as well; leave one of them out")
        self._num_workers = check_workers(workers)
        by_keras = isinstance(pool, str)
        super().__init__(
            workers=self._num_workers if by_keras else 1, use_multiprocessing=by_keras, max_queue_size=max_queue_size
        )
        self._loader = loader
        self._plan = plan
        self._pool = pool
        self._processes = use_multiprocessing and self._num_workers > 0 and not by_keras
        self._timeout_s = checks.check_timeout(timeout)
        self._depth = 0 if by_keras or (pool is None and self._num_workers == 0) else max_queue_size
        self._tracker = EpochTracker(plan.num_batches, requests_seen=not by_keras)
        self._failures = FailureLog(max_failures, plan.epoch_length // plan.num_shards)
        self._batches_served = 0
        self._wait_s = 0.0
        self._closed = False
        self._runtime: _Runtime | None = None
        self._starting = threading.Lock()

    # -- batches -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of batches in the current epoch: in a resumed one, those that were left."""
        return len(self._tracker)

    @property
    def num_batches(self) -> int:
        """Number of batches in an epoch. Keras reads it when it starts to iterate."""
        self._tracker.pass_may_start()
        # `fit` reads it once for all of its epochs, before it begins the first, and again for each pass.
        return len(self._tracker) if self._tracker.is_open else self._plan.num_batches

    def __getitem__(self, index: int) -> Any:
        """Batch `index` of the current epoch; arrays of shape (samples in the batch, *sample shape).

        Raises:
            IndexError: there is no such batch.
            SampleError: user code failed on it.
            WorkerCrashed, BatchTimeout: it ended its workers, or took too long, twice.
            TooManyFailures: more samples of the epoch failed than `max_failures` allows.
            PoolClosed: the dataset was closed.
        """
        index = operator.index(index)
        count = len(self._tracker)
        if not -count <= index < count:
            raise IndexError(f"batch {index} is out of range: the dataset has {count} batches")
        index %= count
        ahead = self._running().ahead
        tracker, epoch = self._tracker, self._tracker.epoch
        order = tracker.asked(index)
        plan = None if order is None else ((epoch, tracker.batch(number)) for number in order)
        return self._served(ahead.get, (epoch, tracker.batch(index)), plan)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch, in order; when they have all been taken, the next epoch begins."""
        epoch, left = self._tracker.epoch, len(self._tracker)
        ahead = self._new_read_ahead(self._keys(1))
        try:
            for batch in self._tracker.iterate():
                loaded = self._served(ahead.get, (epoch, batch))
                left -= 1
                yield loaded
        finally:
            ahead.drop()
            # Here, not behind the loop: who knows the length does not ask for more than the last batch.
            if not left and self._tracker.epoch == epoch and not self._closed:
                self.set_epoch(epoch + 1)

    def _served(self, load: Callable[..., Loaded], *arguments: Any) -> Any:
        started = time.perf_counter()
        loaded = load(*arguments)
        self._wait_s += time.perf_counter() - started
        self._batches_served += 1
        self._failures.add(loaded.failures)
        if loaded.failures and isinstance(self._pool, str) and multiprocessing.parent_process() is not None:
            for failure in loaded.failures:  # in a process of Keras's, from which `failures` reaches nobody
                warnings.warn(f"keras_mp: left out or replaced: {failure.describe()}", RuntimeWarning, stacklevel=2)
        return loaded.batch

    def _request(self, epoch: int, batch: int) -> Request:
        samples = self._plan.samples(epoch, batch)
        if not self._plan.shuffle and self._plan.order is None:
            return Request(epoch, batch, range(int(samples[0]), int(samples[-1]) + 1))
        repeats, substitutes = self._plan.repeats(epoch, batch), self._plan.substitutes(epoch, batch)
        return Request(epoch, batch, samples.tolist(), () if repeats is None else repeats.tolist(), substitutes)

    # -- epochs --------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._tracker.epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the current one; `dataset[i]`, the next iteration and the next pass of Keras are its batches.

        Args:
            epoch: epoch number, from 0.
        """
        epoch = checks.check_count(epoch, "epoch", 0)
        before = self._tracker.epoch
        self._tracker.set_epoch(epoch)
        self._failures.tell(before)
        self._drop_requests()

    def on_epoch_begin(self) -> None:
        """Keras calls this before an epoch, a while before it asks for the first batch."""
        order, epoch = self._tracker.begin(), self._tracker.epoch
        if order is not None and self._depth:
            self._running().ahead.expect((epoch, batch) for batch in order)

    def on_epoch_end(self) -> None:
        """Keras calls this after an epoch, and at other times; see `epochs`."""
        before = self._tracker.epoch
        if self._tracker.end():
            self._failures.tell(before)
            self._drop_requests()

    def _drop_requests(self) -> None:
        if self._runtime is not None:
            self._runtime.ahead.drop()

    # -- export --------------------------------------------------------------------------------------------------

    def to_tf_dataset(self, epochs: int = 1, prefetch: int | None = None, element_spec: Any = None) -> tf.data.Dataset:
        """The same batches as a `tf.data.Dataset`, loaded ahead by the same workers and not copied.

        Each iteration of the result is a new epoch of this dataset (or `epochs` of them one after the other, the next
        one loading while the last batches of the one before are consumed). Its cardinality is known.

        tf.data's autotuning is off in the result: nothing in it is to be tuned, and the tuner can hold up the end of an
        epoch (docs/speed.md). A pipeline of your own behind it may switch it on again by `with_options`.

        Args:
            epochs: epochs in one iteration.
            prefetch: batches that tf.data keeps ready besides those this dataset loads ahead (of small ones up to eight
                more); None: `tf.data.AUTOTUNE`.
            element_spec: nest of `tf.TensorSpec`, for batches whose shapes vary beyond the first axis; None: taken from
                the first batch, with the batch axis unknown unless every batch has the same number of samples.

        Returns:
            A `tf.data.Dataset` of batches, in the structure that the dataset gives them (lists become tuples).

        Raises:
            ImportError: TensorFlow is not installed.
            tf.errors.InvalidArgumentError: while iterating, a batch contradicts `element_spec`; it names the leaf.
        """
        from keras_mp import tfdata

        return tfdata.export(self, checks.check_count(epochs, "epochs"), prefetch, element_spec)

    def _stream(self, epochs: int, convert: Callable[[Any], Any], together: int) -> Generator[list[Any]]:
        """The batches of the next `epochs` epochs, read ahead across their boundaries too.

        They are this stream's from now on: the next stream or pass takes the epoch after them.

        Args:
            epochs: how many.
            convert: applied to each batch.
            together: batches in one list at most. Only those that are ready join the first; none waits for another.
        """
        ahead = self._new_read_ahead(self._keys(epochs))
        keys = self._keys(epochs)
        epoch = self._tracker.epoch
        self.set_epoch(epoch + epochs)
        batches: list[Any] = []
        try:
            for key in keys:
                if batches and (len(batches) == together or not ahead.is_ready(key)):
                    yield batches
                    batches = []
                if key[0] != epoch:
                    self._failures.tell(epoch)
                    epoch = key[0]
                try:
                    batches.append(convert(self._served(ahead.get, key)))
                except Exception:
                    if batches:
                        yield batches  # those before it come out first
                    raise
            if batches:
                yield batches
        finally:
            ahead.drop()
            self._failures.tell(epoch)

    def _keys(self, epochs: int) -> Iterator[tuple[int, int]]:
        """(epoch, batch) of every batch in what is left of this epoch and the `epochs - 1` after it."""
        epoch, batches = self._tracker.epoch, self._tracker.batches()
        later = itertools.product(range(epoch + 1, epoch + epochs), range(self._plan.num_batches))
        return itertools.chain(((epoch, batch) for batch in batches), later)

    def _new_read_ahead(self, plan: Iterator[tuple[int, int]]) -> ReadAhead:
        return ReadAhead(self._running().engine, self._request, self._depth, plan)

    def _peek(self) -> Any:
        """The first batch of the current epoch, without a trace in the record of what Keras has asked for."""
        engine = self._running().engine
        (handle,) = engine.submit([self._request(self._tracker.epoch, 0)])
        return self._served(engine.result, handle)

    @property
    def _batch_axis(self) -> int | None:
        """Samples in every batch, or None if that varies."""
        raise NotImplementedError

    # -- numbers and ends ----------------------------------------------------------------------------------------

    @property
    def failures(self) -> list[SampleFailure]:
        """The samples that failed and were left out or replaced: the last thousand, oldest first."""
        return self._failures.kept

    def stats(self) -> dict[str, Any]:
        """Numbers so far: batches served, seconds waited for them, failures, and those of the engine."""
        engine = {} if self._runtime is None else self._runtime.engine.stats()
        return {
            "epoch": self.epoch,
            "batches": self._batches_served,
            "wait_s": self._wait_s,
            "failures": self._failures.total,
            **engine,
        }

    def close(self) -> None:
        """Drops what is being loaded and ends the workers, unless another dataset uses them. May be called twice.

        Batches already taken stay valid.
        """
        with self._starting:
            if self._closed:
                return
            self._closed = True
            runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.ahead.drop()
            runtime.engine.close()
            if runtime.pool is not None:
                pool, end = weakref.ref(runtime.pool), runtime.pool.end
                del runtime
                if pool() is None:
                    end()  # this was its last dataset: come back when its workers are gone
        self._failures.tell_all()

    def __enter__(self) -> LoadedDataset:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_runtime": None, "_pool": self._pool if isinstance(self._pool, str) else None}
        del state["_starting"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._starting = threading.Lock()

    def _running(self) -> _Runtime:
        runtime = self._runtime
        if runtime is not None:
            return runtime
        with self._starting:
            if self._closed:
                raise PoolClosed(f"{type(self).__name__} has been closed; make a new one")
            if self._runtime is None:
                self._runtime = self._start()
            return self._runtime

    def _start(self) -> _Runtime:
        engine: Engine
        pool: WorkerPool | None = None
        if isinstance(self._pool, concurrent.futures.Executor):
            engine = ExecutorEngine(self._pool, self._loader, owned=False)
        elif isinstance(self._pool, str) or self._num_workers == 0:
            engine = InlineEngine(self._loader)
        elif not self._processes:
            threads = concurrent.futures.ThreadPoolExecutor(self._num_workers, thread_name_prefix="keras_mp")
            engine = ExecutorEngine(threads, self._loader, owned=True)
        else:
            pool = self._pool if isinstance(self._pool, WorkerPool) else shared_pool(self._num_workers)
            engine = pool.client(self._loader, self._timeout_s)
            source = getattr(self._loader, "source", None)
            if type(source) is np.ndarray and (shared := engine.shared_view(source)) is not None:
                self._loader = copy.copy(self._loader)
                self._loader.source = shared  # the original may go, if the user does not keep it
                engine.update(self._loader)
        return _Runtime(engine, ReadAhead(engine, self._request, self._depth), pool)

    def _workers_text(self) -> str:
        if isinstance(self._pool, str):
            return f"workers={self._num_workers} (Keras's pool)"
        if isinstance(self._pool, concurrent.futures.Executor):
            return f"pool={type(self._pool).__name__}"
        kind = "processes" if self._processes else "threads"
        return f"workers={self._num_workers} {kind if self._num_workers else '(in-process)'}"
