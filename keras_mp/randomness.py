"""Random numbers that depend on (seed, epoch, sample) alone, not on who computes the sample or when (P2).

Each sample has a key, which is the root of its streams (see `seeds`). A function that takes a parameter `rng` gets
a Generator made from it. For code that draws elsewhere, these are seeded from it as well, before each sample: the
global `random` and `numpy.random`, torch's global generator where torch is loaded, and the generators that the code
itself holds (see `generators`).

NOTE (threads): these are shared by all threads, so two threads cannot each have their own seeding of them. With
threads a loader's first batch therefore runs alone, seeded, and if it draws from one of them so do all its batches. If
not, they run in company, without seeding; should a state have moved by the end of one, it is run again, alone. Code
that draws only from `rng`, or not at all, waits for nobody but the first batch.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_mp.errors import PoolClosed
from keras_mp.generators import Found, find_generators
from keras_mp.seeds import Stream, seed_sequence

_GIVEN_UP_GRACE_S = 2.0  # what a batch that nobody wants gets to end, before other threads go on without waiting for it
_LOOK_AGAIN_S = 1.0


class Key:
    """The randomness of one sample, or of one batch: the arguments of `seed_sequence`."""

    __slots__ = ("_root", "_sequence")

    def __init__(self, stream: Stream, seed: int, epoch: int, index: int, repeat: int = 0) -> None:
        self._root = (stream, seed, epoch, index, repeat)
        self._sequence: np.random.SeedSequence | None = None  # not made for code that draws nothing

    def sequence(self, part: int = 0) -> np.random.SeedSequence:
        """The root of its stream, or of one of the further ones."""
        if part:
            return seed_sequence(*self._root, part)
        if self._sequence is None:
            self._sequence = seed_sequence(*self._root)
        return self._sequence

    def generator(self) -> np.random.Generator:
        """A new Generator, the same for the same key."""
        return np.random.Generator(np.random.PCG64(self.sequence()))


Seeder = Callable[[Key], None]


class Generators:
    """All that a loader's code may draw from besides `rng`: the global generators, and those that its objects hold."""

    def __init__(self, own: Sequence[Found] = (), names_torch: bool = False, torch: bool = True) -> None:
        self._own = own
        self._names_torch = names_torch
        self._torch = torch

    @classmethod
    def of(cls, **roots: Any) -> Generators:
        """Those of the code in `roots`."""
        return cls(*find_generators(roots))

    def in_threads(self) -> Generators:
        """The same, but torch's only if the code names it: the training itself may draw from that meanwhile."""
        return Generators(self._own, self._names_torch, self._names_torch)

    def seed(self, key: Key) -> None:
        """Seeds all of them."""
        words = key.sequence().generate_state(5)
        np.random.seed(words[0])
        random.seed(int(words[1]) << 32 | int(words[2]))
        if (torch := self._torch_generator()) is not None:
            torch.manual_seed(int(words[3]) << 32 | int(words[4]))
        for found in self._own:
            found.seed(key.sequence(found.part))

    def state(self) -> list[Any]:
        """Their states, to be compared."""
        name, keys, *rest = np.random.get_state()
        torch = self._torch_generator()
        states = [random.getstate(), (name, np.asarray(keys).tobytes(), *rest)]
        states += [] if torch is None else [torch.get_state().numpy().tobytes()]
        return [*states, *(pickle.dumps(found.get_state()) for found in self._own)]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Puts them back as they were."""
        python, legacy = random.getstate(), np.random.get_state()
        own = [found.get_state() for found in self._own]
        torch = self._torch_generator()
        tensor = None if torch is None else torch.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            if torch is not None:
                torch.set_state(tensor)
            for found, state in zip(self._own, own, strict=True):
                found.set_state(state)

    def _torch_generator(self) -> Any:
        """Torch's, on the CPU, if torch is loaded."""
        torch = sys.modules.get("torch") if self._torch else None
        return getattr(torch, "default_generator", None)


def takes_rng(function: Callable[..., Any] | None) -> bool:
    """Whether `function` has a parameter named `rng`."""
    if function is None:
        return False
    try:
        return "rng" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions without a signature
        return False


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
