"""Streams: which shards a lane reads, and which lane makes which batch. Pure arithmetic, known as far as it was read.

An epoch's shards, in an order drawn from (seed, epoch), are dealt to a fixed number of lanes; a lane reads its shards
one after the other. Lanes take turns: turn `k * lanes + l` is the k-th batch of lane `l`. A lane that has no full batch
left drops out. What is then left over in all of them, put together in the order of the lanes, makes the last batches:
so N samples make ceil(N / batch_size) batches, or floor with `drop_remainder`. Nothing of this depends on who reads
(P2), and each sample is in one batch (P1).

Sharding over trainers. Of `n`, trainer `i` has the lanes i, i + n, ..., so their number must be a multiple of n. Nobody
knows how many samples these have before they are read. With a declared length each trainer takes
length // (n * batch_size) batches: one whose lanes have more leaves the rest out, one whose lanes have less is given
the first batches of its lanes again, with other random numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from keras_mp.plan.batching import ENDLESS, Batching
from keras_mp.plan.pieces import Cursor
from keras_mp.plan.request import Request
from keras_mp.plan.shuffle import shuffled


def lane_shards(shards: int, lanes: int, shuffle: bool, seed: int, epoch: int, lane: int) -> Any:
    """Numbers of the shards that a lane reads in an epoch, in order: a range or an array."""
    if not shuffle:
        return range(lane, shards, lanes)
    return shuffled(0, shards, shards, seed, epoch)[lane::lanes]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LanePlan(Batching):
    """The plan of all epochs of a stream; `length` is the declared number of samples, or ENDLESS.

    Attributes:
        shards: how many there are.
        lanes: how many there are, over all trainers.
        block: samples that are shuffled with each other; 0: none are.
    """

    shards: int
    lanes: int
    block: int

    @functools.cached_property
    def num_batches(self) -> int:
        """Batches an epoch, the same for every trainer; ENDLESS where that is not known."""
        if not self.counts_batches:
            return ENDLESS
        if self.num_shards > 1:
            return self.length // (self.batch_size * self.num_shards)
        return super().num_batches

    @property
    def counts_batches(self) -> bool:
        """Whether the number of batches is known."""
        return self.length != ENDLESS

    @property
    def is_endless(self) -> bool:
        """False: it has epochs, of whatever length."""
        return False

    @property
    def is_ordered(self) -> bool:
        """It has an order of its own, which is none of Keras's business."""
        return True

    @property
    def uniform_size(self) -> int | None:
        """Samples in every batch; None if that varies."""
        whole = self.drop_remainder or (self.counts_batches and (self.num_shards > 1 or not self._remainder))
        return self.batch_size if whole else None

    @property
    def _remainder(self) -> int:
        return self.length % self.batch_size

    @property
    def own_lanes(self) -> range:
        """The lanes of this trainer."""
        return range(self.shard, self.lanes, self.num_shards)

    def check(self) -> None:
        """Whether there is a batch for every trainer.

        Raises:
            ValueError: there is not.
        """
        if self.lanes % self.num_shards:
            raise ValueError(
                f"num_shards={self.num_shards} must divide lanes={self.lanes}, as each trainer reads its own lanes; "
                f"pass lanes={-(-self.lanes // self.num_shards) * self.num_shards} on every trainer"
            )
        if self.shards < self.num_shards:
            raise ValueError(
                f"{self.shards} shards are too few for num_shards={self.num_shards}: a trainer would have none; write "
                "more and smaller ones"
            )
        if self.num_batches == 0:
            raise ValueError(
                f"length={self.length} samples are too few for a batch on each of num_shards={self.num_shards} with "
                f"batch_size={self.batch_size}, drop_remainder={self.drop_remainder}"
            )

    def size_of(self, batch: int) -> int:
        """Samples in a batch, if the stream is as long as declared."""
        if not self.counts_batches or self.num_shards > 1:
            return self.batch_size
        return max(0, min(self.batch_size, self.length - batch * self.batch_size))

    def request(self, epoch: int, batch: int) -> Request:
        """What is to be loaded for `batch` of `epoch`."""
        return Request(epoch, batch, range(self.size_of(batch)), share=(self.num_shards, self.shard))

    def for_share(self, share: tuple[int, int]) -> Self:
        """The plan of one of several trainers, or of the only one."""
        if share == (self.num_shards, self.shard):
            return self
        return dataclasses.replace(self, num_shards=share[0], shard=share[1])

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a state to fit."""
        length = self.length if self.counts_batches else None
        own = {"length": length, "epoch_length": length, "shuffle": self.block}
        return {**super().identity, **own, "shards": self.shards, "lanes": self.lanes}

    def once(self, count: int | None = None) -> Batching:
        """There is no such plan.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a stream has no samples that can be asked for by number, so it cannot be inspected; go through it with "
            "on_error='skip', and look at its failures"
        )


class Lane(NamedTuple):
    """A lane in the middle of an epoch.

    Attributes:
        cursor: where it stands; of one that has ended, where what is left over in it begins.
        batches: that it has made.
        left: samples that are left over; None: it has not ended, as far as is known.
    """

    cursor: Cursor = Cursor()
    batches: int = 0
    left: int | None = None


class Checkpoint(NamedTuple):
    """All lanes of a trainer before a batch.

    Attributes:
        number: of that batch, in its epoch.
        lanes: by their numbers.
        lost: shards whose rest could not be read, so far.
    """

    number: int
    lanes: dict[int, Lane]
    lost: int = 0

    @classmethod
    def start(cls, plan: LanePlan) -> Checkpoint:
        """Before the first batch of an epoch. A lane without a shard has ended."""
        return cls(0, {lane: Lane(left=None if lane < plan.shards else 0) for lane in plan.own_lanes})

    @property
    def full(self) -> int:
        """Batches that single lanes have made."""
        return sum(lane.batches for lane in self.lanes.values())

    def after(self, steps: Iterable[Step]) -> Checkpoint:
        """After the batches that `steps` tell of."""
        lanes, count, lost = dict(self.lanes), 0, 0
        for step in steps:
            for number, cursor, left in step.ended:
                lanes[number] = lanes[number]._replace(cursor=cursor, left=left)
            if step.lane is not None and step.cursor is not None:
                lanes[step.lane] = Lane(step.cursor, lanes[step.lane].batches + 1)
            count, lost = count + 1, lost + step.lost
        return Checkpoint(self.number + count, lanes, self.lost + lost)

    def dump(self) -> dict[str, Any]:
        """As plain numbers, fit for JSON."""
        rows = [[*lane.cursor, lane.batches, lane.left] for _, lane in sorted(self.lanes.items())]
        return {"number": self.number, "cursors": rows, "lost": self.lost}

    @classmethod
    def load(cls, state: Any, plan: LanePlan) -> Checkpoint:
        """What `dump` has given.

        Raises:
            ValueError: it is not of this plan.
        """
        rows = state.get("cursors") if isinstance(state, Mapping) else None
        if not isinstance(rows, list) or len(rows) != len(plan.own_lanes):
            raise ValueError(f"state has lanes {state!r:.200}, but the stream has {len(plan.own_lanes)} here")
        lanes = {
            number: Lane(Cursor(*map(int, row[:4])), int(row[4]), None if row[5] is None else int(row[5]))
            for number, row in zip(plan.own_lanes, rows, strict=True)
        }
        return cls(int(state["number"]), lanes, int(state["lost"]))


class Step(NamedTuple):
    """What a batch has changed.

    Attributes:
        lane: that made it; None: several did, of what was left over in them.
        cursor: where that lane stands now.
        ended: lanes that were found to have ended before it: their numbers, where what is left over in them begins,
            and how much that is.
        lost: shards whose rest could not be read on the way to it.
    """

    lane: int | None
    cursor: Cursor | None
    ended: tuple[tuple[int, Cursor, int], ...] = ()
    lost: int = 0
