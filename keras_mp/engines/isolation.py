"""Loading on threads of one process, which share the random generators that the user's code may draw from (P2).

Two threads cannot each have their own seeding of them. A loader's first batch is therefore loaded while no other is,
seeded, and if its code draws from one of them, so are all its batches. If not, they are loaded side by side, without
seeding; should a generator have moved by the end of one, that one is loaded again, exclusively. Code that draws only
from `rng`, or not at all, waits for nobody but the first batch. No wait here outlives the dataset whose batch waits,
and none is for a dataset that is closed (P3).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from keras_mp.errors import PoolClosed
from keras_mp.loading.base import Loaded, Loader, ignore_position
from keras_mp.loading.in_process import load_timed, owned
from keras_mp.loading.randomness import Generators, Key, Seeder
from keras_mp.plan.request import Request

_ABANDONED_GRACE_S = 2.0  # what a batch that nobody wants gets to end, before other threads go on beside it
_POLL_S = 1.0
_MAX_ADDRESSES = 4096


class _SharedLock:
    """A lock that many batches hold together, or one exclusively. Those that are abandoned do not count."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shared: list[ThreadIsolation] = []  # of the batches that hold it, each its loader's
        self._exclusive: list[ThreadIsolation] = []

    @contextlib.contextmanager
    def held(self, isolation: ThreadIsolation, exclusively: bool) -> Iterator[None]:
        holders = self._exclusive if exclusively else self._shared
        with self._changed:
            self._wait_for(self._exclusive, isolation)
            holders.append(isolation)
        try:
            if exclusively:  # no other comes in any more, but some are there
                with self._changed:
                    self._wait_for(self._shared, isolation)
            yield
        finally:
            with self._changed:
                holders.remove(isolation)
                self._changed.notify_all()

    def _wait_for(self, holders: list[ThreadIsolation], isolation: ThreadIsolation) -> None:
        while any(holder.must_be_waited_for for holder in holders):
            isolation.check_wanted()
            self._changed.wait(_POLL_S)  # nothing notifies it when a batch is abandoned


_lock = _SharedLock()  # of the process, as the generators are


def _after_fork_in_child() -> None:
    global _lock
    _lock = _SharedLock()  # the threads that held it are not here to release it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class MustRunExclusively(Exception):
    """Raised by a load that ran beside others: what it made may be another's."""


class ThreadIsolation:
    """Runs a dataset's batches on threads so that each finds the shared generators as it would find them alone."""

    def __init__(self) -> None:
        self._exclusive: bool | None = None  # whether all batches are loaded exclusively; None: not known yet
        self._first_batch = threading.Lock()
        self._abandoned_at: float | None = None

    def abandon(self) -> None:
        """Nobody wants these batches any more: one that does not end is waited for only a moment longer (P3)."""
        self._abandoned_at = time.monotonic()

    @property
    def must_be_waited_for(self) -> bool:
        """Whether batches of others wait for one of these."""
        return self._abandoned_at is None or time.monotonic() - self._abandoned_at <= _ABANDONED_GRACE_S

    @property
    def is_exclusive(self) -> bool:
        """Whether it is known that this code draws from the shared generators, or must run alone for another reason."""
        return bool(self._exclusive)

    def check_wanted(self) -> None:
        """Raises PoolClosed if nobody wants these batches any more."""
        if self._abandoned_at is not None:
            raise PoolClosed("the dataset was closed while this batch waited for another to be loaded")

    def run(self, load: Callable[[Seeder | None], Any], generators: Generators) -> Any:
        """Calls `load(seeder)`, exclusively, if it draws from `generators`; otherwise `load(None)`, beside others.

        Once a load has raised `MustRunExclusively`, all do.
        """
        generators = generators.in_threads()
        if self._exclusive is None:
            while not self._first_batch.acquire(timeout=_POLL_S):
                self.check_wanted()
            try:  # who comes while the first batch is loaded need not hold the lock exclusively after it
                if self._exclusive is None:
                    return self._run_exclusively(load, generators)
            finally:
                self._first_batch.release()
        if not self._exclusive:
            result: Any = None
            error: Exception | None = None
            with _lock.held(self, exclusively=False):
                before = generators.state()
                try:
                    result = load(None)
                except MustRunExclusively:
                    self._exclusive = True
                except Exception as caught:
                    error = caught
                has_moved = generators.state() != before
            if not has_moved and not self._exclusive:
                if error is not None:
                    raise error
                return result
        return self._run_exclusively(load, generators)

    def _run_exclusively(self, load: Callable[[Seeder | None], Any], generators: Generators) -> Any:
        with _lock.held(self, exclusively=True), generators.restored():
            seeded: list[Any] = []  # the state behind the last seeding, until it is known that this code draws

            def check_state() -> None:
                # It may have been somebody else who drew, say Keras shuffling in the main thread: only a state that
                # has moved away from its seeding shows that this code draws.
                if seeded and generators.state() != seeded:
                    self._exclusive = True
                    seeded.clear()

            def seed(key: Key) -> None:
                check_state()
                generators.seed(key)
                if not self._exclusive:
                    seeded[:] = generators.state()

            try:
                return load(seed)
            finally:
                check_state()
                self._exclusive = bool(self._exclusive)


class ThreadLoader:
    """Loads a dataset's batches on any thread, several at a time.

    Args:
        loader: what loads them.
        isolation: that of the loaders before, where this one replaces them.
    """

    def __init__(self, loader: Loader, isolation: ThreadIsolation | None = None) -> None:
        self._loader = loader.renewed()
        self._isolation = isolation or ThreadIsolation()
        self._copied_at: dict[int, tuple[int, int]] = {}  # by address of an array: (epoch, batch) it was last part of

    def load(self, request: Request, report_position: Callable[[int], None] = ignore_position) -> Loaded:
        """Loads a batch, whose arrays nobody else holds."""
        if not self._loader.runs_user_code:
            return self._load(request, report_position, None)
        loaded: Loaded = self._isolation.run(
            lambda seed: self._load(request, report_position, seed), self._loader.generators
        )
        return loaded

    def _load(self, request: Request, report_position: Callable[[int], None], seed: Seeder | None) -> Loaded:
        loaded, copied = owned(load_timed(self._loader, request, seed, report_position), self._loader)
        if len(self._copied_at) > _MAX_ADDRESSES:
            self._copied_at.clear()
        for address in copied:
            epoch, batch = self._copied_at.setdefault(address, (request.epoch, request.batch))
            if epoch == request.epoch and batch != request.batch and seed is None:
                raise MustRunExclusively(
                    f"batches {batch} and {request.batch} lie in the same memory, so while one was made, or copied, "
                    "another thread may have written to it"
                )
            self._copied_at[address] = request.epoch, request.batch
        return loaded
