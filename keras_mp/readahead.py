"""Reading ahead: what will be asked for next is requested before it is asked for.

The plan of what comes next is only ever a guess; a batch that is asked for out of turn is loaded at once and is the
right one. So a wrong guess costs time, never data (P1, P2).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from keras_mp.engines import Engine
from keras_mp.loading import Loaded, Request

Key = tuple[int, int]  # epoch, batch


class ReadAhead:
    """A window of requested batches that slides along a plan.

    Args:
        engine: where batches are loaded.
        request: makes the request for (epoch, batch).
        depth: batches in flight at most, finished ones included; 0 asks for none ahead.
        plan: the keys that will be asked for, in order.
    """

    def __init__(
        self,
        engine: Engine,
        request: Callable[[int, int], Request],
        depth: int,
        plan: Iterator[Key] | None = None,
    ) -> None:
        self._engine = engine
        self._request = request
        self._depth = depth
        self._plan = iter(()) if plan is None else plan
        self._handles: dict[Key, Any] = {}
        self._aside: dict[Key, Any] = {}  # requested along the last plan; may yet be asked for
        self._lock = threading.Lock()

    def get(self, key: Key, plan: Iterator[Key] | None = None) -> Loaded:
        """The batch of `key`, requested now if it has not been before.

        Args:
            key: epoch and batch.
            plan: a new plan of what follows it; None keeps the old one.
        """
        with self._lock:
            if plan is not None:
                self._follow(plan)
            elif key not in self._handles:
                self._fill()  # it may be the first of the plan
            handle = self._handles.pop(key, None) or self._aside.pop(key, None)
            if handle is None:
                (handle,) = self._engine.submit([self._request(*key)])
            self._fill()
        return self._engine.result(handle)

    def expect(self, plan: Iterator[Key]) -> None:
        """Requests what comes first in `plan`, and forgets the plan before it."""
        with self._lock:
            self._follow(plan)
            self._fill()

    def _follow(self, plan: Iterator[Key]) -> None:
        self._cancel(self._aside)
        self._aside, self._handles, self._plan = self._handles, {}, plan

    def is_ready(self, key: Key) -> bool:
        """Whether the batch of `key` has been requested and has come."""
        with self._lock:
            handle = self._handles.get(key)
            return handle is not None and self._engine.is_ready(handle)

    def _fill(self) -> None:
        if self._depth - len(self._handles) < min(self._engine.bundle_size, self._depth * 4 // 5):
            return  # until there is room for several
        new: dict[Key, None] = {}
        while len(self._handles) + len(new) < self._depth:
            key = next(self._plan, None)
            if key is None:
                break
            if key in self._aside:
                self._handles[key] = self._aside.pop(key)
            elif key not in self._handles:
                new[key] = None
        if new:
            self._handles.update(zip(new, self._engine.submit([self._request(*key) for key in new]), strict=True))

    def drop(self) -> None:
        """Forgets the plan and all that was requested along it."""
        with self._lock:
            self._plan = iter(())
            self._cancel(self._handles)
            self._cancel(self._aside)

    def _cancel(self, handles: dict[Key, Any]) -> None:
        for handle in handles.values():
            self._engine.cancel(handle)
        handles.clear()
