"""One lane of a stream in the hands of a worker: its open shard, and the block of samples that is being handed out.

All that it needs to go on elsewhere is its cursor: whoever has that opens the shard in which the block begins, skips
what stands before it, reads the block anew and hands out the samples of it that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_mp.errors import SampleFailure, sample_error, short_repr
from keras_mp.loading.randomness import Key, Seeder
from keras_mp.plan.pieces import Cursor
from keras_mp.plan.seeds import Stream, seed_sequence

_OPENED, _READ_ON = 0, 1

Failed = Callable[[BaseException, int, int], SampleFailure]  # of an error, a shard's number, and an offset in it


class Drawn(NamedTuple):
    """A sample as it was read.

    Attributes:
        shard: number of its shard.
        offset: how many samples stand before it there.
        sample: what `read` gave.
    """

    shard: int
    offset: int
    sample: Any


def takes_start(read: Callable[..., Any]) -> bool:
    """Whether `read` has a parameter named `start`."""
    try:
        return "start" in inspect.signature(read).parameters
    except (TypeError, ValueError):  # built-in functions without a signature
        return False


@dataclasses.dataclass(frozen=True)
class Shards:
    """What lanes read: the user's shards, and how.

    Attributes:
        items: the shards.
        read: shard -> iterator of samples; with a parameter `start`, those from that offset on.
        takes_start: whether it has one.
        block: samples that are shuffled with each other; 0: none are.
        seed: root of all randomness.
        retries: how often a shard that fails is opened again first.
        goes_on: whether a shard that fails costs only its rest, and not the batch.
    """

    items: Sequence[Any]
    read: Callable[..., Any]
    takes_start: bool
    block: int
    seed: int
    retries: int
    goes_on: bool

    def open(self, shard: int, offset: int) -> Iterator[Any]:
        """The samples of a shard from `offset` on."""
        item = self.items[shard]
        samples = self.read(item, start=offset) if self.takes_start else self.read(item)
        if samples is None:
            raise TypeError("read returned None instead of an iterator of samples; did it forget to yield?")
        found: Iterator[Any] = iter(samples)
        for skipped in range(0 if self.takes_start else offset):
            try:
                next(found)
            except StopIteration:
                raise RuntimeError(
                    f"the shard ended after {skipped} samples, but gave {offset} before; it must give the same "
                    "samples each time that it is read in an epoch"
                ) from None
        return found


def check_read(read: Any) -> Callable[..., Any]:
    """A function that can be called with a shard.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not callable(read):
        raise TypeError(f"read must be a function from a shard to an iterator of samples, got {short_repr(read, 80)}")
    try:
        parameters = list(inspect.signature(read).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in _VARIADIC]
    if "rng" in needed:
        raise ValueError(
            f"read={short_repr(read, 80)} takes rng, but it must give the same samples each time it is called with a "
            "shard; draw random numbers in `transform`"
        )
    others = [name for name in needed[1:] if name != "start"]
    if others:
        raise TypeError(
            f"read is called with a shard, and by the name `start` with a number of samples to leave out, but "
            f"{short_repr(read, 80)} needs {', '.join(others)} too; use functools.partial"
        )
    checked: Callable[..., Any] = read
    return checked


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class CountedShards:
    """Counts the samples of shards: callable from a shard's number.

    Attributes:
        shards: what is read.
        until_failure: whether a shard that fails has the samples that it gave before.
    """

    shards: Shards
    until_failure: bool

    def __call__(self, shard: int) -> int:
        count = 0
        try:
            for _ in self.shards.open(shard, 0):
                count += 1
        except Exception:
            if not self.until_failure:
                raise
        return count


class LaneReader:
    """Reads a lane from a cursor on.

    Args:
        shards: what is read.
        order: numbers of the lane's shards, in its order.
        epoch, lane: which lane of which epoch.
        cursor: where to begin.
    """

    def __init__(self, shards: Shards, order: Sequence[int], epoch: int, lane: int, cursor: Cursor) -> None:
        self._shards = shards
        self._order = order
        self._epoch, self._lane = epoch, lane
        self._start = cursor
        self._number, self._taken = cursor.block - 1, 0
        self._place, self._offset = cursor.place, cursor.offset  # of what is read next
        self._block: list[Drawn] = []
        self._samples: Iterator[Any] | None = None
        self._failures: list[SampleFailure] = []

    @property
    def cursor(self) -> Cursor:
        """Where it stands."""
        if self._taken < len(self._block):
            return self._start._replace(taken=self._taken)
        return Cursor(self._number + 1, self._place, self._offset)

    def take(self, count: int, failed: Failed, seed: Seeder | None) -> tuple[list[Drawn], list[SampleFailure]]:
        """The next samples, fewer only where the lane ends; and the shards that failed in blocks begun with them.

        Args:
            count: how many.
            failed: makes the record of a failed shard.
            seed: seeds the generators that `read` may draw from.

        Raises:
            SampleError: a shard failed, and must not.
        """
        self._failures = []
        if self._start.taken and self._number < self._start.block:  # begun by another reader, which has told of these
            taken = self._start.taken
            self._fill(failed, seed)
            if len(self._block) < taken:
                raise RuntimeError(f"a block of lane {self._lane} has become shorter; do the shards change?")
            self._taken, self._failures = taken, []
        if self._shards.block <= 1:
            self._seed(seed, self._place, self._offset, _READ_ON)
        found: list[Drawn] = []
        while len(found) < count:
            if self._taken == len(self._block):
                self._fill(failed, seed)
                if not self._block:
                    break
            stop = min(len(self._block), self._taken + count - len(found))
            found += self._block[self._taken : stop]
            self._taken = stop
        return found, self._failures

    def close(self) -> None:
        """Closes the open shard, as `close()` of a generator does."""
        samples, self._samples = self._samples, None
        if (close := getattr(samples, "close", None)) is not None:
            with contextlib.suppress(Exception):
                close()

    def _fill(self, failed: Failed, seed: Seeder | None) -> None:
        """Reads the next block; an empty one at the end of the lane."""
        self._number += 1
        self._start = Cursor(self._number, self._place, self._offset)
        self._block, self._taken = [], 0
        wanted, block = max(1, self._shards.block), list[Drawn]()
        if wanted > 1:
            self._seed(seed, self._place, self._offset, _READ_ON)
        while len(block) < wanted and self._place < len(self._order):
            sample = self._next(failed, seed)
            if sample is not None:
                block.append(sample)
        if self._shards.block > 1:
            root = seed_sequence(Stream.BLOCK, self._shards.seed, self._epoch, (self._lane << 32) + self._number)
            order = np.random.Generator(np.random.PCG64(root)).permutation(len(block))
            block = [block[index] for index in order.tolist()]
        self._block = block

    def _next(self, failed: Failed, seed: Seeder | None) -> Drawn | None:
        """The next sample of the shard at hand; None where the shard has ended, or failed, and the next one follows."""
        shard, attempts = int(self._order[self._place]), self._shards.retries
        while True:
            try:
                if self._samples is None:
                    self._seed(seed, shard, 0, _OPENED)
                    self._samples = self._shards.open(shard, self._offset)
                    if self._offset:
                        self._seed(seed, self._place, self._offset, _READ_ON)
                sample = next(self._samples)
            except StopIteration:
                self._next_shard()
                return None
            except (Exception, SystemExit) as error:
                self.close()
                if attempts > 0:
                    attempts -= 1
                    continue
                failure = failed(error, shard, self._offset)
                if not self._shards.goes_on:
                    raise sample_error(failure, error) from error
                self._failures.append(failure)
                self._next_shard()
                return None
            self._offset += 1
            return Drawn(shard, self._offset - 1, sample)

    def _seed(self, seed: Seeder | None, high: int, low: int, kind: int) -> None:
        """Seeds what `read` may draw from though it should not: where a shard is opened, and where a block begins.

        Without blocks it is where a batch begins: for each sample it would take longer than to read it.
        """
        if seed is not None:
            lane = 0 if kind == _OPENED else self._lane + 1
            seed(Key(Stream.READ, self._shards.seed, self._epoch, (high << 32) + low, lane))

    def _next_shard(self) -> None:
        self.close()
        self._place, self._offset = self._place + 1, 0


def describe_shard(items: Sequence[Any], shard: int) -> str:
    """A shard, in words."""
    return short_repr(items[shard], 120)
