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
    """The current epoch of a dataset, and a guess at the order of the pass that Keras is on.

    Args:
        requests_seen: whether batches are asked for in this process; if not (Keras's own process pool), the hooks alone
            count, and the first `on_epoch_end` after an `on_epoch_begin` ends the epoch.
    """

    def __init__(self, requests_seen: bool = True) -> None:
        self.epoch = 0
        self._requests_seen = requests_seen
        self._open = False
        self._asked: set[int] = set()
        self._complete = False
        self._order: Iterator[int] = iter(())
        self._next: int | None = None
        self._last_stray = _NONE
        self._random_state: tuple[Any, ...] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the current one, from its start."""
        self.epoch = epoch
        self._asked.clear()
        self._complete = False
        self._order, self._next = iter(()), None

    def pass_may_start(self) -> None:
        """Keras read `num_batches`: perhaps a pass begins, and perhaps a shuffled one."""
        self._asked.clear()
        self._random_state = random.getstate()

    def begin(self) -> None:
        """Keras called `on_epoch_begin`."""
        self._open = True

    def end(self) -> bool:
        """Keras called `on_epoch_end`; whether that ended an epoch."""
        ended = self._open and (self._complete or not self._requests_seen)
        if ended:
            self.set_epoch(self.epoch + 1)
        elif not self._open:  # `fit` or `evaluate` is starting: what was looked at before is no part of a pass
            self._asked.clear()
            self._complete = False
        self._open = False
        return ended

    def asked(self, batch: int, num_batches: int) -> list[int] | range | None:
        """Batch `batch` was asked for; returns the order to expect from here on, or None if nothing new is known."""
        self._asked.add(batch)
        if len(self._asked) == num_batches:
            self._complete = True
        shuffled = self._keras_order(num_batches)
        if shuffled is not None and shuffled[0] == batch:
            return self._expect(shuffled[1:])
        if batch == self._next:
            self._next = next(self._order, None)
            return None
        if batch == 0 or batch == self._last_stray + 1:
            return self._expect(range(batch + 1, num_batches))
        self._last_stray = batch
        return None

    def _expect(self, order: list[int] | range) -> list[int] | range:
        self._order = iter(order)
        self._next = next(self._order, None)
        self._last_stray = _NONE
        return order

    def _keras_order(self, num_batches: int) -> list[int] | None:
        """The order in which Keras has just shuffled the batches, if it may have.

        Keras permutes list(range(num_batches)) with the global `random` right after it has read `num_batches`. Doing
        the same from the state at that moment gives its order; the first batch it asks for confirms it.
        """
        state, self._random_state = self._random_state, None
        if state is None or state == random.getstate():
            return None
        generator = random.Random()
        generator.setstate(state)
        order = list(range(num_batches))
        generator.shuffle(order)
        return order
