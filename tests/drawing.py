"""Code that draws from generators of its own. NumPy only: a worker that gets some of it imports this module."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

module_rng = np.random.default_rng(7)
module_python = random.Random(7)


class Holder:
    """Holds generators of all kinds, in many ways."""

    shared = np.random.RandomState(3)

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)
        self.parts: dict[str, Any] = {"python": random.Random(7), "more": [("legacy", np.random.RandomState(7))]}
        self.draw = np.random.Generator(np.random.MT19937(7)).random

    def __call__(self, value: Any) -> Any:
        drawn = [self.rng.random(), self.parts["python"].random(), self.parts["more"][0][1].rand(), self.draw()]
        return np.array([value, *drawn, self.shared.normal()])


class Slotted:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = np.random.Generator(np.random.SFC64(7))

    def __call__(self, value: Any) -> Any:
        return np.array([value, self.rng.random()])


def from_the_module(value: Any) -> Any:
    def inner() -> float:
        return module_python.random()

    return np.array([value, module_rng.random(), inner()])


def by_default(value: Any, rng2: np.random.Generator = np.random.default_rng(7)) -> Any:  # noqa: B008
    return np.array([value, rng2.random()])


def with_argument(generator: np.random.Generator, value: Any, *, other: Any) -> Any:
    return np.array([value, generator.random(), other.random()])


def stack_with_noise(generator: np.random.Generator, samples: list[Any], *, other: Any) -> Any:
    return np.array([[value, generator.random(), other.random()] for value in samples])


def closure() -> Callable[[Any], Any]:
    rng, holder = np.random.default_rng(7), Holder()
    return lambda value: np.array([*holder(value), rng.random()])


class Source:
    def __init__(self) -> None:
        self.holder = Holder()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return self.holder(index)


class Batches:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return np.stack([np.array([index, self.rng.random()]) for _ in range(2)])

    def on_epoch_end(self) -> None:
        self.rng = np.random.default_rng(int(self.rng.integers(1000)))
