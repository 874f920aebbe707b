"""What the plan asks of those who load: one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from keras_mp.errors import SampleFailure
from keras_mp.plan.pieces import Reading


class Request(NamedTuple):
    """Which batch is wanted: its epoch, its number, and the source indices of its samples in order.

    `repeats` says, for an order in which samples come more than once, how often each came before in the epoch.
    `substitutes` are samples of the epoch that may be served where all of these fail; None: any of the source. `failed`
    gives the positions of samples that are known to have failed, say because they ended their workers: they are not
    read again. (Positions behind those of `samples` are those of substitutes, see `SampleLoader.index_at`.) `traced`
    asks for what happened when, for a timeline.

    `stretch` is for a look at the shapes alone: 1 or 2 pads all axes whose lengths vary further than need be, to an odd
    or an even number, so that two looks differ in them.

    Of a stream, `samples` are positions among those that `reading` says. A dataset asks for a batch by its number, as
    one of `share` = (number of shards, this shard), and for a stream whose length is not known may let as many further
    epochs follow as `goes_on` says; which samples of which lanes that is, the engine finds out.
    """

    epoch: int
    batch: int
    samples: Sequence[int]
    repeats: Sequence[int] = ()
    substitutes: Sequence[int] | None = None
    failed: tuple[tuple[int, SampleFailure], ...] = ()
    traced: bool = False
    stretch: int = 0
    reading: Reading | None = None
    share: tuple[int, int] = (1, 0)
    goes_on: int = 0

    @property
    def affinity(self) -> tuple[int, int] | None:
        """Epoch and lane: a worker that has made the batch before this one in it has what follows at hand."""
        return (self.epoch, self.reading.pieces[0].lane) if self.reading and len(self.reading.pieces) == 1 else None

    @property
    def weight(self) -> int:
        """How long it is on its way to a worker, in samples that are named by their numbers."""
        rests = [piece.rest for piece in self.reading.pieces if piece.rest] if self.reading else ()
        return len(self.samples) + sum(map(len, rests)) // _NUMBER_BYTES


_NUMBER_BYTES = 8
