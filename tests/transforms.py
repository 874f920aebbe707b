"""Functions for workers to run. NumPy only: a worker that gets one of these imports this module."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


def with_random(value: Any, rng: np.random.Generator) -> dict[str, Any]:
    """The sample, and draws from all three sources of random numbers."""
    return {"value": np.asarray(value), "own": rng.random(), "python": random.random(), "legacy": np.random.rand()}


def globally_random(value: Any) -> dict[str, Any]:
    """The sample, and draws from the global generators."""
    return {"value": np.asarray(value), "python": random.random(), "legacy": np.random.rand(2)}


def mixed(batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The batch with its rows permuted: a `batch_transform`."""
    order = rng.permutation(len(batch["value"]))
    return {**{key: part[order] for key, part in batch.items()}, "order": order}


def image_and_label(index: Any) -> tuple[np.ndarray[Any, Any], np.int64]:
    """A small picture of a number, and its parity."""
    return np.full((4, 4, 1), index, dtype=np.float32), np.int64(index % 2)


def slow_where(_: Any) -> list[int]:
    """The process and its parent, by their ids, after a moment in which others may be given work."""
    threading.Event().wait(0.02)
    return [os.getpid(), os.getppid()]


def process_facts(_: Any) -> dict[str, Any]:
    """What the worker is: its process, its own memory in kB (PSS), and whether it has loaded keras or tensorflow."""
    heavy = sorted({"keras", "tensorflow", "jax", "torch"} & set(sys.modules))
    with open("/proc/self/smaps_rollup") as file:
        memory = next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return {"pid": os.getpid(), "pss_kb": memory, "heavy": " ".join(heavy)}


def noisy(sample: int, rng: np.random.Generator) -> tuple[int, float]:
    """The sample, and a random number."""
    return sample, float(rng.random())


def flipped_or_not(sample: Any, rng: np.random.Generator) -> Any:
    """The image, one in two mirrored, and its label, with a weight of 2."""
    image, label = sample
    return (image[:, ::-1] if rng.random() < 0.5 else image) / 255, label, 2.0


def drawn_length(_: Any, rng: np.random.Generator) -> Any:
    """One to five NaN: their number shows what was drawn."""
    return np.full(1 + rng.integers(5), np.nan)


def fail_on_seven(value: Any) -> Any:
    """Fails on the sample 7."""
    if value == 7:
        raise ValueError("seven is broken")
    return np.float32(value)


class Pair(NamedTuple):
    """Two parts of a sample."""

    x: Any
    y: Any


def nest(value: Any) -> Any:
    """A sample of many kinds of leaves and nests."""
    image = np.full((2, 2), value, np.float32)
    return (
        {"image": image, "name": f"tile {value}", "deep": {"a": [np.int8(value), (2.5,)]}},
        Pair(np.bool_(value % 2), b"\x00raw\x00"),
        None,
    )


class Augmented:
    """Draws from all three sources of random numbers; once, on one sample, it kills its process."""

    def __init__(self, flag: Path | None = None) -> None:
        self.flag = flag

    def __call__(self, sample: int, rng: np.random.Generator) -> Any:
        if self.flag is not None and sample == 17 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([sample, rng.random(), random.random(), np.random.rand()])


def permuted(batch: Any, rng: np.random.Generator) -> Any:
    """Permutes the batch's rows and adds global noise: randomness of the batch as a whole."""
    return batch[rng.permutation(len(batch))] + np.array([0, 0, random.random(), np.random.rand()])


class Counted:
    """A source that notes in a file of the process's own each time that it is unpickled."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.data = np.arange(size, dtype=np.float64)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return np.full(4, self.data[index])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with open(self.folder / str(os.getpid()), "a") as file:
            file.write("x")


class Deadly:
    """Kills its process on one sample, every time."""

    def __call__(self, sample: int) -> int:
        if sample == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


class Hangs:
    """Hangs on one sample, after it has said so."""

    def __init__(self, reached: Path) -> None:
        self.reached = reached

    def __call__(self, sample: int) -> int:
        if sample == 4:
            self.reached.touch()
            threading.Event().wait(600)
        return sample


class KillsOnce:
    """Draws from `rng` alone; once, on one sample, it kills its process."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __call__(self, sample: int, rng: np.random.Generator) -> Any:
        if sample == 17 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([sample, rng.random()])


class Marked:
    """Notes in a folder that a sample has been begun; any but the first then waits for the gate, a file, if any."""

    def __init__(self, folder: Path, gate: Path | None = None) -> None:
        self.folder = folder
        self.gate = gate

    def __call__(self, sample: int) -> int:
        (self.folder / str(sample)).touch()
        while sample and self.gate is not None and not self.gate.exists():
            threading.Event().wait(0.02)
        return sample


class Kills:
    """Kills processes on one sample, then hangs."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids

    def __call__(self, sample: int) -> Any:
        if sample == 9:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            threading.Event().wait(600)
        return np.float32(sample)
