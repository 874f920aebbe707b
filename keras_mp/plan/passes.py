"""One pass of Keras through an epoch, in which a number that it asks for is a handle of a batch."""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from keras_mp.plan.progress import BatchKey, Progress


class Call(Protocol):
    """A call of `fit`, `evaluate` or `predict`; equal to itself, however often it is looked up."""

    @property
    def name(self) -> str:
        """The method's name."""

    @property
    def is_running(self) -> bool:
        """Whether the call has not returned."""

    @property
    def at(self) -> int:
        """Where in the method it was when it was looked up."""

    @property
    def shuffle(self) -> bool:
        """Whether it was asked to shuffle."""

    @property
    def steps(self) -> int | None:
        """Batches that it takes in one epoch of its own; None: all."""

    def __hash__(self) -> int: ...


class Pass:
    """One run of Keras (or of who calls the same methods) through what is left of an epoch.

    Args:
        base: what is left.
        count: batches in a whole epoch.
        length: how many of them this pass takes.
        stride: among how many processes Keras divides the numbers.
        by_keras: whether Keras runs it.
        call: the call of `fit`, `evaluate` or `predict` that does, if any.
    """

    def __init__(self, base: Progress, count: int, length: int, stride: int, by_keras: bool, call: Call | None) -> None:
        self.base = base
        self.progress = base.copy()
        self.length = length
        self.stride = stride
        self.by_keras = by_keras
        self.call = call
        self.served = array.array("q")  # positions, in the order in which whoever runs the pass has asked for them
        self._count = count
        self._places = array.array("q")  # by number, as far as they were asked: its position, or -1
        self._asked = bytearray()  # by number: whether whoever runs the pass has asked for it
        self._order: Iterator[int] = itertools.islice(base.positions(count), length)

    @property
    def is_complete(self) -> bool:
        """Whether all batches of the pass have been handed out to whoever runs it."""
        return self.base.left(self._count) - self.progress.left(self._count) >= self.length

    @property
    def is_whole(self) -> bool:
        """Whether it takes all that is left of its epoch."""
        return self.length == self.base.left(self._count)

    def has(self, number: int, counts: bool) -> bool:
        """Whether `number` stands for a batch of the pass, or may; of several processes, others have most numbers."""
        is_known = number < len(self._places) and self._places[number] >= 0
        return 0 <= number < self.length * self.stride and (counts or self.stride == 1 or is_known)

    def place(self, number: int) -> tuple[int, bool]:
        """The position that `number` stands for, and whether it has only now been given one."""
        if (missing := number + 1 - len(self._places)) > 0:
            self._places.extend([-1] * missing)
            self._asked.extend(bytes(missing))
        position = self._places[number]
        if position >= 0:
            return position, False
        position = self._places[number] = next(self._order)
        if position >= self.progress.position:  # given to a number is not yet handed out
            self.progress.position = position + 1
            self.progress.missing.add(position)
        return position, True

    def ask(self, number: int, position: int) -> None:
        """Whoever runs the pass asks for `number`."""
        if not self._asked[number]:
            self._asked[number] = 1
            self.served.append(position)

    def rest(self) -> Iterator[int]:
        """The positions that no number stands for yet."""
        self._order, rest = itertools.tee(self._order)
        return rest


class Asked(NamedTuple):
    """What a request for a number comes to.

    Attributes:
        key: epoch and batch.
        run: the pass it belongs to; None: somebody looks at a batch outside of one.
        position: of the batch in its epoch's order.
        is_next: whether it is the next batch of the pass.
        is_first: whether a pass begins with it.
        counts: whether it is handed out to whoever runs the pass.
    """

    key: BatchKey
    run: Pass | None = None
    position: int = 0
    is_next: bool = False
    is_first: bool = False
    counts: bool = False
