"""Batches of a stream: samples are read from a lane, and then made a batch of by the code that all samples share.

A worker keeps the lanes that it reads open from batch to batch. One that another worker goes on with, or nobody, is
closed after a while: a lane is opened where it is wanted, and where it stands is said by each request (P2).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras_mp.errors import SampleFailure
from keras_mp.loading.base import Loaded, Place, failure_of
from keras_mp.loading.lane_reader import Drawn, Failed, LaneReader, Shards, describe_shard, takes_start
from keras_mp.loading.loader import SampleLoader
from keras_mp.loading.randomness import Key, Seeder
from keras_mp.loading.timing import SOURCE, StageTimes
from keras_mp.plan.lanes import lane_shards
from keras_mp.plan.pieces import Cursor, Piece, Report
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream

_MAX_SUBSTITUTES = 32
_MAX_REST_BYTES = 1 << 26  # of what is left over in a lane: more is read again where it is wanted


class Served(NamedTuple):
    """What a request for a batch of a stream comes to.

    Attributes:
        batch: the batch; None if the lane had too few samples for one, or none was wanted.
        report: of the only piece, or the last.
    """

    batch: Any
    report: Report


@dataclasses.dataclass
class StreamLoader(SampleLoader):
    """Loads batches of lanes; `source` is the list of shards.

    Attributes:
        read: shard -> iterator of samples.
        lanes: how many there are.
        block: samples that are shuffled with each other; 0: none are, nor are the shards.
    """

    read: Callable[..., Any] | None = None
    lanes: int = 1
    block: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs_user_code = True

    @property
    def has_numbered_samples(self) -> bool:
        """False: which samples a request is for, only reading tells."""
        return False

    @functools.cached_property
    def open_lanes(self) -> OpenLanes:
        """The lanes that are open in this process."""
        return OpenLanes(2 * self.lanes)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("open_lanes", None)
        return state

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """Loads `Served`, with the shards that failed on the way among the failures."""
        if request.reading is None:
            raise RuntimeError("a batch of a stream was asked for by its number alone")
        times.begin_batch(request.epoch, request.batch, len(request.samples))
        drawn, failures = list[Drawn](), list[SampleFailure]()
        pieces = request.reading.pieces
        for piece in pieces:
            found, failed, report = self._read_piece(request, piece, seed)
            drawn += found
            failures += failed
        times.lap(SOURCE)
        if not request.samples or (len(pieces) == 1 and report.found < pieces[0].size):
            return Loaded(Served(None, report), tuple(failures))
        first = functools.partial(self._first_samples, request, pieces[0].lane, seed)
        loaded = _BatchLoader.of(self, drawn, first).load_drawn(request, report_position, seed, times)
        return Loaded(Served(loaded.batch, report), (*failures, *loaded.failures))

    def _read_piece(
        self, request: Request, piece: Piece, seed: Seeder | None
    ) -> tuple[list[Drawn], list[SampleFailure], Report]:
        if piece.rest is not None:
            try:
                found = pickle.loads(piece.rest)
            except Exception:  # of a class that only the worker has which read it
                pass
            else:
                return found[piece.skip : piece.skip + piece.size], [], Report(piece.size, piece.cursor)
        epoch, lane = request.epoch, piece.lane
        reader = self.open_lanes.pop((epoch, lane, piece.cursor)) or self._reader(request, lane, piece.cursor)
        try:
            drawn, failed = reader.take(piece.skip + piece.size, self._failed(request), seed)
        except BaseException:
            reader.close()
            raise
        repeats = request.reading is not None and request.reading.repeat > 0
        failures = [] if repeats else failed  # told of when the samples that are left over were found
        drawn = drawn[piece.skip :]
        if len(drawn) < piece.size:
            reader.close()
            return drawn, failures, Report(len(drawn), piece.cursor, len(failures), _dump(drawn))
        self.open_lanes.put((epoch, lane, reader.cursor), reader)
        return drawn, failures, Report(len(drawn), reader.cursor, len(failures))

    def _failed(self, request: Request) -> Failed:
        def failed(error: BaseException, shard: int, offset: int) -> SampleFailure:
            failure = failure_of(error, "read", request, shard, describe_shard(self.source, shard))
            return dataclasses.replace(failure, offset=offset)

        return failed

    def _reader(self, request: Request, lane: int, cursor: Cursor) -> LaneReader:
        order: Sequence[int] = lane_shards(len(self.source), self.lanes, self.block > 0, self.seed, request.epoch, lane)
        return LaneReader(self.shards(), order, request.epoch, lane, cursor)

    def shards(self) -> Shards:
        """What lanes read."""
        if self.read is None:
            raise RuntimeError("a stream has no read")
        goes_on = self.on_error != "raise"
        return Shards(self.source, self.read, takes_start(self.read), self.block, self.seed, self.retries, goes_on)

    def _first_samples(self, request: Request, lane: int, seed: Seeder | None) -> list[Drawn]:
        """The first samples of a lane in its epoch, for a batch none of whose own is good."""
        reader = self._reader(request, lane, Cursor())
        try:
            return reader.take(_MAX_SUBSTITUTES, self._failed(request), seed)[0]
        finally:
            reader.close()


class OpenLanes:
    """Lanes that are open, by epoch, lane and where they stand; each is taken out by whoever reads on.

    Args:
        limit: how many at most. Those that have not been used for as many batches are closed too.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._readers: dict[tuple[int, int, Cursor], tuple[LaneReader, int]] = {}  # the last used ones last
        self._clock = itertools.count()

    def pop(self, key: tuple[int, int, Cursor]) -> LaneReader | None:
        """Takes out the lane that stands there, if it is open."""
        found = self._readers.pop(key, None)
        return None if found is None else found[0]

    def put(self, key: tuple[int, int, Cursor], reader: LaneReader) -> None:
        """Keeps a lane open. Any thread may do so: each step is one call into C."""
        now = next(self._clock)
        replaced = self._readers.pop(key, None)
        self._readers[key] = reader, now
        if replaced is not None:
            replaced[0].close()
        for other, (_, used) in list(self._readers.items()):
            if len(self._readers) <= self._limit and now - used <= self._limit:
                break
            if (found := self._readers.pop(other, None)) is not None:
                found[0].close()


class _BatchLoader(SampleLoader):
    """Makes one batch of samples that have been read: its source."""

    _shards: Sequence[Any]
    _own: int  # how many of them belong to the batch
    _first: Callable[[], list[Drawn]]

    @classmethod
    def of(cls, loader: StreamLoader, drawn: list[Drawn], first: Callable[[], list[Drawn]]) -> _BatchLoader:
        """The loader of these samples.

        Args:
            loader: says what is done with them.
            drawn: the samples.
            first: gives others.
        """
        made = object.__new__(cls)
        made.__dict__.update(loader.__dict__, source=drawn, copies_items=False)
        made._shards, made._own, made._first = loader.source, len(drawn), first
        return made

    def load_drawn(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """The batch of the samples that the request names by their positions among those that were read."""
        if request.failed:  # whoever blamed these for a worker's end did not know which samples they are
            named = tuple((place, self._named(failure, request.samples[place])) for place, failure in request.failed)
            request = request._replace(failed=named)
        repeat = request.reading.repeat if request.reading is not None else 0
        if repeat > 1:
            request = request._replace(repeats=[repeat - 1] * len(request.samples))
        return self.make(request, report_position, seed, times)

    def _named(self, failure: SampleFailure, index: int) -> SampleFailure:
        drawn = self.source[index]
        item = describe_shard(self._shards, drawn.shard)
        return dataclasses.replace(failure, index=drawn.shard, offset=drawn.offset, item=item)

    def key_of(self, stream: Stream, epoch: int, index: int, repeat: int) -> Key:
        drawn = self.source[index]
        return Key(stream, self.seed, epoch, (drawn.shard << 32) + drawn.offset, repeat)

    def batch_key(self, request: Request) -> Key:
        turn, repeat = (request.reading.turn, request.reading.repeat) if request.reading else (0, 0)
        return Key(Stream.BATCH, self.seed, request.epoch, turn, repeat)

    def number_of(self, index: int) -> int:
        return int(self.source[index].shard)

    def failure(self, error: BaseException, stage: str, request: Request, index: int, item: str) -> SampleFailure:
        return self._named(failure_of(error, stage, request, index, item), index)

    def read_item(self, at: Place, index: int, times: StageTimes | None) -> Any:
        at.item = self.source[index].sample
        if times is not None:
            times.item = at.item
        return at.item

    def item_in_words(self, at: Place, index: int) -> str:
        return self.describe_item(index)

    def describe_item(self, index: int) -> str:
        return describe_shard(self._shards, self.source[index].shard)

    def substitutes(self, request: Request) -> list[int]:
        """Positions behind those of the samples that were read: the first ones of the lane."""
        own = {(drawn.shard, drawn.offset) for drawn in self.source[: self._own]}
        if len(self.source) == self._own:
            others = [drawn for drawn in self._first() if (drawn.shard, drawn.offset) not in own]
            self.source = [*self.source, *others]
        return list(range(self._own, len(self.source)))


def _dump(drawn: list[Drawn]) -> bytes | None:
    try:
        dumped = pickle.dumps(drawn, protocol=5)
    except Exception:  # it will be read again
        return None
    return dumped if len(dumped) <= _MAX_REST_BYTES else None
