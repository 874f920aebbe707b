"""What a dataset has requested before it was asked for it.

There is one read-ahead along the pass that Keras runs, one along batches that somebody looks at one after the other,
and one for each iteration. What was loaded for one that is given up is used by the next, unless the source or the
functions have changed since. Takes no lock: who uses it holds one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from keras_mp.engines.base import Engine
from keras_mp.engines.readahead import NONE_AHEAD, Handles, Limit, ReadAhead
from keras_mp.errors import PoolClosed
from keras_mp.plan.progress import BatchKey
from keras_mp.plan.request import Request


class Prefetch:
    """The read-aheads of one dataset.

    Args:
        limit: how much may be in flight, for each of them.
    """

    def __init__(self, limit: Limit) -> None:
        self.expected: Any = None  # what a pass that has not begun, but is read ahead for, will go through
        self._limit = limit
        self._pass: ReadAhead | None = None
        self._outdated: ReadAhead | None = None  # requested when the source or the functions were in another state
        self._looks: ReadAhead | None = None
        self._looked_at = -2
        self._all: weakref.WeakSet[ReadAhead] = weakref.WeakSet()

    def open(
        self, engine: Engine, requests: Iterator[Request], limit: Limit | None = None, handles: Handles | None = None
    ) -> ReadAhead:
        """A read-ahead along `requests`, for an iteration."""
        ahead = ReadAhead(engine, requests, limit or self._limit, handles)
        self._all.add(ahead)
        ahead.start()
        return ahead

    def follow(self, engine: Engine, requests: Iterator[Request], expected: Any = None) -> None:
        """Reads ahead along `requests` for the pass that Keras runs, or is `expected` to run."""
        handles: Handles = {}
        for before in (self._looks, self._pass):
            if before is not None and before is not self._outdated:
                handles |= before.release()
        self.drop()
        self._pass, self.expected = self.open(engine, requests, handles=handles), expected

    def next(self) -> Any:
        """The engine's handle of the next batch of the pass.

        Raises:
            PoolClosed: the dataset was closed in the middle of it.
        """
        if self._pass is None:
            raise PoolClosed("the dataset was closed in the middle of a pass; make a new one")
        return self._pass.take()

    def top_up(self) -> None:
        """Requests more, if it is now known how large the batches are."""
        for ahead in (self._pass, self._looks):
            if ahead is not None:
                ahead.top_up()

    def look(self, engine: Engine, index: int, step: int, key: BatchKey, requests: Iterator[Request]) -> Any:
        """The handle of a batch outside of a pass; who looks at one after the other is read ahead.

        Args:
            engine: where it is loaded.
            index: the number that was asked for.
            step: how far the next number is from it, where somebody goes through them.
            key: what is asked for.
            requests: that, and what comes after it.
        """
        before, self._looked_at = self._looked_at, index
        if self._looks is None or self._looks.next_key != key:
            self.drop_looks()
            self._looks = self.open(engine, requests, None if index in (0, before + step) else NONE_AHEAD)
        return self._looks.take()

    def outdate(self) -> None:
        """The source or the functions have changed."""
        self.drop_looks()
        self._outdated, self.expected = self._pass, None  # so that a pass which has not begun is requested anew

    def renew(self) -> None:
        """Requests anew what has been requested for the pass and not been taken."""
        if self._pass is not None:
            self._pass.renew()
        self._outdated = None

    def drop_looks(self) -> None:
        """Gives up what was requested for looks."""
        if self._looks is not None:
            self._looks.close()
        self._looks = None

    def drop(self) -> None:
        """Gives up what was requested for looks and for the pass."""
        self.drop_looks()
        if self._pass is not None:
            self._pass.close()
        self._pass = self._outdated = self.expected = None

    def close(self) -> None:
        """Ends every read-ahead: who asks one for its next batch gets `PoolClosed`."""
        self.drop()
        for ahead in list(self._all):
            ahead.close()
