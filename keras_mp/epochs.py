"""Which epoch it is, and which batch Keras will ask for next, told from the outside.

Keras says little: hooks that it calls too often, and `dataset[i]`. What holds on every backend (Keras 3.12 to 3.15):

* `fit`, `evaluate` and `predict` ask for the batches of a pass from a generator that reads `num_batches`, then, when it
  shuffles, permutes the batch numbers with the global `random.shuffle`, then asks for each number once.
* `on_epoch_begin` comes before a pass, `on_epoch_end` after it, and `on_epoch_end` alone at the start of `fit` and of
  `evaluate`. JAX and torch begin and end a pass early to build a model from its first batch. With `steps_per_epoch` one
  pass goes on over several of Keras's epochs.

So an epoch ends at the first `on_epoch_end` after all of its batches have been asked for, and a pass that is given up
half-way leaves the epoch open: the next pass gets it whole (P1). Batches asked for outside of the hooks (a look at
`dataset[0]`, the signature that TensorFlow takes from the first two) do not count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

_NONE = -2  # no batch number, nor one less than any


class EpochTracker:
    """The current epoch of a dataset, what of it has been asked for, and a guess at the order Keras asks in.

    A resumed epoch consists of what was left of it: `remaining` batches, which Keras numbers from 0 again.

    Args:
        num_batches: batches in a whole epoch.
        requests_seen: whether batches are asked for in this process; if not (Keras's own process pool), the hooks alone
            count, and the first `on_epoch_end` after an `on_epoch_begin` ends the epoch.
    """

    def __init__(self, num_batches: int, requests_seen: bool = True) -> None:
        self.epoch = 0
        self.is_open = False
        self._num_batches = num_batches
        self._requests_seen = requests_seen
        self._random_state: tuple[Any, ...] | None = None
        self._remaining: list[int] | None = None
        self._shuffles: bool | None = None  # whether Keras shuffled the last epoch; None: there was none
        self._restart()

    def _restart(self) -> None:
        self._asked: dict[int, None] = {}  # a set that keeps the order
        self._complete = False
        self._shuffled: list[int] | None = None
        self._places: dict[int, int] | None = None  # where in the shuffled pass Keras asks for each number
        self._order: Iterator[int] = iter(())
        self._next: int | None = None
        self._last_stray = _NONE

    def set_epoch(self, epoch: int, remaining: list[int] | None = None) -> None:
        """Makes `epoch` the current one: whole, or what `remaining` says is left of it, in that order."""
        self.epoch = epoch
        self._remaining = remaining
        self._restart()

    def __len__(self) -> int:
        """Batches in the current epoch."""
        return len(self.batches())

    def batch(self, index: int) -> int:
        """The batch that `dataset[index]` is.

        In a resumed epoch that Keras shuffles, its k-th request gets the k-th batch that was left.
        """
        if self._remaining is None:
            return index
        return self._remaining[index if self._places is None else self._places[index]]

    def pass_may_start(self) -> None:
        """Keras read `num_batches`: perhaps a pass begins, and perhaps a shuffled one."""
        self._restart_unless_complete()
        self._random_state = random.getstate()

    def _restart_unless_complete(self) -> None:
        complete = self._complete  # a pass's end may look like a start: JAX and torch prepare the next one early
        self._restart()
        self._complete = complete

    def begin(self) -> list[int] | range | None:
        """Keras called `on_epoch_begin`; returns the order to expect from what it did last, if that is known."""
        self.is_open = True
        if self._shuffles is None or self._asked or self._remaining is not None:
            return None
        return _shuffled(len(self), random.getstate()) if self._shuffles else range(len(self))

    def end(self) -> bool:
        """Keras called `on_epoch_end`; whether that ended an epoch."""
        ended = self.is_open and (self._complete or not self._requests_seen)
        if ended:
            self._shuffles = self._shuffled is not None
            self.set_epoch(self.epoch + 1)
        elif not self.is_open:  # `fit` or `evaluate` is starting: what was looked at before is no part of a pass
            self._restart()
        self.is_open = False
        return ended

    def batches(self) -> range | list[int]:
        """The batches of the current epoch, in order."""
        return range(self._num_batches) if self._remaining is None else self._remaining

    def iterate(self) -> Iterator[int]:
        """The batches of the current epoch from its start, each counted as it is handed out."""
        self._restart()
        for index, batch in enumerate(self.batches()):
            self._asked[index] = None
            yield batch

    def asked(self, index: int) -> list[int] | range | None:
        """`dataset[index]` was asked for; returns the order to expect from here on, or None if nothing new is known."""
        if self._asked and index in self._asked and self._complete:
            self._restart_unless_complete()
        self._asked[index] = None
        if len(self._asked) == len(self):
            self._complete = True
        shuffled = self._keras_order()
        if shuffled is not None and shuffled[0] == index:
            self._shuffled = shuffled
            self._places = {number: place for place, number in enumerate(shuffled)}
            return self._expect(shuffled[1:])
        if index == self._next:
            self._next = next(self._order, None)
            return None
        if index == 0 or index == self._last_stray + 1:
            return self._expect(range(index + 1, len(self)))
        self._last_stray = index
        return None

    def left_after(self, done: int | None = None) -> list[int]:
        """The batches of this epoch that come after the first `done` of the pass (None: all that were asked for)."""
        if self._shuffled is not None:
            order = self._shuffled
        else:
            rest = (index for index in range(len(self)) if index not in self._asked)
            order = [*self._asked, *rest]
        return [self.batch(index) for index in order[len(self._asked) if done is None else done :]]

    def _expect(self, order: list[int] | range) -> list[int] | range:
        self._order = iter(order)
        self._next = next(self._order, None)
        self._last_stray = _NONE
        return order

    def _keras_order(self) -> list[int] | None:
        """The order in which Keras has just shuffled the batches, if it may have.

        Keras permutes list(range(num_batches)) with the global `random` right after it has read `num_batches`. Doing
        the same from the state at that moment gives its order; the first batch it asks for confirms it.
        """
        state, self._random_state = self._random_state, None
        if state is None or state == random.getstate():
            return None
        return _shuffled(len(self), state)


def _shuffled(count: int, state: tuple[Any, ...]) -> list[int]:
    """What `random.shuffle` makes of `list(range(count))` from this state of the global generator."""
    generator = random.Random()
    generator.setstate(state)
    order = list(range(count))
    generator.shuffle(order)
    return order
