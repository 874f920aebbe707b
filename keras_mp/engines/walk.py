"""One way through an epoch of a stream: turn after turn, in the order of the lanes (see `plan.lanes`).

A turn is a job of the engine below: a lane's next batch, or the finding that it has ended. A lane's next turn can begin
when the one before it has come, and turns of different lanes side by side; numbers are given to batches in the order of
the turns, once all turns before are known. So a turn is asked for with the number that it will have if no lane ends
before it, and asked for again where that turns out wrong and matters.

What is asked of the lanes beyond the batches that somebody wants reads, but makes nothing: on the way to a batch in the
middle, and behind the last one of a declared length, where it shows whether the stream is longer.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

from keras_mp.engines.base import Engine
from keras_mp.engines.turn import Turn
from keras_mp.errors import SampleFailure
from keras_mp.loading.base import Loaded
from keras_mp.plan.course import Course
from keras_mp.plan.lanes import Checkpoint, Lane, LanePlan, Step
from keras_mp.plan.pieces import Cursor, Piece, Reading
from keras_mp.plan.request import Request

_REST, _AGAIN = 1, 2  # how a reading is repeated: of what is left over; of batches that come again


class Outcome(NamedTuple):
    """A batch, or the error in its place; and what failed behind the batch before it."""

    loaded: Loaded | None
    error: BaseException | None
    failures: tuple[SampleFailure, ...]


class Walk:
    """Goes through the batches of one epoch from a checkpoint on. Whoever calls it holds the lock of `LaneEngine`.

    Args:
        engine: where batches are loaded.
        plan: of the stream.
        epoch: which epoch.
        checkpoint: where it begins.
        course: is told where the lanes stood before each batch.

    Attributes:
        next: number of the batch that has not been asked for yet.
        wanted: by number, whoever has asked for a batch and not taken it.
        total: batches in the epoch, as soon as all lanes have ended; with a declared length it may be less than that.
        samples: of these, and what `drop_remainder` leaves out.
        is_longer: whether there are more than was declared.
        is_over: no more can be had from it: it was given up, or an error came.
        late_failures: what failed behind the last batch.
        error_behind: the error that came behind the last batch of a declared length.
        lost: shards whose rest could not be read, so far.
    """

    def __init__(self, engine: Engine, plan: LanePlan, epoch: int, checkpoint: Checkpoint, course: Course) -> None:
        self.plan, self.epoch = plan, epoch
        self.next = checkpoint.number
        self.wanted: dict[int, Any] = {}
        self.total: int | None = None
        self.samples = 0
        self.is_longer = self.is_over = False
        self.late_failures: list[SampleFailure] = []
        self.error_behind: BaseException | None = None
        self.lost = checkpoint.lost
        self._engine, self._course = engine, course
        self._lanes = dict(checkpoint.lanes)  # as far as is known
        self._asked = {number: lane.batches for number, lane in self._lanes.items()}  # turns
        self._rests: dict[int, bytes | None] = {}
        self._number = checkpoint.number  # of the first of these turns
        self._turns: collections.deque[Turn] = collections.deque()  # in order, those that have no number yet
        self._found: dict[int, Outcome] = {}
        self._ended: list[tuple[int, Cursor, int]] = []  # since the last batch
        self._lost_before = checkpoint.lost

    # -- asked by the engine -------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Takes what has come, and asks for more."""
        while True:
            for turn in list(self._turns):
                turn.poll(self._engine)
                if turn.has_come and not turn.is_seen:
                    turn.is_seen = True
                    self._see(turn)
            moved = self._give_numbers()
            if self.is_over:
                return
            self._ask()
            if not moved:
                return

    @property
    def next_turn(self) -> Turn | None:
        """What whoever waits has to wait for first."""
        return self._turns[0] if self._turns else None

    @property
    def has_been_checked(self) -> bool:
        """Whether it is known if the stream is as long as was declared."""
        return self.is_over or self.is_longer or self.total is not None or self.plan.num_shards > 1

    def has(self, number: int) -> bool:
        """Whether that batch has come, or an error in its place."""
        return number in self._found

    def take(self, number: int) -> Outcome:
        """The batch. Only once."""
        self.wanted.pop(number, None)
        return self._found.pop(number)

    def drop(self, number: int) -> None:
        """Nobody wants that batch any more."""
        self.wanted.pop(number, None)
        self._found.pop(number, None)
        if not self.wanted:
            self.give_up()

    def give_up(self) -> None:
        """Nobody wants any more of it."""
        self.is_over = True
        for turn in self._turns:
            turn.cancel(self._engine)
        self._turns.clear()

    # -- turns ---------------------------------------------------------------------------------------------------

    def _see(self, turn: Turn) -> None:
        """A turn has come: what its lane is at from now on."""
        if turn.lane is None or turn.report is None:
            return
        lane, report = self._lanes[turn.lane], turn.report
        if turn.is_batch:
            turn_number = turn.request.reading.turn if turn.request.reading else 0
            batches = turn_number // self.plan.lanes + 1
            if batches > lane.batches:  # else it was asked for again
                self._lanes[turn.lane] = Lane(report.cursor, batches)
        elif lane.left is None:
            self._lanes[turn.lane] = lane._replace(left=report.found)
            self._rests[turn.lane] = report.rest
            for other in [other for other in self._turns if other.lane == turn.lane and not other.is_asked]:
                self._turns.remove(other)

    def _give_numbers(self) -> bool:
        """Gives numbers to the turns that have come, as far as all before them have."""
        moved = False
        while self._turns and self._turns[0].has_come and not self.is_over:
            turn = self._turns[0]
            if not turn.is_batch:
                self._turns.popleft()
                self._end_lane(turn)
                moved = True
                continue
            wanted = self._request(turn, self._number)
            is_other = (wanted.samples, wanted.stretch) != (turn.request.samples, turn.request.stretch)
            if is_other and turn.lane is not None and turn.error is None and self._number in self.wanted:
                turn.request = wanted
                turn.ask(self._engine)
                break
            self._turns.popleft()
            self._count(turn)
            moved = True
        if not self._turns and self.total is None and all(lane.left is not None for lane in self._lanes.values()):
            self._end()
        return moved

    def _end_lane(self, turn: Turn) -> None:
        loaded, report, reading = turn.loaded, turn.report, turn.request.reading
        if loaded is None or report is None or reading is None or turn.lane is None:
            return
        self._ended.append((turn.lane, reading.pieces[0].cursor, report.found))
        self.late_failures += loaded.failures
        self.lost += report.lost

    def _count(self, turn: Turn) -> None:
        """The next batch, or error."""
        number, report = self._number, turn.report
        failures, self.late_failures = tuple(self.late_failures), []
        if number >= self.plan.num_batches:
            self.is_longer, self.error_behind = report is not None, turn.error
            self.give_up()
            return
        if report is not None:
            self.lost += report.lost
            cursor = None if turn.lane is None else report.cursor
            step = Step(turn.lane, cursor, tuple(self._ended), self.lost - self._lost_before)
            self._course.add(self.plan, self.epoch, number, step)
        self._ended, self._lost_before = [], self.lost
        if number in self.wanted:
            self._found[number] = Outcome(turn.loaded, turn.error, failures)
        self._number += 1
        if report is None:
            self.give_up()

    def _ask(self) -> None:
        """Asks for as many batches as are wanted, and behind the last one for what shows whether there are more."""
        limit, counted = self.next, self.plan.num_batches
        if self.next >= counted and self.plan.num_shards == 1:
            limit = counted + sum(lane.left is None for lane in self._lanes.values())
        while self._number + len(self._turns) < limit and len(self._turns) < 2 * len(self._lanes):
            if (lane := self._next_lane()) is None:
                break
            self._turns.append(self._turn(lane))
        if self.total is not None:
            self._ask_for_rest(min(self.next, counted))
        busy = set[int]()
        for turn in self._turns:
            if not turn.is_asked and turn.lane not in busy:
                if turn.lane is not None and (reading := turn.request.reading):
                    piece = reading.pieces[0]._replace(cursor=self._lanes[turn.lane].cursor)
                    turn.request = turn.request._replace(reading=reading._replace(pieces=(piece,)))
                turn.ask(self._engine)
            if turn.lane is not None and (not turn.has_come or turn.error is not None):
                busy.add(turn.lane)

    def _next_lane(self) -> int | None:
        running = [(self._asked[number], number) for number, lane in self._lanes.items() if lane.left is None]
        return min(running)[1] if running else None

    def _turn(self, lane: int) -> Turn:
        turn = self._asked[lane] * self.plan.lanes + lane
        self._asked[lane] += 1
        reading = Reading((Piece(lane, self._lanes[lane].cursor, self.plan.batch_size),), turn)
        number = self._number + len(self._turns)
        made = Turn(lane, self.plan.request(self.epoch, number)._replace(reading=reading))
        made.request = self._request(made, number)
        if self.plan.size_of(number) < self.plan.batch_size and not made.request.stretch:  # and is no look
            made.request = made.request._replace(samples=range(0))  # most likely it is made of what is left over
        return made

    def _request(self, turn: Turn, number: int) -> Request:
        """What is to be asked for, if the turn is the batch of this number."""
        handle = self.wanted.get(number)
        if handle is None:
            return turn.request._replace(batch=number, samples=range(0), stretch=0)
        wanted = handle.request
        return turn.request._replace(batch=number, samples=wanted.samples, stretch=wanted.stretch, traced=wanted.traced)

    # -- what is left over ---------------------------------------------------------------------------------------

    def _end(self) -> None:
        """All lanes have ended: what is left over makes the last batches."""
        full = sum(lane.batches for lane in self._lanes.values())
        left = sum(lane.left or 0 for lane in self._lanes.values())
        size = self.plan.batch_size
        self.samples = full * size + left
        whole = self.plan.uniform_size is not None
        self.total = full + (left // size if whole else -(-left // size))
        self._course.end(self.plan, self.epoch, self.total)
        if self.plan.counts_batches and self.plan.num_shards == 1:
            self.is_longer = self.samples > self.plan.length

    def _ask_for_rest(self, limit: int) -> None:
        full = sum(lane.batches for lane in self._lanes.values())
        while (number := self._number + len(self._turns)) < limit:
            if number < (self.total or 0):
                pieces = tuple(self._left_over(number - full))
                reading = Reading(pieces, number - full, _REST)
            elif not self.serves_again:
                return
            else:
                lanes = [number for number in sorted(self._lanes) if self._lanes[number].batches]
                again = number - (self.total or 0)
                lane = lanes[again % len(lanes)]
                first = Piece(lane, Cursor(), self.plan.batch_size)
                reading = Reading((first,), lane, _AGAIN + again // len(lanes))
            has = sum(piece.size for piece in reading.pieces)
            turn = Turn(None, self.plan.request(self.epoch, number)._replace(reading=reading))
            wanted = self._request(turn, number)
            turn.request = wanted._replace(samples=wanted.samples[:has])
            self._turns.append(turn)

    @property
    def serves_again(self) -> bool:
        """Whether batches come again where the epoch has fewer than declared: some could not be read, or others' lanes
        have them."""
        can = any(lane.batches for lane in self._lanes.values())
        return can and self.plan.counts_batches and (self.plan.num_shards > 1 or self.lost > 0)

    def _left_over(self, number: int) -> Iterator[Piece]:
        """The pieces of the `number`-th batch that is made of what is left over."""
        start, stop = number * self.plan.batch_size, (number + 1) * self.plan.batch_size
        before = 0
        for lane, (cursor, _, left) in sorted(self._lanes.items()):
            first, last = max(start - before, 0), min(stop - before, left or 0)
            if first < last:
                yield Piece(lane, cursor, last - first, self._rests.get(lane), first)
            before += left or 0
