"""Where the lanes of a stream stood before each of the last batches: what a state is taken from and begins with.

Whoever has batches made adds to it, and any thread may ask it: the caller holds its lock for both.
"""

from __future__ import annotations

import collections
import itertools
import threading

from keras_mp.plan.batching import ENDLESS
from keras_mp.plan.lanes import Checkpoint, LanePlan, Step
from keras_mp.plan.progress import Progress

# How far behind what has been made a state may be taken: `fit` on TensorFlow runs ahead of the training by far less.
_STEPS_KEPT = 4096
_EPOCHS_KEPT = 4


class _Epoch:
    """What is known of an epoch: a checkpoint, and what the batches after that have changed."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.steps: collections.deque[Step] = collections.deque()

    @property
    def stop(self) -> int:
        return self.base.number + len(self.steps)

    def before(self, number: int) -> Checkpoint:
        return self.base.after(itertools.islice(self.steps, number - self.base.number))


class Course:
    """The checkpoints of a stream.

    Attributes:
        lock: held while it is used. No finaliser waits for it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._epochs: dict[_Key, _Epoch] = {}
        self._totals: dict[_Key, int] = {}  # batches in the epochs that were gone through to their end
        self._located: dict[_Key, tuple[int, int]] = {}  # counted from there on: the last epoch, and its first batch

    def add(self, plan: LanePlan, epoch: int, number: int, step: Step) -> None:
        """The batch `number` has been made, after all before it."""
        known = self._known(plan, epoch)
        place = number - known.base.number
        if not 0 <= place <= len(known.steps):
            return
        if place < len(known.steps):
            if known.steps[place] == step:
                return
            while len(known.steps) > place:  # the shards are others now
                known.steps.pop()
        known.steps.append(step)
        if len(known.steps) > _STEPS_KEPT:
            known.base = known.base.after([known.steps.popleft()])

    def end(self, plan: LanePlan, epoch: int, total: int) -> None:
        """The epoch has been found to have `total` batches."""
        self._totals[_key(plan, epoch)] = total

    def nearest(self, plan: LanePlan, epoch: int, number: int) -> Checkpoint:
        """The last known checkpoint that is not behind the batch `number`."""
        known = self._epochs.get(_key(plan, epoch))
        if known is None or known.base.number > number:
            return Checkpoint.start(plan)
        return known.before(min(number, known.stop))

    def locate(self, plan: LanePlan, epoch: int, number: int, goes_on: int) -> tuple[int, int]:
        """Epoch and number of a batch that is counted from an earlier epoch on, by `goes_on` epochs at most."""
        key = _key(plan, epoch)
        reached, first = self._located.get(key, (epoch, 0))
        if number < first or reached - epoch > goes_on:
            reached, first = epoch, 0
        while reached - epoch < goes_on and (total := self._totals.get(_key(plan, reached))):
            if number - first < total:
                break
            reached, first = reached + 1, first + total
        self._located[key] = reached, first
        return reached, number - first

    def place(self, plan: LanePlan, progress: Progress) -> Progress:
        """The progress in the epoch that it has come to, where it is counted from an earlier one on."""
        if plan.counts_batches:
            return progress
        first = min(progress.missing | {progress.position})
        epoch, number = self.locate(plan, progress.epoch, first, ENDLESS)
        start = first - number
        end = self._totals.get(_key(plan, epoch), progress.position - start)
        missing = {place - start for place in progress.missing if place - start < end}
        return Progress(epoch, min(progress.position - start, end), missing, progress.permuted)

    def clear(self) -> None:
        """Nothing is known any more: the seed is another."""
        self._epochs.clear()
        self._totals.clear()
        self._located.clear()

    def set(self, plan: LanePlan, epoch: int, checkpoint: Checkpoint) -> None:
        """What is known of an epoch from elsewhere."""
        self._epochs.pop(_key(plan, epoch), None)
        self._known(plan, epoch).base = checkpoint

    def _known(self, plan: LanePlan, epoch: int) -> _Epoch:
        key = _key(plan, epoch)
        known = self._epochs.pop(key, None) or _Epoch(Checkpoint.start(plan))
        while len(self._epochs) >= _EPOCHS_KEPT:
            del self._epochs[next(iter(self._epochs))]  # the one that nobody has used for the longest
        self._epochs[key] = known
        return known


_Key = tuple[int, int, int]  # number of shards, shard, epoch


def _key(plan: LanePlan, epoch: int) -> _Key:
    return plan.num_shards, plan.shard, epoch
