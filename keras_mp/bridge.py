"""What Keras sees of a dataset of ours, whatever its batches are made of: a `keras.utils.PyDataset`.

Keras is told `workers=1`, so it asks for one batch after the other from a plain loop, and this module reads ahead on
our workers. Keras's own queue would have the batches it read ahead before a model was built (JAX, torch) come out
again in the first real pass, lose as many at its end, and wait a tenth of a second at the end of every epoch. With
`pool="keras"` the queue and the process pool are Keras's.

Which batch a number stands for, and which epoch it is, is decided in `position`.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import keras

from keras_mp import auto_shard
from keras_mp.callers import current_call, fixes_shapes, is_keras, warn_of_keras_pool
from keras_mp.errors import StreamEnded
from keras_mp.lifecycle import Lifecycle
from keras_mp.loading.base import Loaded
from keras_mp.plan.batching import ENDLESS
from keras_mp.plan.iteration import Iteration
from keras_mp.plan.passes import Asked
from keras_mp.plan.progress import BatchKey
from keras_mp.tensors import for_keras


class Bridge(Lifecycle):
    """The batches of a plan, made by a loader: to Keras, to a plain loop, and to an export."""

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
            return self._position.num_batches * self._stride if self._plan.counts_batches else None

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
        on_tensorflow = by_keras and keras.backend.backend() == "tensorflow"
        with self._lock:
            asked, load = self._ask(index, by_keras, on_tensorflow and fixes_shapes(index))
        self._served_so_far.begin(not on_tensorflow, asked is not None and asked.is_first)
        batch = self._served((self._position.epoch, index) if asked is None else asked.key, load)
        if asked is not None:
            with self._lock:
                self._position.hand_out(asked)
                self._follow(asked)
                self._served_so_far.handed_out.add(asked.run is not None)
                self._prefetch.top_up()
        return for_keras(batch, self._choice.by_keras) if by_keras else batch

    def _follow(self, asked: Asked) -> None:
        """What was asked for goes to whoever asked."""

    def _place_of(self, epoch: int, place: int) -> tuple[int, int]:
        """Epoch and position of the batch that is asked for as this one."""
        return epoch, place

    def _ask(self, index: int, by_keras: bool, for_shapes: bool) -> tuple[Asked | None, Callable[[], Loaded]]:
        """What `dataset[index]` is, and what waits for it."""
        engine = self._running().engine
        if self._plan.is_endless:
            keys = zip(itertools.repeat(self._position.epoch), itertools.count(index + self._stride, self._stride))
            return None, self._look(index, (self._position.epoch, index), keys)
        self._run_due_hook()
        epoch = self._position.epoch
        asked = self._position.ask(index, by_keras, self._stride)
        if self._position.epoch != epoch:
            self._say_what_came_of(epoch)
        if (run := asked.run) is None:
            for_shapes &= self._position.num_batches * self._stride > 1
            others = map(self._position.look, range(index + 1, len(self._position)))
            return asked, self._look(index, asked.key, others, for_shapes, ENDLESS if by_keras else 0)
        if asked.is_first:
            if self._prefetch.expected != run.base:
                rest = itertools.chain([asked.key], self._position.rest(run))
                self._prefetch.follow(engine, self._requests(rest, ENDLESS))
            self._prefetch.expected = None
        if asked.is_next:
            return asked, functools.partial(engine.result, self._prefetch.next())
        again = list(self._requests(iter([asked.key]), ENDLESS))
        return asked, functools.partial(engine.result, *engine.submit(again))

    def _look(
        self,
        index: int,
        key: BatchKey,
        keys: Iterator[BatchKey],
        for_shapes: bool = False,
        further_epochs: int = 0,
    ) -> Any:
        engine, requests = self._running().engine, self._requests(itertools.chain([key], keys), further_epochs)
        take = functools.partial(self._prefetch.look, engine, index, self._stride, key, requests)
        if for_shapes:
            (request,) = self._requests(iter([key]), further_epochs)
            return self._looks.look(engine, self._loader, index, request, take)
        return functools.partial(engine.result, take())

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
            requests = self._requests((key for *_, key in iteration.places()), epochs - 1)
            ahead = self._prefetch.open(self._running().engine, requests)
            moves = self._position.moves
        self._served_so_far.begin(not claim)
        batches, told, ended = list[Any](), iteration.first_epoch, False
        try:
            for epoch, place, key in iteration.places():
                if batches and (len(batches) == together or not ahead.is_ready()):
                    yield batches
                    batches = []
                told = self._say_if_over(told, self._place_of(epoch, place)[0])
                if self._position.moves != moves:
                    raise RuntimeError(
                        "load_state_dict() has moved the dataset in the middle of this iteration; begin a new one"
                    )
                try:
                    batch = self._served(key, ahead.next)
                    batches.append(batch if convert is None else convert(batch))
                    self._served_so_far.handed_out.add()
                    del batch
                except StreamEnded as end:
                    with self._lock:
                        self._failures.add(end.failures)
                        iteration.end()
                        self._hook_is_due |= iteration.moves_the_dataset
                    ended = True
                    break
                except Exception:
                    if batches:
                        yield batches  # those before it come out first
                    raise
                with self._lock:
                    epoch, place = self._place_of(epoch, place)
                    told = self._say_if_over(told, epoch)
                    ended = iteration.hand_out(epoch, place)
                    self._hook_is_due |= ended and iteration.moves_the_dataset
            if batches:
                yield batches
                batches = []
            self._run_due_hook()
        finally:
            ahead.close()
            if claim or ended:
                self._say_what_came_of(told)

    def _say_if_over(self, told: int, epoch: int) -> int:
        if epoch != told:
            self._say_what_came_of(told)
        return epoch

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
                self._prefetch.follow(self._running().engine, self._requests(keys, ENDLESS), expected)

    def on_epoch_end(self) -> None:
        """Keras calls this after an epoch, and at other times; see `position`."""
        by_keras = is_keras(sys._getframe(1), self)
        with self._lock:
            before = self._position.epoch
            ended = self._position.end(current_call() if by_keras else None)
            if ended and self._prefetch.expected is None and not self._plan.is_endless:
                self._prefetch.drop()
        if ended:
            self._say_what_came_of(before)

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
