"""The work itself: objects whose `[i]` is a whole batch. NumPy and the standard library only, as workers import it.

Every leaf starts with the batch's own number (`stamp`), so that the consumer, who reads one value of every leaf anyway,
proves with a sum that each batch of the epoch came exactly once.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Allocate = Callable[..., Array]

_STAMPS = 128  # stays exact in uint8


class Work(Protocol):
    """What a loader gets: `len()` batches, batch `i` by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


def stamp(index: int) -> int:
    return index % _STAMPS


def spin(loops: int) -> int:
    """Pure Python that holds the GIL; about 80 ns a loop."""
    state = 1
    for _ in range(loops):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
    return state


@dataclass
class Fill:
    """Batches of one array, or a dict of `leaves` arrays, filled with the stamp and nothing else."""

    batches: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    leaves: int = 1
    allocate: Allocate = field(default=np.empty)  # ours swaps in keras_mp.empty, which allocates inside the slot

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Any:
        arrays = []
        for _ in range(self.leaves):
            array = self.allocate(self.shape, self.dtype)
            array.fill(stamp(index))
            arrays.append(array)
        return arrays[0] if self.leaves == 1 else {f"feature_{k}": array for k, array in enumerate(arrays)}


@dataclass
class Spin:
    """A small (x, y) batch after `loops` of pure Python; every `slow_every`-th costs `slow_factor` times as much."""

    batches: int
    loops: int
    slow_every: int = 0
    slow_factor: int = 1
    leaves: ClassVar[int] = 2

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        slow = self.slow_every and index % self.slow_every == 0
        spin(self.loops * self.slow_factor if slow else self.loops)
        return np.full((32, 8), stamp(index), np.float32), np.full(32, stamp(index), np.float32)


@dataclass
class Sleep:
    """A small batch after a sleep: many workers on few cores, with the cores left to the dispatcher."""

    batches: int
    seconds: float
    leaves: ClassVar[int] = 1

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Array:
        time.sleep(self.seconds)
        return np.full((32, 128), stamp(index), np.float32)


@dataclass
class Samples:
    """Samples and a per-sample function: ours gets the parts, every other loader the ready batch."""

    source: Sequence[Any] | Array
    transform: Callable[[Any], Any]
    batch_size: int

    def __len__(self) -> int:
        return len(self.source) // self.batch_size

    def __getitem__(self, index: int) -> Any:
        start = index * self.batch_size
        rows = [self.transform(self.source[k]) for k in range(start, start + self.batch_size)]
        if isinstance(rows[0], tuple):
            return tuple(np.stack(column) for column in zip(*rows, strict=True))
        return np.stack(rows)


def leaves_of(batch: Any) -> list[Any]:
    """The leaves of a batch, in order, without importing a framework's tree walker."""
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in leaves_of(value)]
    if isinstance(batch, (tuple, list)):
        return [leaf for value in batch for leaf in leaves_of(value)]
    return [batch]


def touch(batch: Any) -> float:
    """Read the first value of every leaf: what every consumer does with every batch, whatever the framework.

    `np.asarray` aliases a CPU tensor of TensorFlow or torch, so this costs no copy anywhere.
    """
    return sum(float(np.asarray(leaf).item(0)) for leaf in leaves_of(batch))


def kept_folder(name: str, fill: Callable[[Path], object]) -> Path:
    """A folder of that name that benchmarks share; `fill` writes it the first time."""
    folder = Path(tempfile.gettempdir()) / f"keras_mp-benchmark-{os.getuid()}" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unfinished = Path(temporary) / name
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(folder)
    return folder
