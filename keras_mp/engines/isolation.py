"""Batches that are loaded on threads of one process, which share the generators that their code may draw from.

Two threads cannot each have their own seeding of them. A loader's first batch therefore runs alone, seeded, and if it
draws from one of them so do all its batches. If not, they run side by side, without seeding; should a state have moved
by the end of one, it is run again, alone. Code that draws only from `rng`, or not at all, waits for nobody but the
first batch.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from keras_mp.errors import PoolClosed
from keras_mp.loading.randomness import Generators, Key, Seeder

_GIVEN_UP_GRACE_S = 2.0  # what a batch that nobody wants gets to end, before other threads go on without waiting for it
_LOOK_AGAIN_S = 1.0


class _Company:
    """A lock that many may hold in company, or one alone. Who holds it for what is given up does not count."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._members: set[_Member] = set()
        self._alone: _Member | None = None

    @contextlib.contextmanager
    def together(self, isolation: ThreadIsolation) -> Iterator[None]:
        me = _Member(isolation)
        with self._condition:
            self._wait_until(self._nobody_is_alone, isolation)
            self._members.add(me)
        try:
            yield
        finally:
            with self._condition:
                self._members.discard(me)
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self, isolation: ThreadIsolation) -> Iterator[None]:
        me = _Member(isolation)
        with self._condition:
            self._wait_until(self._nobody_is_alone, isolation)
            self._alone = me
        try:
            with self._condition:
                self._wait_until(lambda: all(member.is_given_up for member in self._members), isolation)
            yield
        finally:
            with self._condition:
                if self._alone is me:
                    self._alone = None
                self._condition.notify_all()

    def _nobody_is_alone(self) -> bool:
        return self._alone is None or self._alone.is_given_up

    def _wait_until(self, condition: Callable[[], bool], isolation: ThreadIsolation) -> None:
        while not condition():
            isolation.check()
            self._condition.wait(_LOOK_AGAIN_S)  # that one is given up, nobody tells


class _Member:
    """One batch that is being loaded."""

    def __init__(self, isolation: ThreadIsolation) -> None:
        self._isolation = isolation

    @property
    def is_given_up(self) -> bool:
        given_up_at = self._isolation.given_up_at
        return given_up_at is not None and time.monotonic() - given_up_at > _GIVEN_UP_GRACE_S


_company = _Company()


def _after_fork_in_child() -> None:
    global _company
    _company = _Company()  # the threads that held it are not here to let it go


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class MustRunAlone(Exception):
    """Raised by a load in company: what it made may be another's."""


class ThreadIsolation:
    """Runs a loader's batches on threads so that each finds the shared generators as it would find them alone."""

    def __init__(self) -> None:
        self._draws: bool | None = None  # whether this loader's code draws from them; None: not known yet
        self._must_be_alone = False
        self._first = threading.Lock()
        self.given_up_at: float | None = None

    def give_up(self) -> None:
        """Nobody wants these batches any more: one that does not end (P3) is waited for only a moment longer."""
        self.given_up_at = time.monotonic()

    def check(self) -> None:
        """Raises PoolClosed if nobody wants these batches any more."""
        if self.given_up_at is not None:
            raise PoolClosed("the dataset was closed while this batch waited for another to be loaded")

    def run(self, load: Callable[[Seeder | None], Any], generators: Generators) -> Any:
        """Calls `load(seeder)`, alone and seeded if it draws from `generators`; else with None, in company.

        Once a load has raised `MustRunAlone`, all run alone.
        """
        generators = generators.in_threads()
        if self._draws is None:
            while not self._first.acquire(timeout=_LOOK_AGAIN_S):
                self.check()
            try:  # whoever comes while the first batch is loaded may go on in company after it
                if self._draws is None:
                    return self._run_alone(load, generators)
            finally:
                self._first.release()
        if self._draws is False and not self._must_be_alone:
            with _company.together(self):
                before = generators.state()
                try:
                    result, error = load(None), None
                except Exception as caught:
                    result, error = None, caught
                moved = generators.state() != before
            if isinstance(error, MustRunAlone):
                self._must_be_alone = True
            if not moved and not self._must_be_alone:
                if error is not None:
                    raise error
                return result
        return self._run_alone(load, generators)

    def _run_alone(self, load: Callable[[Seeder | None], Any], generators: Generators) -> Any:
        with _company.alone(self), generators.restored():
            seeded: list[Any] = []  # the state behind the last seeding, until it is known that this code draws

            def check() -> None:
                # It may have been somebody else who drew, say Keras shuffling in the main thread: only a state that
                # has moved away from its seeding shows that this code draws.
                if seeded and generators.state() != seeded:
                    self._draws = True
                    seeded.clear()

            def seed(key: Key) -> None:
                check()
                generators.seed(key)
                if not self._draws:
                    seeded[:] = generators.state()

            try:
                return load(seed)
            finally:
                check()
                self._draws = bool(self._draws)
