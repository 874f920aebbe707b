"""Streams for tests: shards of numbers, what makes samples of them, and what dies or fails on the way."""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import keras_mp

LENGTHS = (7, 0, 13, 5, 22, 1, 9, 30, 4, 11)
TOTAL = sum(LENGTHS)


class Numbers:
    """Reads shard k: the pairs (k, 0), (k, 1), ...; some of them with an accident, once.

    Args:
        lengths: of the shards.
        log: a file that gets a line for each shard that is opened.
        accident: (shard, offset, what): "kill", "hang", or "fail", which happens each time.
        flag: a file that is made when the accident happens, so that it does not again.
    """

    def __init__(
        self,
        lengths: Sequence[int] = LENGTHS,
        log: pathlib.Path | None = None,
        accident: tuple[int, int, str] | None = None,
        flag: pathlib.Path | None = None,
    ) -> None:
        self.lengths, self.log, self.accident, self.flag = lengths, log, accident, flag

    def __call__(self, shard: int) -> Iterator[Any]:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{shard}\n")
        for offset in range(self.lengths[shard]):
            self.suffer(shard, offset)
            yield np.array([shard, offset])
        self.suffer(shard, self.lengths[shard])

    def suffer(self, shard: int, offset: int) -> None:
        """Has the accident, if this is the place."""
        if self.accident is None or self.accident[:2] != (shard, offset):
            return
        if self.accident[2] == "fail":
            raise OSError("damaged")
        if self.flag is not None and not self.flag.exists():
            self.flag.touch()
            if self.accident[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)


class Gated(Numbers):
    """The same, taking its time; shard 0 waits at its fifth sample for the gate, a file."""

    def __init__(self, log: pathlib.Path, gate: pathlib.Path) -> None:
        super().__init__(log=log)
        self.gate = gate

    def suffer(self, shard: int, offset: int) -> None:
        time.sleep(0.002)
        while (shard, offset) == (0, 4) and not self.gate.exists():
            time.sleep(0.02)


class NumbersFrom(Numbers):
    """The same, from a given offset on."""

    def __call__(self, shard: int, start: int = 0) -> Iterator[Any]:
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{shard} {start}\n")
        for offset in range(start, self.lengths[shard]):
            yield np.array([shard, offset])


def endless(shard: int) -> Iterator[Any]:
    """The same pairs, without end."""
    return (np.array([shard, offset]) for offset in itertools.count())


def with_label(pair: Any) -> Any:
    """A sample for training: the pair, scaled, and the shard."""
    return pair.astype("float32") / 30, pair[:1].astype("float32")


def with_noise(pair: Any, rng: np.random.Generator) -> Any:
    """A sample: shard, offset, and a random number from each of two generators."""
    return np.array([*pair, rng.integers(1 << 30), np.random.randint(1 << 30)])


def mixed(batch: Any, rng: np.random.Generator) -> Any:
    """The batch in another order."""
    return batch[rng.permutation(len(batch))]


def stream(read: Any = None, **options: Any) -> keras_mp.StreamDataset:
    """A stream of ten shards, in batches of four from four lanes, shuffled in blocks of five."""
    read = Numbers() if read is None else read
    defaults: dict[str, Any] = {"batch_size": 4, "lanes": 4, "shuffle": 5, "seed": 3, "workers": 0}
    if "pool" in options:
        del defaults["workers"]
    options = {**defaults, "batch_transform": mixed, **options}
    transform = options.pop("transform", with_noise)
    return keras_mp.StreamDataset(range(len(read.lengths)), read, transform, **options)


def pairs(batches: Sequence[Any]) -> list[tuple[int, int]]:
    """Shard and offset of each sample, in order."""
    return [(int(row[0]), int(row[1])) for batch in batches for row in batch]


def all_pairs(lengths: Sequence[int] = LENGTHS) -> set[tuple[int, int]]:
    """Those of all samples."""
    return {(shard, offset) for shard, length in enumerate(lengths) for offset in range(length)}


def assert_equal(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """The same batches, bit for bit."""
    assert [len(batch) for batch in ours] == [len(batch) for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
