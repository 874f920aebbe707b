"""Streams on any engine: a batch is asked for by its number, and found by going through the lanes that make it.

The engine below loads what a request says in `reading`. Which reading makes batch t depends on what was read before, so
a request for a number joins a walk (see `walk`) that has come as far, or begins one at the nearest batch before it
where it is known how the lanes stood. Who goes through batches in order has one walk; a look elsewhere has its own.

No thread of its own is needed: what has come is taken, and more asked for, whenever somebody submits, asks whether a
batch is ready, or waits for one. Of each lane one batch is on its way at a time, so it reads ahead by as many batches
as there are lanes with data, at most.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from keras_mp.engines.base import Engine
from keras_mp.engines.turn import Turn
from keras_mp.engines.walk import Walk
from keras_mp.errors import KerasMPError, SampleError, SampleFailure, StreamEnded, sample_error
from keras_mp.loading.base import Loaded, Loader
from keras_mp.plan.course import Course
from keras_mp.plan.lanes import LanePlan
from keras_mp.plan.request import Request

_WALKS_KEPT = 4  # that nobody has asked for more, but who asked last may go on


class Handle:
    """A batch that was asked for.

    Attributes:
        request: as it was asked for.
        epoch, number: of the batch, in the epoch in which it is now looked for.
        goes_on: how many further epochs may follow.
        walk: that will come to it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.epoch, self.number = request.epoch, request.batch
        self.goes_on = request.goes_on
        self.walk: Walk | None = None


class LaneEngine:
    """Loads the batches of a stream; satisfies `engines.base.Engine`.

    Args:
        engine: loads what a request says in `reading`.
        plan: of the stream, undivided.
        course: what is known of where the lanes stood.

    Attributes:
        too_long: by epoch: what is to be said of a stream that is longer than declared.
    """

    def __init__(self, engine: Engine, plan: LanePlan, course: Course) -> None:
        self._engine = engine
        self._plan = plan
        self._course = course
        self._lock = course.lock
        self._walks: list[Walk] = []  # the last used ones last
        self._cancelled: collections.deque[Handle] = collections.deque()
        self._late: list[SampleFailure] = []  # what failed behind the last batch of an epoch
        self.too_long: dict[int, str] = {}

    @property
    def bundle_size(self) -> int:
        return self._engine.bundle_size

    @property
    def batch_bytes(self) -> int | None:
        return self._engine.batch_bytes

    def submit(self, requests: Sequence[Request]) -> list[Handle]:
        handles = [Handle(request) for request in requests]
        with self._lock:
            self._let_go()
            for handle in handles:
                self._place(handle)
            for walk in list(dict.fromkeys(handle.walk for handle in handles)):
                if walk is not None:
                    walk.go_on()
        return handles

    def is_ready(self, handle: Handle) -> bool:
        with self._lock:
            self._let_go()
            return not isinstance(self._look(handle), Turn)

    def result(self, handle: Handle) -> Loaded:
        while True:
            with self._lock:
                self._let_go()
                turn = self._look(handle)
                if turn is None:
                    return self._taken(handle)
                if isinstance(turn, BaseException):
                    raise turn
            turn.wait(self._engine)

    def cancel(self, handle: Handle) -> None:
        self._cancelled.append(handle)
        if self._lock.acquire(blocking=False):  # a finaliser may call this; else the next one who comes sees to it
            try:
                self._let_go()
            finally:
                self._lock.release()

    def update(self, loader: Loader) -> bool | None:
        return self._engine.update(loader)

    def forget(self) -> None:
        """Begins anew whatever is asked for from now on: the dataset has been moved, and its seed may be another."""
        with self._lock:
            self._let_go()
            for walk in self._walks:
                if not walk.wanted:
                    walk.give_up()

    def close(self) -> None:
        self._engine.close()
        with self._lock:
            for walk in self._walks:
                walk.give_up()
            self._walks.clear()

    def stats(self) -> dict[str, Any]:
        return self._engine.stats()

    # -- under the lock ------------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        while self._cancelled:
            handle = self._cancelled.popleft()
            if handle.walk is not None and handle.walk.wanted.get(handle.number) is handle:
                handle.walk.drop(handle.number)
                handle.walk = None

    def _place(self, handle: Handle) -> None:
        """Has a walk come to the handle's batch."""
        plan = self._plan.for_share(handle.request.share)
        if handle.goes_on:
            epoch, handle.number = self._course.locate(plan, handle.epoch, handle.number, handle.goes_on)
            handle.goes_on -= epoch - handle.epoch
            handle.epoch = epoch
        walk = self._walk(plan, handle.epoch, handle.number)
        handle.walk = walk
        walk.wanted[handle.number] = handle
        walk.next = handle.number + 1

    def _walk(self, plan: LanePlan, epoch: int, number: int) -> Walk:
        self._walks = [walk for walk in self._walks if not walk.is_over]
        for walk in reversed(self._walks):
            if walk.epoch == epoch and walk.next == number and walk.plan.shard == plan.shard:
                if walk.plan.num_shards == plan.num_shards:
                    self._walks.remove(walk)
                    self._walks.append(walk)
                    return walk
        idle = [walk for walk in self._walks if not walk.wanted]
        for walk in idle[: max(0, len(idle) - _WALKS_KEPT + 1)]:
            walk.give_up()
            self._walks.remove(walk)
        walk = Walk(self._engine, plan, epoch, self._course.nearest(plan, epoch, number), self._course)
        self._walks.append(walk)
        return walk

    def _look(self, handle: Handle) -> Turn | BaseException | None:
        """What a handle waits for: a turn, or nothing, as its batch has come; or why it waits in vain."""
        while True:
            walk = handle.walk
            if walk is None:
                return StreamEnded(f"batch {handle.number} of epoch {handle.epoch} is not wanted any more")
            walk.go_on()
            number = handle.number
            if walk.has(number):
                is_last = number == walk.plan.num_batches - 1
                if not is_last:
                    return None
                if walk.has_been_checked or walk.next_turn is None:
                    return self._check_length(walk)
            elif walk.is_over:
                self._place_again(walk)
                continue
            elif walk.total is not None and number >= walk.total and not walk.serves_again:
                if (ended := self._end(walk, handle)) is not None:
                    return ended
                continue
            turn = walk.next_turn
            if turn is None:
                raise RuntimeError(f"batch {number} of epoch {walk.epoch} is not on its way")
            return turn

    def _place_again(self, walk: Walk) -> None:
        """What was asked of a walk that is over is looked for by another."""
        for number, handle in sorted(walk.wanted.items()):
            if not walk.has(number):
                del walk.wanted[number]
                self._place(handle)

    def _check_length(self, walk: Walk) -> BaseException | None:
        """Compares a stream, once its last batch has come, with what was declared; the error, if it is shorter."""
        if walk.plan.num_shards > 1:
            return None
        if walk.total is not None and walk.samples < walk.plan.length and not walk.lost:
            return _too_short(walk)
        if walk.is_longer:
            found = "more" if walk.total is None else f"{walk.samples} samples"
            self.too_long[walk.epoch] = (
                f"keras_mp: the stream is longer than length={walk.plan.length}: it has {found} in epoch {walk.epoch}, "
                "and what came after that many was not served; pass the length that stream.count() finds"
            )
        return walk.error_behind

    def _end(self, walk: Walk, handle: Handle) -> Exception | None:
        """The epoch has no such batch; None: the next one may have."""
        total = walk.total or 0
        if walk.plan.counts_batches and handle.number < walk.plan.num_batches:
            return _too_short(walk)
        if not walk.samples and not walk.lost:
            return KerasMPError(
                f"the stream has no samples in epoch {walk.epoch}: read() gave none for any of its "
                f"{walk.plan.shards} shards; check what they hold"
            )
        self._late += walk.late_failures
        walk.late_failures = []
        if not handle.goes_on:
            ended = StreamEnded(
                f"batch {handle.number} is out of range: the stream ended after {total} batches of epoch {walk.epoch}"
            )
            ended.failures, self._late = tuple(self._late), []
            return ended
        for number, other in sorted(walk.wanted.items()):
            if number >= total and other.goes_on:
                del walk.wanted[number]
                self._place(other)
        return None

    def _taken(self, handle: Handle) -> Loaded:
        """The batch; what failed on the way to it is listed with it.

        Raises:
            Exception: the error in its place.
        """
        walk = handle.walk
        if walk is None:
            raise StreamEnded("this batch has been taken already")
        outcome, number = walk.take(handle.number), handle.number
        handle.walk = None
        is_last = number == walk.plan.num_batches - 1
        if is_last:
            walk.give_up()
        if outcome.error is not None or outcome.loaded is None:
            raise _renumbered(outcome.error, number)
        late, self._late = self._late, []
        behind = walk.late_failures if is_last else ()
        failures = [*outcome.failures, *outcome.loaded.failures, *behind]
        named = [dataclasses.replace(failure, batch=number) for failure in failures]
        return outcome.loaded._replace(batch=outcome.loaded.batch.batch, failures=(*late, *named))


def _too_short(walk: Walk) -> KerasMPError:
    return KerasMPError(
        f"the stream is shorter than length={walk.plan.length}: it has {walk.samples} samples in epoch {walk.epoch}; "
        f"pass length={walk.samples}, which stream.count() finds out too, or None if it varies"
    )


def _renumbered(error: BaseException | None, number: int) -> BaseException:
    """The error with the number that its batch has come to have."""
    if isinstance(error, SampleError) and error.failure.batch != number:
        return sample_error(dataclasses.replace(error.failure, batch=number), error.__cause__, error.note)
    return error or RuntimeError("a batch came without its arrays")
