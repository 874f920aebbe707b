"""Which epoch it is, what of it has been handed out, and what is left: the one owner of these.

Keras asks for the batches of a pass by number, in an order of its own that differs between versions. So a number is a
handle: the first number that is asked in a pass gets the first batch of our order, the next new number the next one,
and a number that is asked again gets its batch again. Keras asks each number once, so each batch is served once (P1),
in our order (P2), and what comes next is always known.

Our order is that of the plan. Where the plan does not shuffle and Keras does (`fit(shuffle=True)`, or a pass begins
with another number than the first), it is a permutation of the batches that depends on (seed, epoch).

What is known of Keras, 3.12 to 3.16, and all that is relied on:

* whoever runs a pass reads `num_batches` and right after that, on the same thread, asks for its first batch;
* `on_epoch_begin` comes before that, `on_epoch_end` some time after the last batch, and again at other times. With
  `steps_per_epoch` one pass goes on over several of Keras's epochs, and the next pass may begin before the
  `on_epoch_end` of the last. JAX and torch begin and end a pass early to build a model from its first batch.

A pass that is given up half-way leaves its epoch open, and the next pass gets it whole. Nothing here takes a lock; the
caller holds one.
"""

from __future__ import annotations

import array
import functools
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_mp.plan.batching import Batching
from keras_mp.plan.passes import Asked, Call, Pass
from keras_mp.plan.progress import BatchKey, Progress
from keras_mp.plan.seeds import Stream, seed_sequence


class Position:
    """Where a dataset is.

    Args:
        plan: what makes the batches of an epoch.
        batch_seed: root of the order of batches where Keras shuffles them. None: taken from the state of the global
            `random` when the first pass begins, so that `keras.utils.set_random_seed` repeats it.
        sees_requests: whether batches are asked for in this process. If not (Keras's own process pool), the first
            `on_epoch_end` after an `on_epoch_begin` ends the epoch.
    """

    def __init__(self, plan: Batching, batch_seed: int | None, sees_requests: bool = True) -> None:
        self.plan = plan
        self.count = plan.num_batches
        self.batch_seed = batch_seed
        self.moves = 0  # how often it has been moved elsewhere within or between epochs
        self.limit: int | None = None  # batches in the next pass at most
        self._sees_requests = sees_requests
        self._start = Progress()  # what is left of the epoch for whoever begins now
        self._current = self._start  # of whoever was last handed out something
        self._pass: Pass | None = None
        self._passes: dict[int, Pass] = {}  # the last one of each of the last two epochs
        self._begun_by: Call | None = None
        self._is_begun = False
        self._is_asked = False  # since the last `on_epoch_begin`, by whoever runs the pass
        self._made_at: dict[Call, int] = {}  # the instruction at which a call first made ready
        self._calls: list[Call] = []  # those that are not over and have run a pass
        self._read_by: dict[int, bool] = {}  # by thread: whether it was Keras that last read `num_batches` on it

    # -- the epoch -----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._start.epoch

    @property
    def start(self) -> Progress:
        """What is left of the current epoch for whoever begins now."""
        return self._start.copy()

    @property
    def current(self) -> Progress:
        """How far that has come which was last handed out something; if it has come to the end, the next epoch."""
        return self._or_next(self._current.copy())

    def __len__(self) -> int:
        """Batches in the current epoch: in a resumed one, those that were left."""
        return self._start.left(self.count)

    @property
    def num_batches(self) -> int:
        """Batches in the pass that is about to begin; before it is, in a whole epoch.

        `fit` reads it once for all of its epochs, before it begins the first, and again for each pass.
        """
        return min(len(self), self.limit or len(self)) if self._is_begun else self.count

    def use(self, plan: Batching) -> None:
        """Works with another division of the same samples."""
        self.plan, self.count = plan, plan.num_batches
        self._pass = None
        self.set_epoch(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the current one. A pass that is under way goes on with its own."""
        self._start = self._current = Progress(epoch)
        self.limit = None

    def move(self, progress: Progress) -> None:
        """Makes what `progress` says is left of its epoch the current epoch."""
        self.moves += 1
        self._start = self._current = self._or_next(progress)
        self.limit = None

    def order(self, progress: Progress) -> Sequence[int]:
        """The batches of an epoch by position."""
        if not progress.permuted:
            return range(self.count)
        return _permuted(self.count, self._batch_root(), progress.epoch)

    def follow(self, progress: Progress) -> None:
        """`progress` is of whoever is handed out something now."""
        self._current = progress

    def follows(self, progress: Progress) -> bool:
        """Whether nobody else has been handed out something since."""
        return self._current is progress

    def look(self, index: int, by_keras: bool = False) -> BatchKey:
        """The batch that `index` is outside of a pass.

        Keras looks at two for what varies in them: with buckets, or where fewer are left, at the epoch's first two.

        Raises:
            IndexError: there is none.
        """
        start, count = self._start, len(self)
        if by_keras and 0 <= index < self.count and (index >= count or self.plan.buckets_digest):
            start, count = Progress(start.epoch, permuted=start.permuted), self.count
        if not -count <= index < count:
            raise IndexError(f"batch {index} is out of range: the dataset has {count} batches")
        return start.epoch, self.order(start)[start.position_of(index % count)]

    def finish(self, progress: Progress) -> None:
        """All of an epoch has been handed out: if it is the current one, the next begins."""
        if self._current is progress and progress.epoch == self.epoch:
            self.set_epoch(self.epoch + 1)

    def _or_next(self, progress: Progress) -> Progress:
        if progress.left(self.count):
            return progress
        return Progress(progress.epoch + 1, permuted=progress.permuted)

    def _batch_root(self) -> int:
        if self.plan.num_shards > 1 and self.batch_seed is None:
            return 0  # the same on all shards
        if self.batch_seed is None:
            generator = random.Random()
            generator.setstate(random.getstate())
            self.batch_seed = generator.getrandbits(31)
        return self.batch_seed

    def claim(self, epochs: int) -> None:
        """The current epoch and those after it, `epochs` in all, are another's: who begins now takes the next."""
        self._start = Progress(self.epoch + epochs)

    @property
    def in_pass(self) -> bool:
        """Whether a pass is under way, or a call of Keras's that has run one is not over."""
        self._calls = [call for call in self._calls if call.is_running]
        return bool(self._calls) or (self._pass is not None and self._pass.call is None)

    def __getstate__(self) -> dict[str, Any]:
        fresh = Position(self.plan, self.batch_seed, self._sees_requests)
        fresh.move(self.start)
        return fresh.__dict__

    # -- passes of Keras -----------------------------------------------------------------------------------------

    def new_call(self, call: Call | None) -> None:
        """Keras makes ready for a call of `fit`, `evaluate` or `predict`.

        Raises:
            RuntimeError: another call is in the middle of a pass over the same dataset.
        """
        again = call is None or self._made_at.get(call, call.at) == call.at
        self._refuse_second_pass(call if again else None)  # `fit` may make ready to validate, too
        if not again:
            return
        if self._pass is not None and not self._pass.is_complete:
            self._pass, self._is_begun = None, False  # it was given up
        self._made_at = {made: at for made, at in self._made_at.items() if made.is_running}
        if call is not None:
            self._made_at[call] = call.at

    def begin(self, call: Call | None) -> None:
        """`on_epoch_begin` was called, from `call`.

        Raises:
            RuntimeError: another call is in the middle of a pass over the same dataset.
        """
        self._refuse_second_pass(call)
        if call is not None and call not in self._calls:
            self._calls = [*(other for other in self._calls if other.is_running), call]
        self._is_begun, self._begun_by, self._is_asked = True, call, False
        if not self.plan.is_ordered:
            self._batch_root()  # on this thread, where nobody else draws

    def expected(self) -> Progress | None:
        """What the pass that is about to begin will go through, as far as can be told; None: none is about to."""
        run = self._pass
        if not self._is_begun or (run is not None and not run.is_complete):
            return None
        base = self.start if run is None else Progress(run.base.epoch + 1)
        if not self._is_settled(base):
            base.permuted = self._is_shuffled(base.epoch)
        return base

    def end(self, call: Call | None) -> bool:
        """`on_epoch_end` was called, from `call`; whether that ended an epoch."""
        run = self._pass
        if run is not None and run.call not in (None, call) and run.call.is_running:
            return False  # another call makes ready, and will be refused
        was_begun, self._is_begun = self._is_begun, False
        if not self._sees_requests and was_begun:
            self.set_epoch(self.epoch + 1)
            return True
        if run is None or not run.is_complete:
            return False
        return self._end_pass(run)

    def read(self, by_keras: bool) -> None:
        """`num_batches` was read on this thread."""
        self._read_by[threading.get_ident()] = by_keras

    def ask(self, number: int, by_keras: bool, stride: int = 1) -> Asked:
        """`number` is asked for.

        Args:
            number: batch number, from 0; negative ones count from the end.
            by_keras: whether Keras asks.
            stride: among how many processes the numbers of a pass are divided.

        Raises:
            IndexError: there is no such batch.
        """
        is_first = self._read_by.pop(threading.get_ident(), None) == by_keras and self._may_begin(by_keras)
        run = self._begin_pass(number, by_keras, stride) if is_first else self._pass_of(by_keras)
        counts = run is not None and by_keras == run.by_keras
        if run is None or not run.has(number, counts):
            return Asked(self.look(number, by_keras and run is None))
        self._is_asked |= counts
        position, is_next = run.place(number)
        if counts:
            run.ask(number, position)
        key = run.progress.epoch, self.order(run.progress)[position]
        return Asked(key, run, position, is_next, is_first, counts)

    def hand_out(self, asked: Asked) -> None:
        """What was asked for has been loaded and goes to whoever asked."""
        if asked.run is not None and asked.counts:
            asked.run.progress.hand_out(asked.position)

    def rest(self, run: Pass) -> Iterator[BatchKey]:
        """The batches of a pass that no number stands for yet."""
        order, epoch = self.order(run.progress), run.progress.epoch
        return ((epoch, order[position]) for position in run.rest())

    def state_after(self, epoch: int, done: int) -> Progress:
        """What is left after the first `done` batches that the last pass over `epoch` was asked for."""
        run = self._passes.get(epoch)
        if run is None:
            return self.start if self.epoch == epoch else Progress(epoch)
        progress = run.base.copy()
        progress.permuted = run.progress.permuted
        for position in run.served[:done]:
            progress.hand_out(position)
        return self._or_next(progress)

    def _refuse_second_pass(self, call: Call | None) -> None:
        run = self._pass
        is_open = run is not None and not run.is_complete
        other = run.call if run is not None and is_open else self._begun_by if self._is_begun else None
        for known in self._calls:
            if known.steps and known.steps < self.count:  # its passes go on over several of its epochs
                other = other or known
        if other is None or other == call or not other.is_running:
            return
        raise RuntimeError(
            f"{other.name}() is in the middle of a pass over this dataset (epoch {self.epoch}), and its batches cannot "
            "be told from those of a second pass. Make a second dataset for evaluate(), predict() or validation_data: "
            "it is cheap, as datasets share their workers"
        )

    def _may_begin(self, by_keras: bool) -> bool:
        """Whether a pass may begin with the request that follows a reading of `num_batches`."""
        if not self._sees_requests:
            return False
        run = self._pass
        if run is None or run.by_keras != by_keras:
            return self._is_begun and (run is None or by_keras)
        return self._is_begun and (run.is_complete or not self._is_asked)

    def _begin_pass(self, number: int, by_keras: bool, stride: int) -> Pass:
        if self._pass is not None and self._pass.is_complete:
            self._end_pass(self._pass)
        base, call = self.start, self._begun_by
        if not self._is_settled(base):
            first = 0 if stride == 1 else self.plan.shard
            base.permuted = number != first or self._is_shuffled(base.epoch)
        left = base.left(self.count)
        run = Pass(base, self.count, min(left, self.limit or left), stride, by_keras, call)
        self._pass, self._current = run, run.progress
        self._passes = {epoch: self._passes[epoch] for epoch in self._passes if epoch == base.epoch - 1}
        self._passes[base.epoch] = run
        return run

    def _end_pass(self, run: Pass) -> bool:
        self._pass = None
        if run.is_whole:
            self.finish(run.progress)
        elif self.follows(run.progress):
            self._start = self._current = run.progress.copy()
            self.limit = None
        return run.is_whole

    def _pass_of(self, by_keras: bool) -> Pass | None:
        """The pass that a request belongs to."""
        run = self._pass
        if run is None or by_keras or run.call is None or run.call.is_running:
            return run
        self._pass, self._is_begun = None, False  # it was given up, or Keras left it open (`steps_per_epoch`)
        return None

    def _is_shuffled(self, epoch: int) -> bool:
        """Whether whoever has begun a pass over `epoch` shuffles, before the first number shows it."""
        before = self._passes.get(epoch - 1)
        if self._begun_by is not None:
            return self._begun_by.shuffle
        return before is not None and before.call is None and before.base.permuted

    def _is_settled(self, base: Progress) -> bool:
        """Whether its order does not depend on Keras."""
        return self.plan.is_ordered or base.permuted or base.position > 0


@functools.lru_cache(maxsize=4)
def _permuted(count: int, seed: int, epoch: int) -> Sequence[int]:
    rng = np.random.Generator(np.random.PCG64(seed_sequence(Stream.BATCH_ORDER, seed, epoch)))
    return array.array("q", rng.permutation(count).tolist())
