"""What Keras sees of a dataset of ours, whatever its batches are made of: a `keras.utils.PyDataset`.

Keras is told `workers=1`, so it asks for one batch after the other from a plain loop, and this module reads ahead on
our workers. Keras's own queue would have the batches it read ahead before a model was built (JAX, torch) come out
again in the first real pass, lose as many at its end, and wait a tenth of a second at the end of every epoch. With
`pool="keras"` the queue and the process pool are Keras's.

Which batch a number stands for, and which epoch it is, is decided in `position`.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import itertools
import multiprocessing
import operator
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import keras
import numpy as np

from keras_mp import checks, exits
from keras_mp.callers import current_call, is_keras
from keras_mp.checks import check_workers
from keras_mp.engines.base import Engine
from keras_mp.engines.executor import ExecutorEngine
from keras_mp.engines.inline import InlineEngine
from keras_mp.engines.processes import WorkerPool, shared_pool
from keras_mp.engines.readahead import Handles, ReadAhead
from keras_mp.engines.threads import ThreadsEngine
from keras_mp.errors import PoolClosed, SampleError, SampleFailure, short_repr
from keras_mp.loading.collate import with_tuples
from keras_mp.loading.failures import FailureLog
from keras_mp.loading.loader import Loaded, Loader
from keras_mp.plan.batching import Batching
from keras_mp.plan.position import Asked, BatchKey, Position, Progress
from keras_mp.plan.request import Request

if TYPE_CHECKING:
    import tensorflow as tf

Pool = WorkerPool | concurrent.futures.Executor | Literal["keras"] | None

_STATE_VERSION = 2


@dataclasses.dataclass
class _Runtime:
    """What lives only while batches are being loaded: never copied, never pickled."""

    engine: Engine
    pool: WorkerPool | None = None  # keeps a shared pool alive


class LoadedDataset(keras.utils.PyDataset):
    """What `PoolDataset` and the result of `parallelize` have in common: epochs, read-ahead, export, ends."""

    def __init__(
        self,
        loader: Loader,
        plan: Batching,
        *,
        seed: int | None,
        workers: int | None,
        use_multiprocessing: bool,
        max_queue_size: int,
        timeout: float | None,
        pool: Pool,
        max_failures: float | None = None,
    ) -> None:
        _check_pool(pool)
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
        self._seed_is_drawn = seed is None
        self._pool = pool
        self._processes = use_multiprocessing and self._num_workers > 0 and not by_keras
        self._timeout_s = checks.check_timeout(timeout)
        self._depth = 0 if by_keras or (pool is None and self._num_workers == 0) else max_queue_size
        self._max_failures = max_failures
        self._stride = 1
        self._warned_of_keras_pool = False
        self._closed = False
        self._set_plan(plan)
        self._make_runtime_state()

    def _set_plan(self, plan: Batching) -> None:
        """Starts afresh: at the first epoch of `plan`, nothing counted yet."""
        self._plan = plan
        self._batches_served = 0
        self._wait_s = 0.0
        self._position = Position(plan, None if self._seed_is_drawn else plan.seed, not isinstance(self._pool, str))
        self._failures = FailureLog(self._max_failures, plan.epoch_length // plan.num_shards)

    def _make_runtime_state(self) -> None:
        self._lock = threading.RLock()
        self._runtime: _Runtime | None = None
        self._ahead: ReadAhead | None = None  # of the pass that Keras runs
        self._ahead_of: Progress | None = None  # what that pass will go through, if it has not begun yet
        self._looks: ReadAhead | None = None  # of batches that somebody looks at, one after the other
        self._looked_at = -2
        self._outdated: ReadAhead | None = None  # requested when the source or the functions were in another state
        self._hook_is_due = False
        self._streams: weakref.WeakSet[ReadAhead] = weakref.WeakSet()

    # -- batches -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of batches in the current epoch: in a resumed one, those that were left."""
        if self._plan.is_endless:
            raise TypeError(f"{type(self).__name__} never ends, so it has no len()")
        return len(self._position)

    @property
    def num_batches(self) -> Any:
        """Number of batches in an epoch (int), or None: it never ends. Keras reads it when it starts to iterate."""
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            if self._plan.is_endless:
                return None
            self._divide()
            self._position.read(by_keras)
            return self._position.num_batches * self._stride

    @property
    def workers(self) -> int:
        """Keras's own attribute; Keras reads it when it is about to fit, evaluate or predict."""
        if is_keras(sys._getframe(1), self):
            with self._lock:
                self._position.new_call(current_call())
        return int(super().workers)

    @workers.setter
    def workers(self, value: int) -> None:
        self._workers = value

    def __getitem__(self, index: int) -> Any:
        """Batch `index` of the current epoch; arrays of shape (samples in the batch, *sample shape).

        While Keras runs a pass: the batch that this number stands for in it (docs/epochs.md).

        Raises:
            IndexError: there is no such batch.
            SampleError: user code failed on it.
            WorkerCrashed, BatchTimeout: it ended its workers, or took too long, twice.
            TooManyFailures: more samples of the epoch failed than `max_failures` allows.
            PoolClosed: the dataset was closed.
        """
        index = operator.index(index)
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            engine = self._running().engine
            asked, handle = self._ask(index, by_keras)
        batch = self._served(engine.result, handle)
        if asked is not None:
            with self._lock:
                self._position.hand_out(asked)
        return with_tuples(batch) if by_keras and keras.backend.backend() == "tensorflow" else batch

    def _ask(self, index: int, by_keras: bool) -> tuple[Asked | None, Any]:
        """What `dataset[index]` is, and the engine's handle of it."""
        if self._plan.is_endless:
            endless = ((self._position.epoch, batch) for batch in itertools.count(index, self._stride))
            return None, self._take_look(index, (self._position.epoch, index), endless)
        self._run_due_hook()
        epoch = self._position.epoch
        asked = self._position.ask(index, by_keras, self._stride)
        if self._position.epoch != epoch:
            self._failures.tell(epoch)
        run = asked.run
        if run is None:
            return asked, self._take_look(index, asked.key, map(self._position.look, range(index, len(self))))
        if asked.is_first:
            if self._ahead_of != run.base:
                self._follow(itertools.chain([asked.key], self._position.rest(run)))
            self._ahead_of = None
        if asked.is_next:
            return asked, self._take_next()
        (handle,) = self._running().engine.submit([self._position.plan.request(*asked.key)])
        return asked, handle

    def _take_look(self, index: int, key: BatchKey, keys: Iterator[BatchKey]) -> Any:
        """The handle of a batch that is looked at outside of a pass; who looks at one after the other is read ahead."""
        before, self._looked_at = self._looked_at, index
        if self._looks is None or self._looks.next_key != key:
            self._drop_looks()
            depth = self._depth if index == 0 or index == before + self._stride else 0
            self._looks = self._read_ahead(keys, depth)
        return self._looks.take()

    def _drop_looks(self) -> None:
        if self._looks is not None:
            self._looks.close()
        self._looks = None

    def _follow(self, keys: Iterator[BatchKey], of: Progress | None = None) -> None:
        """Reads ahead along `keys` for the pass that Keras runs."""
        handles: Handles = {}
        for before in (self._looks, self._ahead):
            if before is not None and before is not self._outdated:
                handles |= before.release()
        self._drop_ahead()
        self._ahead, self._ahead_of = self._read_ahead(keys, self._depth, handles), of

    def _take_next(self) -> Any:
        if self._ahead is None:
            raise PoolClosed(f"{type(self).__name__} was closed in the middle of a pass; make a new one")
        return self._ahead.take()

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch, in order; with the last of them the next epoch begins."""
        for (batch,) in self.stream():
            yield batch

    def stream(
        self, epochs: int = 1, claim: bool = False, together: int = 1, convert: Callable[[Any], Any] | None = None
    ) -> Generator[list[Any]]:
        """The batches of the next epochs in lists, read ahead across the epochs' boundaries too.

        Args:
            epochs: how many epochs.
            claim: whether these epochs are this stream's from now on: the next stream or pass takes those after them.
            together: batches in one list at most. Only those that are ready join the first; none waits for another.
            convert: applied to each batch.
        """
        with self._lock:
            self._run_due_hook()
            self._send_changes()
            iteration = self._position.iterate(epochs, claim)
            ahead = self._read_ahead((key for *_, key in iteration.places()), self._depth)
            moves = self._position.moves
        batches: list[Any] = []
        told = iteration.base.epoch
        ended = False
        try:
            for epoch, place, _ in iteration.places():
                if batches and (len(batches) == together or not ahead.is_ready()):
                    yield batches
                    batches = []
                if epoch != told:
                    self._failures.tell(told)
                    told = epoch
                if self._position.moves != moves:
                    raise RuntimeError(
                        "load_state_dict() has moved the dataset in the middle of this iteration; begin a new one"
                    )
                try:
                    batch = self._served(ahead.next)
                    batches.append(batch if convert is None else convert(batch))
                    del batch
                except Exception:
                    if batches:
                        yield batches  # those before it come out first
                    raise
                with self._lock:
                    ended = iteration.hand_out(epoch, place)
                    self._hook_is_due |= ended and iteration.moves_the_dataset
            if batches:
                yield batches
            batches = []
            self._run_due_hook()
        finally:
            ahead.close()
            if claim or ended:
                self._failures.tell(told)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in a whole epoch; a very great number if it never ends."""
        return self._position.count

    @property
    def position(self) -> Position:
        """Where the dataset is, for `BackupAndRestore`."""
        return self._position

    def first_batch(self) -> Any:
        """The first batch of the current epoch, for a look at its structure."""
        with self._lock:
            handle = self._running().engine.submit([self._position.plan.request(*self._position.look(0))])[0]
        return self._served(self._running().engine.result, handle)

    def _read_ahead(self, keys: Iterator[BatchKey], depth: int, handles: Handles | None = None) -> ReadAhead:
        ahead = ReadAhead(self._running().engine, _requests(self._position.plan, keys), depth, handles)
        self._streams.add(ahead)
        ahead.start()
        return ahead

    def _drop_ahead(self) -> None:
        self._drop_looks()
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._ahead_of = self._outdated = None

    def _served(self, load: Callable[..., Loaded], *arguments: Any) -> Any:
        self._check_open()
        started = time.perf_counter()
        try:
            loaded = load(*arguments)
        except SampleError as error:
            self._failures.record(error.failure)
            raise
        self._wait_s += time.perf_counter() - started
        self._batches_served += 1
        self._failures.add(loaded.failures)
        if loaded.failures and isinstance(self._pool, str) and multiprocessing.parent_process() is not None:
            for failure in loaded.failures:  # in a process of Keras's, from which `failures` reaches nobody
                warnings.warn(f"keras_mp: left out or replaced: {failure.describe()}", RuntimeWarning, stacklevel=2)
        return loaded.batch

    # -- epochs --------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the current one; `dataset[i]`, the next iteration and the next pass of Keras are its batches.

        A pass or an iteration that is under way goes on with its own.

        Args:
            epoch: epoch number, from 0.
        """
        epoch = checks.check_count(epoch, "epoch", 0)
        with self._lock:
            before = self._position.epoch
            self._position.set_epoch(epoch)
            if self._ahead_of is not None:
                self._drop_ahead()
            self._drop_looks()
        self._failures.tell(before)

    def on_epoch_begin(self) -> None:
        """Keras calls this before an epoch, a while before it asks for the first batch.

        Raises:
            RuntimeError: another call of Keras's is in the middle of a pass over this dataset.
            ValueError: Keras divides the data among processes (`auto_shard_dataset`), and that cannot be done.
        """
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            self._run_due_hook()
            self._divide()
            if isinstance(self._pool, str) and by_keras:
                self._warn_of_keras_pool()
            self._position.begin(current_call() if by_keras else None)
            self._send_changes()
            expected = self._position.expected()
            if expected is not None and self._depth and not self._plan.is_endless and self._ahead_of != expected:
                order, count = self._position.order(expected), self._position.count
                self._follow(((expected.epoch, order[place]) for place in expected.positions(count)), expected)

    def on_epoch_end(self) -> None:
        """Keras calls this after an epoch, and at other times; see `position`."""
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            before = self._position.epoch
            ended = self._position.end(current_call() if by_keras else None)
            if ended and self._ahead_of is None and not self._plan.is_endless:
                self._drop_ahead()
        if ended:
            self._failures.tell(before)

    def _divide(self) -> None:
        """Takes this process's share of the data, if Keras divides it among processes.

        Keras then asks each process for every n-th number. It gets the batches of its shard for them, of which each
        process has as many.
        """
        shards, index = _keras_shards()
        if shards > 1 and self._plan.num_shards > 1:
            raise ValueError(
                f"this dataset is shard {self._plan.shard} of {self._plan.num_shards}, and Keras divides it once more "
                f"among {shards} processes, so most of the data would never be seen; make the keras.distribution "
                "object with auto_shard_dataset=False, or leave out dataset.shard()"
            )
        if shards > 1 and self._seed_is_drawn and self._plan.is_ordered:
            raise ValueError(
                f"Keras divides this dataset among {shards} processes, which must all shuffle it alike; received "
                "seed=None, so pass the same seed= in each"
            )
        self._stride = shards
        if shards == 1 or self._plan.is_endless:
            return
        if (self._position.plan.num_shards, self._position.plan.shard) != (shards, index):
            self._position.use(self._plan.for_shard(shards, index))

    def _warn_of_keras_pool(self) -> None:
        if keras.backend.backend() != "tensorflow" and not self._warned_of_keras_pool:
            self._warned_of_keras_pool = True
            warnings.warn(
                f"keras_mp: pool='keras' on {keras.backend.backend()}: where Keras builds a model, or its metrics, "
                "from one batch, its own queue serves what it had read ahead for that in the next pass, so that "
                "batches are repeated and others left out in every epoch. Leave out pool= (each sample then comes "
                "once), or call fit() on data of the same shapes first",
                RuntimeWarning,
                stacklevel=3,
            )

    def _send_changes(self) -> None:
        """Gives the workers what has changed in the source or the functions since the last epoch."""
        if self._runtime is not None and self._runtime.engine.update(self._loader) is not False:
            self._drop_looks()
            self._outdated = self._ahead

    def _run_due_hook(self) -> None:
        """Calls what follows the end of an epoch: once its last batch is no longer needed."""
        self._hook_is_due = False

    # -- going on elsewhere --------------------------------------------------------------------------------------

    def shard(self, num_shards: int, index: int) -> Self:
        """This process's part of the dataset, for data-parallel training.

        Shards are disjoint, cover every epoch, and have the same number of batches; see `batching` for which samples go
        where. `batch_size` is the size on each shard.

        Args:
            num_shards: number of parts.
            index: which one, from 0.

        Raises:
            ValueError: the index is out of range, or the samples cannot be divided into so many parts.
        """
        num_shards = checks.check_count(num_shards, "num_shards")
        index = checks.check_count(index, "index", 0)
        if index >= num_shards:
            raise ValueError(f"index must be below num_shards={num_shards}, got {index}")
        self._refuse_endless("shard()")
        plan = self._plan.for_shard(num_shards, index)
        part = copy.copy(self)
        part._pool = self._pool
        part._set_plan(plan)
        part._position.set_epoch(self.epoch)
        return part

    def state_dict(self) -> dict[str, Any]:
        """Where in its epochs the dataset is: plain numbers of constant size, fit for JSON.

        What counts is what was handed out: by an iteration (also inside its loop), an export or a pass of Keras. In
        `fit` on TensorFlow and in an export that runs ahead of what the model was trained on;
        `keras_mp.BackupAndRestore` knows the difference for `fit(dataset)`.
        """
        self._refuse_endless("state_dict()")
        with self._lock:
            return self.state_of(self._position.current)

    def state_of(self, progress: Progress) -> dict[str, Any]:
        """The state of a dataset that has come as far as `progress`."""
        return {
            "version": _STATE_VERSION,
            **self._identity(),
            "epoch": progress.epoch,
            "position": progress.position,
            "missing": sorted(progress.missing),
            "permuted": progress.permuted,
            "batch_seed": self._position.batch_seed,
        }

    def _identity(self) -> dict[str, Any]:
        plan = self._position.plan
        return {
            "loader": type(self._loader).__name__,
            "length": plan.length,
            "epoch_length": plan.epoch_length,
            "batch_size": plan.batch_size,
            "shuffle": plan.shuffle,
            "order": plan.order is not None,
            "drop_remainder": plan.drop_remainder,
            "num_shards": plan.num_shards,
            "shard": plan.shard,
            "seed": plan.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state_dict()` was taken: the current epoch is then what was left of that one.

        Iteration, `dataset[i]`, `len(dataset)`, the next pass of Keras and an export made now give the batches that
        had not been handed out, bit for bit, whatever the number of workers. The epoch after that is whole again.
        A dataset made with `seed=None` takes the seed of the state. An iteration that is under way raises
        `RuntimeError` when it is asked for its next batch.

        Args:
            state: what `state_dict()` returned, for a dataset of the same source, seed and batches.

        Raises:
            ValueError: it is of another dataset or version; the message says which number differs.
        """
        self._refuse_endless("load_state_dict()")
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"state has version {state.get('version')!r}, but this keras_mp reads version {_STATE_VERSION}: seeds "
                "have other meanings in others; start the epoch over with set_epoch()"
            )
        with self._lock:
            if self._seed_is_drawn and "seed" in state:
                self._reseed(checks.check_count(state["seed"], "seed", 0))
            for name, mine in self._identity().items():
                if state.get(name) != mine:
                    raise ValueError(
                        f"state is of another dataset: {name} is {state.get(name)!r} there and {mine!r} here; make the "
                        "dataset as it was when the state was taken"
                    )
            self._position.move(self._progress_in(state))
            self._position.batch_seed = state.get("batch_seed")
            self._drop_ahead()

    def _progress_in(self, state: Mapping[str, Any]) -> Progress:
        epoch, position, count = state.get("epoch"), state.get("position"), self._position.count
        missing, permuted = state.get("missing"), state.get("permuted")
        if not (isinstance(epoch, int) and epoch >= 0):
            raise ValueError(f"state has epoch {epoch!r}; it must be a number from 0")
        if not (isinstance(position, int) and 0 <= position <= count):
            raise ValueError(f"state has position {position!r}, but the dataset has {count} batches in an epoch")
        if not (isinstance(missing, list) and all(isinstance(at, int) and 0 <= at < position for at in missing)):
            raise ValueError(f"state has missing {missing!r}; it must list positions from 0 to {position - 1}")
        if not isinstance(permuted, bool):
            raise ValueError(f"state has permuted {permuted!r}; it must be a bool")
        return Progress(epoch, position, set(missing), permuted)

    def _reseed(self, seed: int) -> None:
        self._loader = dataclasses.replace(self._loader, seed=seed)  # type: ignore[type-var]  # both loaders are dataclasses
        self._plan = dataclasses.replace(self._plan, seed=seed)
        self._position.use(dataclasses.replace(self._position.plan, seed=seed))
        self._seed_is_drawn = False
        self._send_changes()

    def _refuse_endless(self, what: str) -> None:
        if self._plan.is_endless:
            raise TypeError(
                f"{what} has no meaning for a dataset that never ends (num_batches=None): it has no epoch to divide or "
                "to go on with"
            )

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

    @property
    def batch_axis(self) -> int | None:
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

        Batches already taken stay valid. An iteration or an export that is in use raises `PoolClosed` for the next one.
        The end of the process closes every dataset.
        """
        with self._lock:
            if self._closed:
                return
            self._drop_ahead()
            self._closed = True
            runtime, self._runtime = self._runtime, None
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        if runtime is not None:
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
        state = {**self.__dict__, "_pool": self._pool if isinstance(self._pool, str) else None}
        for name in ("_lock", "_runtime", "_ahead", "_outdated", "_looks", "_streams"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_runtime_state()

    def _running(self) -> _Runtime:
        runtime = self._runtime
        if runtime is not None:
            return runtime
        with self._lock:
            self._check_open()
            if self._runtime is None:
                self._runtime = self._start()
                exits.close_at_exit(self)
            return self._runtime

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosed(f"{type(self).__name__} has been closed; make a new one")

    def _start(self) -> _Runtime:
        engine: Engine
        pool: WorkerPool | None = None
        if isinstance(self._pool, concurrent.futures.Executor):
            engine = ExecutorEngine(self._pool, self._loader)
        elif isinstance(self._pool, str) or self._num_workers == 0:
            engine = InlineEngine(self._loader)
        elif not self._processes:
            engine = ThreadsEngine(self._num_workers, self._loader)
        else:
            pool = self._pool if isinstance(self._pool, WorkerPool) else shared_pool(self._num_workers)
            engine = pool.client(self._loader, self._timeout_s)
            source = getattr(self._loader, "source", None)
            if type(source) is np.ndarray and (shared := engine.shared_view(source)) is not None:
                self._loader = copy.copy(self._loader)
                self._loader.source = shared  # the original may go, if the user does not keep it
                engine.update(self._loader)
        return _Runtime(engine, pool)

    def _workers_text(self) -> str:
        if isinstance(self._pool, str):
            return f"workers={self._num_workers} (Keras's pool)"
        if isinstance(self._pool, concurrent.futures.Executor):
            return f"pool={type(self._pool).__name__}"
        kind = "processes" if self._processes else "threads"
        return f"workers={self._num_workers} {kind if self._num_workers else '(in-process)'}"


def _requests(plan: Batching, keys: Iterator[BatchKey]) -> Iterator[Request]:
    return (plan.request(*key) for key in keys)


def _keras_shards() -> tuple[int, int]:
    """Among how many processes Keras divides datasets, from 3.16 on, and which of them this is."""
    distribution = keras.distribution.distribution()
    if not getattr(distribution, "auto_shard_dataset", False):
        return 1, 0
    return getattr(distribution, "num_data_shards", 1), getattr(distribution, "data_shard_id", 0)


def _check_pool(pool: Any) -> Any:
    """None, "keras", a WorkerPool or an executor.

    Raises:
        TypeError: it is none of them.
    """
    if (
        pool is None
        or (isinstance(pool, str) and pool == "keras")
        or isinstance(pool, WorkerPool | concurrent.futures.Executor)
    ):
        return pool
    raise TypeError(
        "pool must be None, 'keras', a keras_mp.WorkerPool or a concurrent.futures.Executor, got "
        f"{short_repr(pool, 80)}"
    )
