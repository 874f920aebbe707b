"""Looks at batches for their shapes: Keras and the export fix a signature by two that differ where others will.

On TensorFlow, `fit`, `evaluate` and `predict` ask for the batches 0 and 1 before anything else, and leave open the axes
in which these two differ. Two batches may be of one length by chance; then every batch that is not contradicts the
signature. No look is part of a pass, so it may be given another batch: with `keras_mp.pad` one that is padded further,
with a `collate` of the user's one of a single sample, again and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_mp.engines.base import Engine
from keras_mp.errors import KerasMPError
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.loader import SampleLoader
from keras_mp.loading.padding import Padding
from keras_mp.plan.request import Request


def pads(loader: Loader) -> bool:
    """Whether batches can be padded further than need be."""
    return isinstance(loader, SampleLoader) and isinstance(loader.collate, Padding)


def requests_of(loader: Loader, requests: Sequence[Request]) -> list[Request]:
    """What to look at, at the most, in place of the batches of the first one or two `requests`."""
    if pads(loader):
        return [requests[0]._replace(stretch=2), requests[-1]._replace(stretch=1)]
    if isinstance(loader, SampleLoader) and loader.collate is not None:
        samples, count = requests[0].samples, len(requests[0].samples)
        return [*requests, *(requests[0]._replace(samples=[int(samples[k])] * count, repeats=()) for k in (0, -1))]
    return list(requests)


def others(engine: Engine, handles: Sequence[Any]) -> list[Loaded]:
    """The batches of these looks, without those that fail: if they are asked for again, they will say why."""
    found = []
    for handle in handles:
        with contextlib.suppress(KerasMPError):
            found.append(engine.result(handle))
    return found


class Looks:
    """The looks that Keras takes at one dataset."""

    def __init__(self) -> None:
        self._shapes: list[tuple[int, ...]] = []  # of the batch that was looked at first

    def look(
        self, engine: Engine, loader: Loader, number: int, request: Request, take: Callable[[], Any]
    ) -> Callable[[], Loaded]:
        """Prepares the look at batch 0 or 1.

        Args:
            engine: where batches are loaded.
            loader: what makes them.
            number: which look.
            request: the batch of this number.
            take: gives the engine's handle of it.

        Returns:
            A function that waits for a batch to show.
        """
        looks = requests_of(loader, [request])
        if pads(loader):
            (handle,) = engine.submit([looks[number]])
            return lambda: engine.result(handle)
        handle = take()
        more = engine.submit(looks[1:]) if number else ()

        def load() -> Loaded:
            loaded = engine.result(handle)
            if not number:
                self._shapes = list(_shapes(loaded.batch))
            found = [loaded, *others(engine, more)]
            return max(found, key=lambda look: _count_different(self._shapes, list(_shapes(look.batch))))

        return load


def _count_different(some: list[tuple[int, ...]], others: list[tuple[int, ...]]) -> int:
    """In how many axes these shapes differ, but for the batch axis, which Keras leaves open in any case."""
    pairs = [pair for pair in zip(some, others, strict=False) if len(pair[0]) == len(pair[1])]
    return sum(one != other for pair in pairs for one, other in zip(*(shape[1:] for shape in pair), strict=True))


def _shapes(nest: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(nest, dict):
        nest = list(nest.values())
    if isinstance(nest, list | tuple):
        for part in nest:
            yield from _shapes(part)
    elif nest is not None:
        yield np.shape(nest)
