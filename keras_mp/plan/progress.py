"""How far somebody has come through an epoch: a position in its order, and the few before it that are missing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

BatchKey = tuple[int, int]  # epoch, batch


@dataclasses.dataclass
class Progress:
    """How far through an epoch somebody is: all before `position` has been handed out, but for `missing`.

    `permuted`: the batches come in an order of their own, because Keras shuffles.
    """

    epoch: int = 0
    position: int = 0
    missing: set[int] = dataclasses.field(default_factory=set)
    permuted: bool = False

    def copy(self) -> Progress:
        """A copy that goes its own way."""
        return dataclasses.replace(self, missing=set(self.missing))

    def left(self, count: int) -> int:
        """How many of the epoch's `count` batches are left."""
        return count - self.position + len(self.missing)

    def positions(self, count: int) -> Iterator[int]:
        """Those that are left, in order."""
        return itertools.chain(sorted(self.missing), range(self.position, count))

    def position_of(self, number: int) -> int:
        """The position of the `number`-th of those that are left, from 0."""
        missing = sorted(self.missing)
        return missing[number] if number < len(missing) else self.position + number - len(missing)

    def hand_out(self, position: int) -> None:
        """The batch at `position` has been handed out."""
        if position < self.position:
            self.missing.discard(position)
        else:
            self.missing.update(range(self.position, position))
            self.position = position + 1
