"""From a request to a batch: read the samples, transform, collate. The same code in a worker, a thread or in-process.

A loader is what travels to the workers, once. A request says which batch of which epoch is wanted and which samples
make it; the result depends on nothing else (P2). Failures follow the error policy here, so a failed sample is either
raised or part of the result (P5).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from keras_mp import collate as collating
from keras_mp.errors import SampleFailure, sample_error
from keras_mp.randomness import Key, Seeder, takes_rng
from keras_mp.seeds import Stream
from keras_mp.wire import short_repr

OnError = Literal["raise", "skip", "replace"]


class Request(NamedTuple):
    """Which batch is wanted: its epoch, its number, and the source indices of its samples in order.

    `repeats` says, for an order in which samples come more than once, how often each came before in the epoch. `failed`
    gives the positions in `samples` of those that are known to have failed, say because they ended their workers: they
    are not read again.
    """

    epoch: int
    batch: int
    samples: Sequence[int]
    repeats: Sequence[int] = ()
    failed: tuple[tuple[int, SampleFailure], ...] = ()


class Loaded(NamedTuple):
    """A batch and the samples that failed on the way to it."""

    batch: Any
    failures: tuple[SampleFailure, ...]


class Loader(Protocol):
    """Loads batches. `note` is told the position of each sample before its turn; `seed` seeds the global state."""

    source: Any

    @property
    def runs_user_code(self) -> bool: ...

    def load(self, request: Request, note: Callable[[int], None], seed: Seeder | None) -> Loaded: ...


def ignore_position(position: int) -> None:
    """The `note` of a place where nobody watches."""


@dataclasses.dataclass
class SampleLoader:
    """Loads a batch sample by sample.

    Attributes:
        source: what `source[index]` reads a sample from.
        transform: sample -> sample, or None.
        collate: list of samples -> batch, or None for stacking.
        batch_transform: batch -> batch, or None.
        seed: root of all randomness.
        on_error: "raise", "skip" (leave the sample out) or "replace" (by the nearest good sample before it).
        retries: how often a failing sample is tried again first.
    """

    source: Any
    transform: Callable[..., Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    batch_transform: Callable[..., Any] | None = None
    seed: int = 0
    on_error: OnError = "raise"
    retries: int = 0

    def __post_init__(self) -> None:
        self._transform_rng = takes_rng(self.transform)
        self._batch_rng = takes_rng(self.batch_transform)
        self._own_rows = isinstance(self.source, np.ndarray)
        plain = type(self.source) in (np.ndarray, np.memmap, list, tuple, range)
        self.runs_user_code = not plain or bool(self.transform or self.collate or self.batch_transform)

    def load(self, request: Request, note: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """Loads one batch.

        Raises:
            SampleError: user code failed and the policy is "raise", or every sample of the batch failed.
        """
        capacity = len(request.samples)
        rows = collating.Samples(capacity, self.collate) if self.collate else collating.Stack(capacity)
        good: list[int] = []
        failures: list[SampleFailure] = []
        known = dict(request.failed)
        for position, index in enumerate(request.samples):
            note(position)
            row = position if self.on_error == "replace" else len(good)
            repeat = request.repeats[position] if request.repeats else 0
            failure = known.get(position) or self._put(rows, row, int(index), repeat, request, seed)
            if failure is None:
                good.append(row)
            else:
                failures.append(failure)
        if not good:
            raise sample_error(failures[0], None, f" (all {capacity} samples of the batch failed; this was the first)")
        if failures and self.on_error == "replace":
            source = good[0]
            for row in range(capacity):
                if row in good:
                    source = row
                else:
                    rows.repeat(source, row)
        return Loaded(
            self._finish(rows, capacity if self.on_error == "replace" else len(good), request, seed), tuple(failures)
        )

    def _put(
        self,
        rows: collating.Samples | collating.Stack,
        row: int,
        index: int,
        repeat: int,
        request: Request,
        seed: Seeder | None,
    ) -> SampleFailure | None:
        """Reads, transforms and stores one sample; returns its failure if the policy allows failing."""
        attempts = self.retries
        while True:
            stage, item = "source", "not read"
            key = Key(Stream.SAMPLE, self.seed, request.epoch, index, repeat) if self.runs_user_code else None
            try:
                if seed is not None and key is not None:
                    seed(key)
                value = self.source[index]
                if self._own_rows and isinstance(value, np.ndarray):
                    # A transform that wrote into its input would change the source for later epochs, in this worker.
                    value.flags.writeable = False
                stage, item = "transform", value
                if self.transform is not None:
                    value = (
                        self.transform(value, rng=key.generator())
                        if self._transform_rng and key
                        else self.transform(value)
                    )
                stage = "collate"
                rows.put(row, value)
                return None
            except (Exception, SystemExit) as error:
                if attempts > 0:
                    attempts -= 1
                    continue
                failure = SampleFailure.of(
                    error,
                    stage=stage,
                    index=index,
                    item=item if stage == "source" else short_repr(item, 120),
                    epoch=request.epoch,
                    batch=request.batch,
                    where=f"process {os.getpid()}",
                )
                if self.on_error == "raise":
                    raise sample_error(failure, error) from error
                return failure

    def _finish(
        self, rows: collating.Samples | collating.Stack, count: int, request: Request, seed: Seeder | None
    ) -> Any:
        stage = "collate"
        try:
            key = Key(Stream.BATCH, self.seed, request.epoch, request.batch) if self.runs_user_code else None
            if seed is not None and key is not None:
                seed(key)
            batch = rows.finish(count)
            if self.batch_transform is not None:
                checked_batch(batch, stage)
                stage = "batch_transform"
                batch = (
                    self.batch_transform(batch, rng=key.generator())
                    if self._batch_rng and key
                    else self.batch_transform(batch)
                )
            return checked_batch(batch, stage)
        except (Exception, SystemExit) as error:
            raise _batch_error(error, stage, request) from error


@dataclasses.dataclass
class BatchLoader:
    """Loads a batch from an object whose `[i]` is a whole batch already."""

    source: Any
    seed: int = 0
    retries: int = 0
    runs_user_code: bool = dataclasses.field(default=True, init=False)

    def load(self, request: Request, note: Callable[[int], None], seed: Seeder | None) -> Loaded:
        """Loads one batch.

        Raises:
            SampleError: `source[i]` failed.
        """
        note(0)
        attempts = self.retries
        while True:
            try:
                if seed is not None:
                    seed(Key(Stream.BATCH, self.seed, request.epoch, request.batch))
                return Loaded(checked_batch(self.source[request.batch], "source"), ())
            except (Exception, SystemExit) as error:
                if attempts == 0:
                    raise _batch_error(error, "source", request) from error
                attempts -= 1


def checked_batch(batch: Any, stage: str) -> Any:
    """Returns `batch`, unless it is None: Keras would wait for ever for the batch it leaves out."""
    if batch is None:
        raise TypeError(f"{stage} returned None instead of a batch; did it forget to return?")
    return batch


def _batch_error(error: BaseException, stage: str, request: Request) -> Exception:
    failure = SampleFailure.of(
        error,
        stage=stage,
        index=None,
        item="",
        epoch=request.epoch,
        batch=request.batch,
        where=f"process {os.getpid()}",
    )
    return sample_error(failure, error)
