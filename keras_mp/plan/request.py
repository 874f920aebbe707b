"""What the plan asks of those who load: one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from keras_mp.errors import SampleFailure


class Request(NamedTuple):
    """Which batch is wanted: its epoch, its number, and the source indices of its samples in order.

    `repeats` says, for an order in which samples come more than once, how often each came before in the epoch.
    `substitutes` are samples of the epoch that may be served where all of these fail; None: any of the source. `failed`
    gives the positions of samples that are known to have failed, say because they ended their workers: they are not
    read again. (Positions behind those of `samples` are those of substitutes, see `SampleLoader.index_at`.) `traced`
    asks for what happened when, for a timeline.

    `stretch` is for a look at the shapes alone: 1 or 2 pads all axes whose lengths vary further than need be, to an odd
    or an even number, so that two looks differ in them.
    """

    epoch: int
    batch: int
    samples: Sequence[int]
    repeats: Sequence[int] = ()
    substitutes: Sequence[int] | None = None
    failed: tuple[tuple[int, SampleFailure], ...] = ()
    traced: bool = False
    stretch: int = 0
