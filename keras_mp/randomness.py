"""Random numbers that depend on (seed, epoch, sample) alone, not on who computes the sample or when (P2).

Each sample has a key, which is the root of its streams (see `seeds`). A function that takes a parameter `rng` gets
a Generator made from it; the global `random` and `numpy.random` are seeded from it as well, for code that draws there.

NOTE (threads and global state): the global generators are one per process, so two threads cannot each have their own
seeding of them. With threads a loader's first batch therefore runs alone, seeded, and if it draws from the global state
so do all its batches. If not, they run in company, without seeding; should the state have moved by the end of one, it
is run again, alone. Code that draws only from `rng`, or not at all, waits for nobody but the first batch.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_mp.seeds import Stream, seed_sequence


class Key:
    """The randomness of one sample, or of one batch: the arguments of `seed_sequence`."""

    __slots__ = ("_root", "_sequence")

    def __init__(self, stream: Stream, seed: int, epoch: int, index: int, repeat: int = 0) -> None:
        self._root = (stream, seed, epoch, index, repeat)
        self._sequence: np.random.SeedSequence | None = None  # not made for code that draws nothing

    def sequence(self) -> np.random.SeedSequence:
        """The root of its streams."""
        if self._sequence is None:
            self._sequence = seed_sequence(*self._root)
        return self._sequence

    def generator(self) -> np.random.Generator:
        """A new Generator, the same for the same key."""
        return np.random.Generator(np.random.PCG64(self.sequence()))

    def seed_global_state(self) -> None:
        """Seeds `random` and `numpy.random`."""
        words = self.sequence().generate_state(3)
        np.random.seed(words[0])
        random.seed(int(words[1]) << 32 | int(words[2]))


Seeder = Callable[[Key], None]


def seed_global_state(key: Key) -> None:
    """The plain `Seeder`."""
    key.seed_global_state()


def takes_rng(function: Callable[..., Any] | None) -> bool:
    """Whether `function` has a parameter named `rng`."""
    if function is None:
        return False
    try:
        return "rng" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions without a signature
        return False


def _global_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest)


@contextlib.contextmanager
def restored_global_state() -> Iterator[None]:
    """Puts the global `random` and `numpy.random` back as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


class _Company:
    """A lock that many may hold in company, or one alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._members = 0
        self._alone = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._members += 1
        try:
            yield
        finally:
            with self._condition:
                self._members -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._alone = True
            self._condition.wait_for(lambda: self._members == 0)
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()


_company = _Company()


class ThreadIsolation:
    """Runs a loader's batches on threads so that each sees the global random state it would see alone."""

    def __init__(self) -> None:
        self._draws: bool | None = None  # whether this loader's code draws from the global state; None: not known yet

    def run(self, load: Callable[[Seeder | None], Any]) -> Any:
        """Calls `load(seeder)`, alone and seeded if it draws from the global state; else with None, in company."""
        if self._draws is False:
            with _company.together():
                before = _global_state()
                try:
                    result, error = load(None), None
                except Exception as caught:
                    result, error = None, caught
                moved = _global_state() != before
            if not moved:
                if error is not None:
                    raise error
                return result
        with _company.alone(), restored_global_state():
            last: list[Key] = []

            def seed(key: Key) -> None:
                key.seed_global_state()
                last[:] = [key]

            try:
                return load(seed)
            finally:
                # It may have been somebody else who drew, say Keras shuffling in the main thread: only a state that
                # has moved away from its seeding shows that this code draws.
                after = _global_state()
                if last:
                    last[0].seed_global_state()
                    self._draws = after != _global_state()
