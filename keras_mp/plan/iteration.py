"""A plain loop's or an export's way through the batches, one epoch after the other."""

from __future__ import annotations

from collections.abc import Iterator

from keras_mp.plan.position import Position
from keras_mp.plan.progress import BatchKey, Progress


class Iteration:
    """A way through what is left of the current epoch, and through the next ones.

    In the middle of a pass of Keras's it only looks, and leaves the dataset where it is.

    Args:
        position: of the dataset.
        epochs: how many epochs it takes.
        claim: whether they are its own from now on: the next iteration or pass takes those after them.
    """

    def __init__(self, position: Position, epochs: int = 1, claim: bool = False) -> None:
        self.first_epoch = position.epoch
        self.moves_the_dataset = not position.in_pass
        self._position = position
        self._base = position.start
        self._epochs = epochs
        self._progress = self._base.copy()
        if self.moves_the_dataset:
            position.follow(self._progress)
            if claim:
                position.claim(epochs)

    def places(self) -> Iterator[tuple[int, int, BatchKey]]:
        """Epoch and position of each batch, and its key."""
        progress, position = self._base, self._position
        for epoch in range(self.first_epoch, self.first_epoch + self._epochs):
            if epoch != progress.epoch:
                progress = Progress(epoch)
            order = position.order(progress)
            for place in progress.positions(position.count):
                yield epoch, place, (epoch, order[place])

    def hand_out(self, epoch: int, place: int) -> bool:
        """The batch there has been handed out; whether it was its epoch's last."""
        progress = self._progress
        if epoch != progress.epoch:
            self._progress = Progress(epoch)
            if self.moves_the_dataset and self._position.follows(progress):
                self._position.follow(self._progress)
            progress = self._progress
        progress.hand_out(place)
        if progress.left(self._position.count):
            return False
        self.end()
        return True

    def end(self) -> None:
        """There is nothing left of the epoch."""
        if self.moves_the_dataset:
            self._position.finish(self._progress)
