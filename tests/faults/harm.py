"""Things that do real harm, in a worker, at a chosen moment, a chosen number of times over all workers.

Each piece of a dataset (source, transform, collate, batch_transform) exists here with a place where harm strikes. How
often it still may is counted with files, since the processes it happens in do not survive it.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import keras_mp

SAMPLES, BATCH_SIZE = 24, 4
TARGET = 13  # the sample that harm waits for; in batch 3, whose last sample is 15
ALWAYS = 1 << 30


class HarmError(Exception):
    """Raised by a worker; its constructor takes more than a message."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def _raise() -> None:
    raise HarmError("harm", "a worker")


def _hang() -> None:
    while True:
        signal.pause()


def _no_memory() -> None:
    np.empty(1 << 60, np.uint8)


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


_KINDS: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "exit": lambda: os._exit(3),
    "SIGSEGV": _signal(signal.SIGSEGV),
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "hang": _hang,
    "memory": _no_memory,
}


@dataclasses.dataclass(frozen=True)
class Harm:
    """Harm of one kind, `times` times; `folder` holds a file for each time that it struck, with the victim's pid."""

    kind: str
    folder: Path
    times: int = 1

    def strike(self) -> None:
        """Does the harm, if it may strike again."""
        for number in range(self.struck, self.times):
            try:
                # Under a name that is not looked for, so that nobody reads it half written.
                written = self.folder / f"by-{os.getpid()}"
                written.write_text(str(os.getpid()))
                os.link(written, self.folder / f"struck-{number}")
            except FileExistsError:
                continue
            _KINDS[self.kind]()
            return

    @property
    def struck(self) -> int:
        """How often it has struck."""
        return len(list(self.folder.glob("struck-*")))

    @property
    def victims(self) -> list[int]:
        """Pids of the workers it struck, in order."""
        return [int((self.folder / f"struck-{number}").read_text()) for number in range(self.struck)]


class Source:
    """Rows of numbers; unpickling it may do harm."""

    def __init__(self, harm: Harm | None = None) -> None:
        self._harm = harm

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        if not 0 <= index < SAMPLES:
            raise IndexError(index)
        return np.arange(index * 100, index * 100 + 50, dtype=np.float64)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_source, (self._harm,)


def _unpickle_source(harm: Harm | None) -> Source:
    if harm is not None:
        harm.strike()
    return Source(harm)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A sample and what `rng` gives; does harm at the target."""

    harm: Harm | None = None

    def __call__(self, row: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
        if self.harm is not None and row[0] == TARGET * 100:
            self.harm.strike()
        values: np.ndarray[Any, Any] = row + rng.random(row.shape)
        return values


@dataclasses.dataclass(frozen=True)
class Collate:
    """Writes the rows into the slot; does harm half-way, where the target is among them."""

    harm: Harm | None = None

    def __call__(self, rows: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        batch = keras_mp.empty((len(rows), *rows[0].shape), rows[0].dtype)
        for number, row in enumerate(rows):
            batch[number] = row
            if self.harm is not None and number and _holds_target(rows):
                self.harm.strike()
        return batch


@dataclasses.dataclass(frozen=True)
class Attach:
    """A `batch_transform` that adds something that does harm when the batch is pickled for its reply."""

    harm: Harm | None = None

    def __call__(self, batch: np.ndarray[Any, Any]) -> dict[str, Any]:
        return {"rows": batch, "mark": Mark(self.harm if _holds_target(batch) else None)}


class Mark:
    """Does harm when it is pickled; equal to every other mark."""

    def __init__(self, harm: Harm | None = None) -> None:
        self._harm = harm

    def __reduce__(self) -> tuple[Any, ...]:
        if self._harm is not None:
            self._harm.strike()
        return Mark, ()


def _holds_target(rows: Any) -> bool:
    return any(TARGET * 100 <= row[0] < TARGET * 100 + 1 for row in rows)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row and its target, to train on; does harm at sample 13."""

    harm: Harm | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.float32]:
        if self.harm is not None and index == TARGET:
            self.harm.strike()
        return rng.normal(size=4).astype(np.float32), np.float32(index % 3)


def generator_collate(rows: list[Any]) -> Iterator[Any]:
    """A batch that cannot be pickled."""
    yield from rows


def pieces(moment: str, harm: Harm | None) -> dict[str, Any]:
    """A dataset's source and functions, with harm at `moment`: "unpickle", "load", "write" or "reply"."""
    made: dict[str, Any] = {"source": Source(harm if moment == "unpickle" else None)}
    made["transform"] = Transform(harm if moment == "load" else None)
    if moment == "write":
        made["collate"] = Collate(harm)
    if moment == "reply":
        made["batch_transform"] = Attach(harm)
    return made
