"""Random numbers that depend on (seed, epoch, sample) alone, not on who computes the sample or when (P2).

Each sample has a key, which is the root of its streams (see `seeds`). A function that takes a parameter `rng` gets
a Generator made from it. For code that draws elsewhere, these are seeded from it as well, before each sample: the
global `random` and `numpy.random`, torch's global generator where torch is loaded, and the generators that the code
itself holds (see `generators`).
"""

from __future__ import annotations

import contextlib
import inspect
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_mp.loading.generators import HeldGenerator, find_generators
from keras_mp.plan.seeds import Stream, seed_sequence


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

    def __init__(self, held: Sequence[HeldGenerator] = (), names_torch: bool = False, torch: bool = True) -> None:
        self._held = held
        self._names_torch = names_torch
        self._torch = torch

    @classmethod
    def of(cls, **roots: Any) -> Generators:
        """Those of the code in `roots`."""
        return cls(*find_generators(roots))

    def in_threads(self) -> Generators:
        """The same, but torch's only if the code names it: the training itself may draw from that meanwhile."""
        return Generators(self._held, self._names_torch, self._names_torch)

    def seed(self, key: Key) -> None:
        """Seeds all of them."""
        words = key.sequence().generate_state(5)
        np.random.seed(words[0])
        random.seed(int(words[1]) << 32 | int(words[2]))
        if (torch := self._torch_generator()) is not None:
            torch.manual_seed(int(words[3]) << 32 | int(words[4]))
        for held in self._held:
            held.seed(key.sequence(held.part))

    def state(self) -> list[Any]:
        """Their states, to be compared."""
        name, keys, *rest = np.random.get_state()
        torch = self._torch_generator()
        states = [random.getstate(), (name, np.asarray(keys).tobytes(), *rest)]
        states += [] if torch is None else [torch.get_state().numpy().tobytes()]
        return [*states, *(pickle.dumps(held.get_state()) for held in self._held)]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Puts them back as they were."""
        accessors: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
            (random.getstate, random.setstate),
            (np.random.get_state, np.random.set_state),
        ]
        accessors += [(held.get_state, held.set_state) for held in self._held]
        if (torch := self._torch_generator()) is not None:
            accessors.append((torch.get_state, torch.set_state))
        before = [(set_state, get_state()) for get_state, set_state in accessors]
        try:
            yield
        finally:
            for set_state, state in before:
                set_state(state)

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
