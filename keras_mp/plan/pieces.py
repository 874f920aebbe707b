"""What of which lanes of a stream makes a batch, and what reading it came to: a few whole numbers each."""

from __future__ import annotations

from typing import NamedTuple


class Cursor(NamedTuple):
    """Where a lane has come to.

    Attributes:
        block: number of the block that is being handed out.
        place: in the lane's list of shards, of the shard in which this block begins.
        offset: of the block's first sample in that shard.
        taken: how many of the block's samples, in their shuffled order, have been handed out.
    """

    block: int = 0
    place: int = 0
    offset: int = 0
    taken: int = 0


class Piece(NamedTuple):
    """Samples that follow one another in a lane.

    Attributes:
        lane: which one.
        cursor: from where on.
        size: how many, if the lane has as many.
        rest: the samples from there on, pickled, where they have been read already.
        skip: how many of those from there on are left out first.
    """

    lane: int
    cursor: Cursor
    size: int
    rest: bytes | None = None
    skip: int = 0


class Reading(NamedTuple):
    """What is to be read for a batch.

    Attributes:
        pieces: of which lanes. Of a single one, nothing is made where the lane has less than the piece's size.
        turn: tells the batch from all others of its epoch, whatever number it will have.
        repeat: 0; 1 for what is left over in the lanes; more for batches that come again.
    """

    pieces: tuple[Piece, ...]
    turn: int
    repeat: int = 0


class Report(NamedTuple):
    """What reading a piece came to.

    Attributes:
        found: samples that the lane had, of those that were wanted: with fewer it has ended.
        cursor: where the lane stands behind these.
        lost: shards whose rest could not be read.
        rest: the samples, pickled, if they are fewer than wanted, and as far as that can be done.
    """

    found: int
    cursor: Cursor
    lost: int = 0
    rest: bytes | None = None
