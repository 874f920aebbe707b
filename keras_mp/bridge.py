"""What Keras sees of a dataset of ours, whatever its batches are made of: a `keras.utils.PyDataset`.

Keras is told `workers=1`, so it asks for one batch after the other from a plain loop, and this module reads ahead on
our workers. Keras's own queue would have the batches it read ahead before a model was built (JAX, torch) come out
again in the first real pass, lose as many at its end, and wait a tenth of a second at the end of every epoch. With
`pool="keras"` the queue and the process pool are Keras's.

Which batch a number stands for, and which epoch it is, is decided in `position`.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import operator
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import keras

from keras_mp import auto_shard, exits
from keras_mp.callers import current_call, is_keras, warn_of_keras_pool
from keras_mp.engines.choice import EngineChoice, Running
from keras_mp.engines.prefetch import Prefetch
from keras_mp.errors import PoolClosed, SampleError, warn_user
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.failures import FailureLog
from keras_mp.plan.batching import Batching
from keras_mp.plan.iteration import Iteration
from keras_mp.plan.passes import Asked
from keras_mp.plan.position import Position
from keras_mp.plan.progress import BatchKey
from keras_mp.plan.request import Request
from keras_mp.stats import ServedSoFar
from keras_mp.tensors import for_tensorflow


class Bridge(keras.utils.PyDataset):
    """The batches of a plan, made by a loader: to Keras, to a plain loop, and to an export.

    Args:
        loader: what makes a batch.
        plan: which samples make it.
        choice: where it is made.
        seed_is_drawn: whether the plan's seed is none of the user's.
        max_failures: how many samples of an epoch may fail: a count (int), a share (float), or None for no limit.
    """

    def __init__(
        self,
        loader: Loader,
        plan: Batching,
        choice: EngineChoice,
        *,
        seed_is_drawn: bool,
        max_failures: float | None,
    ) -> None:
        super().__init__(
            workers=choice.workers if choice.by_keras else 1,
            use_multiprocessing=choice.by_keras,
            max_queue_size=choice.queue_size,
        )
        self._loader = loader
        self._choice = choice
        self._seed_is_drawn = seed_is_drawn
        self._max_failures = max_failures
        self._stride = 1  # among how many processes Keras divides the numbers
        self._warned_of_keras_pool = False
        self._closed = False
        self._set_plan(plan)
        self._make_runtime_state()

    def _set_plan(self, plan: Batching) -> None:
        """Starts afresh: at the first epoch of `plan`, nothing counted yet."""
        self._plan = plan
        self._position = Position(plan, None if self._seed_is_drawn else plan.seed, not self._choice.by_keras)
        self._failures = FailureLog(self._max_failures, plan.epoch_length // plan.num_shards)

    def _make_runtime_state(self) -> None:
        self._lock = threading.RLock()
        self._served_so_far = ServedSoFar()
        self._runtime: Running | None = None
        self._prefetch = Prefetch(self._choice.limit())
        self._hook_is_due = False

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
            self._take_share()
            self._position.read(by_keras)
            return self._position.num_batches * self._stride

    @keras.utils.PyDataset.workers.getter  # type: ignore[untyped-decorator]
    def workers(self) -> int:
        """Keras's own attribute; Keras reads it when it is about to fit, evaluate or predict."""
        if is_keras(sys._getframe(1), self):
            with self._lock:
                self._position.new_call(current_call())
        return int(super().workers)

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
        on_tensorflow = by_keras and keras.backend.backend() == "tensorflow"
        self._served_so_far.begin(not on_tensorflow, asked is not None and asked.is_first)
        batch = self._served(engine.result, handle)
        if asked is not None:
            with self._lock:
                self._position.hand_out(asked)
                self._served_so_far.handed_out.add(asked.run is not None)
                self._prefetch.top_up()
        return for_tensorflow(batch) if on_tensorflow else batch

    def _ask(self, index: int, by_keras: bool) -> tuple[Asked | None, Any]:
        """What `dataset[index]` is, and the engine's handle of it."""
        if self._plan.is_endless:
            keys = zip(itertools.repeat(self._position.epoch), itertools.count(index + self._stride, self._stride))
            return None, self._look(index, (self._position.epoch, index), keys)
        self._run_due_hook()
        epoch = self._position.epoch
        asked = self._position.ask(index, by_keras, self._stride)
        if self._position.epoch != epoch:
            self._failures.warn(epoch)
        if (run := asked.run) is None:
            return asked, self._look(index, asked.key, map(self._position.look, range(index + 1, len(self))))
        if asked.is_first:
            if self._prefetch.expected != run.base:
                rest = itertools.chain([asked.key], self._position.rest(run))
                self._prefetch.follow(self._running().engine, self._requests(rest))
            self._prefetch.expected = None
        if asked.is_next:
            return asked, self._prefetch.next()
        (handle,) = self._running().engine.submit([self._position.plan.request(*asked.key)])
        return asked, handle

    def _look(self, index: int, key: BatchKey, keys: Iterator[BatchKey]) -> Any:
        requests = self._requests(itertools.chain([key], keys))
        return self._prefetch.look(self._running().engine, index, self._stride, key, requests)

    def _requests(self, keys: Iterator[BatchKey]) -> Iterator[Request]:
        plan = self._position.plan
        return (plan.request(*key) for key in keys)

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
            iteration = Iteration(self._position, epochs, claim)
            requests = self._requests(key for *_, key in iteration.places())
            ahead = self._prefetch.open(self._running().engine, requests)
            moves = self._position.moves
        self._served_so_far.begin(not claim)
        batches: list[Any] = []
        told, ended = iteration.first_epoch, False
        try:
            for epoch, place, _ in iteration.places():
                if batches and (len(batches) == together or not ahead.is_ready()):
                    yield batches
                    batches = []
                if epoch != told:
                    self._failures.warn(told)
                    told = epoch
                if self._position.moves != moves:
                    raise RuntimeError(
                        "load_state_dict() has moved the dataset in the middle of this iteration; begin a new one"
                    )
                try:
                    batch = self._served(ahead.next)
                    batches.append(batch if convert is None else convert(batch))
                    self._served_so_far.handed_out.add()
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
                self._failures.warn(told)

    def _served(self, load: Callable[..., Loaded], *arguments: Any) -> Any:
        self._check_open()
        try:
            loaded = self._served_so_far.serve(load, *arguments)
        except SampleError as error:
            self._failures.record(error.failure)
            raise
        self._failures.add(loaded.failures)
        if loaded.failures and self._choice.by_keras and multiprocessing.parent_process() is not None:
            for failure in loaded.failures:  # in a process of Keras's, from which `failures` reaches nobody
                warn_user(f"keras_mp: left out or replaced: {failure.describe()}")
        return loaded.batch

    # -- epochs --------------------------------------------------------------------------------------------------

    def on_epoch_begin(self) -> None:
        """Keras calls this before an epoch, a while before it asks for the first batch.

        Raises:
            RuntimeError: another call of Keras's is in the middle of a pass over this dataset.
            ValueError: Keras divides the data among processes (`auto_shard_dataset`), and that cannot be done.
        """
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            self._run_due_hook()
            self._take_share()
            if self._choice.by_keras and by_keras and not self._warned_of_keras_pool:
                self._warned_of_keras_pool = True
                warn_of_keras_pool()
            self._position.begin(current_call() if by_keras else None)
            self._send_changes()
            expected = self._position.expected()
            if expected is None or self._choice.is_inline or self._plan.is_endless:
                return
            if self._prefetch.expected != expected:
                order, count = self._position.order(expected), self._position.count
                keys = ((expected.epoch, order[place]) for place in expected.positions(count))
                self._prefetch.follow(self._running().engine, self._requests(keys), expected)

    def on_epoch_end(self) -> None:
        """Keras calls this after an epoch, and at other times; see `position`."""
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            before = self._position.epoch
            ended = self._position.end(current_call() if by_keras else None)
            if ended and self._prefetch.expected is None and not self._plan.is_endless:
                self._prefetch.drop()
        if ended:
            self._failures.warn(before)

    def _take_share(self) -> None:
        self._stride, plan = auto_shard.share_of(self._plan, self._seed_is_drawn)
        if (plan.num_shards, plan.shard) != (self._position.plan.num_shards, self._position.plan.shard):
            self._position.use(plan)

    def _send_changes(self) -> None:
        """Gives the workers what has changed in the source or the functions since the last epoch."""
        if self._runtime is not None and self._runtime.engine.update(self._loader) is not False:
            self._prefetch.outdate()

    def _run_due_hook(self) -> None:
        """Calls what follows the end of an epoch: once its last batch is no longer needed."""
        self._hook_is_due = False

    def _running(self) -> Running:
        with self._lock:
            if self._runtime is None:
                self._check_open()
                self._served_so_far.start()
                self._runtime = self._choice.start(self._loader)
                self._loader = self._runtime.loader
                exits.close_at_exit(self)
            return self._runtime

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosed(f"{type(self).__name__} has been closed; make a new one")

    def close(self) -> None:
        """Drops what is being loaded and ends the workers, unless another dataset uses them. May be called twice.

        Batches already taken stay valid. An iteration or an export that is in use raises `PoolClosed` for the next one.
        The end of the process closes every dataset.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            runtime, self._runtime = self._runtime, None
            self._prefetch.close()
        if runtime is not None:
            runtime.close()
        self._failures.warn()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _part(self, plan: Batching, choice: EngineChoice | None = None) -> Self:
        """A dataset like this one, of another plan, its batches maybe made elsewhere."""
        part = copy.copy(self)
        part._choice = choice or self._choice
        part._make_runtime_state()
        part._set_plan(plan)
        part._position.set_epoch(self.epoch)
        return part

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_choice": self._choice.without_pool()}
        for name in ("_lock", "_runtime", "_prefetch", "_served_so_far"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_runtime_state()
