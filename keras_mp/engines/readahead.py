"""Reading ahead: what will be asked for next is requested before it is asked for.

It knows the order of the requests and nothing of what they mean. It takes no lock: who shares it among threads holds
one. `close` is safe in a finaliser.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from keras_mp.engines.base import Engine
from keras_mp.errors import PoolClosed
from keras_mp.loading.base import Loaded
from keras_mp.plan.request import Request

Handles = dict[tuple[int, int], Any]


@dataclasses.dataclass(frozen=True)
class Limit:
    """How much may be in flight.

    Attributes:
        batches: at most, finished ones included; 0: nothing is asked for ahead.
        at_first: batches, as long as their size is not known.
        bytes: of their arrays. One batch may always be in flight.
        bundles: so many may be, should they hold more than `batches`.
    """

    batches: int
    at_first: int
    bytes: int
    bundles: int = 0

    def depth(self, batch_bytes: int | None, bundle_size: int = 1) -> int:
        """How many batches of that size may be, so many of which travel together."""
        if batch_bytes is None:
            return min(self.batches, self.at_first)
        return min(max(self.batches, self.bundles * bundle_size), max(1, self.bytes // max(1, batch_bytes)))


NONE_AHEAD = Limit(0, 0, 0)


class ReadAhead:
    """A window of requested batches that slides along a sequence of requests.

    Args:
        engine: where batches are loaded.
        requests: what will be asked for, in order.
        limit: how much may be in flight.
        handles: by (epoch, batch), what another has requested and given up (`release`): taken over where it comes next.
    """

    def __init__(
        self, engine: Engine, requests: Iterator[Request], limit: Limit, handles: Handles | None = None
    ) -> None:
        self._engine: Engine | None = engine
        self._requests = requests
        self._limit = limit
        self._knows_size = False
        self._taken_over = handles or {}
        self._ahead: collections.deque[tuple[Request, Any]] = collections.deque()

    def start(self) -> None:
        """Requests what comes first."""
        if depth := self._depth():
            self._fill(depth)
        while self._taken_over:
            self._open().cancel(self._taken_over.popitem()[1])

    def take(self) -> Any:
        """The engine's handle of the next batch.

        Raises:
            PoolClosed: it has been closed.
        """
        engine = self._open()
        if not self._ahead:
            self._fill(max(1, self._depth()))
        _, handle = self._ahead.popleft()
        depth = self._depth()
        missing = depth - len(self._ahead)
        if missing > 0 and missing >= min(engine.bundle_size, depth * 4 // 5):  # several at a time
            self._fill(missing)
        return handle

    def next(self) -> Loaded:
        """Waits for the next batch."""
        handle = self.take()
        loaded = self._open().result(handle)
        self.top_up()
        return loaded

    def top_up(self) -> None:
        """Requests more, once, as soon as the size of a batch is known; to be called when one has come."""
        if not self._knows_size and self._engine is not None and self._engine.batch_bytes is not None:
            self._knows_size = True
            self._fill(max(0, self._depth() - len(self._ahead)))

    @property
    def next_key(self) -> tuple[int, int] | None:
        """Epoch and batch of the next one, if it has been requested."""
        return (self._ahead[0][0].epoch, self._ahead[0][0].batch) if self._ahead else None

    def is_ready(self) -> bool:
        """Whether the next batch has been requested and has come."""
        return bool(self._ahead) and self._open().is_ready(self._ahead[0][1])

    def renew(self) -> None:
        """Requests anew what has been requested and not taken: the loader has changed."""
        requests = [request for request, _ in self._ahead]
        self._cancel()
        if requests:
            self._submit(requests)

    def release(self) -> Handles:
        """Gives up what has been requested and not taken, for another to take over, and closes."""
        handles = {(request.epoch, request.batch): handle for request, handle in self._ahead}
        self._ahead.clear()
        self.close()
        return handles

    def close(self) -> None:
        """Cancels what has been requested, and lets go of the engine."""
        self._cancel()
        self._engine = None

    def _open(self) -> Engine:
        if self._engine is None:
            raise PoolClosed("the dataset has been closed; make a new one")
        return self._engine

    def _depth(self) -> int:
        engine = self._open()
        return self._limit.depth(engine.batch_bytes, engine.bundle_size)

    def _fill(self, count: int) -> None:
        if requests := list(itertools.islice(self._requests, count)):
            self._submit(requests)

    def _submit(self, requests: list[Request]) -> None:
        found = [(request, self._taken_over.pop((request.epoch, request.batch), None)) for request in requests]
        new = iter(self._open().submit([request for request, handle in found if handle is None]))
        self._ahead.extend((request, next(new) if handle is None else handle) for request, handle in found)

    def _cancel(self) -> None:
        engine = self._engine
        while self._ahead and engine is not None:
            engine.cancel(self._ahead.popleft()[1])
