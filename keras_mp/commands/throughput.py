"""How fast a dataset gives batches to somebody who does nothing with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_mp.loaded import LoadedDataset

_EPOCHS = 1_000_000  # read ahead across, until the time is over
_WARM_UP_S = 10.0  # after the first batch, at most, until every worker has made one


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
        first_batch_s: from asking for the first batch, with no worker started, to having it, in seconds.
        elapsed_s: how long the batches after those of the warm-up took, in seconds.
        batches, samples, bytes: how many these were.
    """

    first_batch_s: float
    elapsed_s: float
    batches: int
    samples: int
    bytes: int

    @property
    def batches_per_s(self) -> float:
        """Batches a second; 0 where there was only the first."""
        return self.batches / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def samples_per_s(self) -> float:
        """Samples a second."""
        return self.samples / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes of the batches' arrays a second."""
        return self.bytes / self.elapsed_s if self.elapsed_s else 0.0


def measure(
    dataset: LoadedDataset,
    *,
    epochs: int | None = None,
    seconds: float | None = None,
    warm_up: bool = False,
    report: Callable[[int], None] = lambda batches: None,
) -> Throughput:
    """Takes batches as fast as they come, the first of which is not counted.

    Args:
        dataset: which has given no batch yet.
        epochs: how many epochs at most; None: no limit.
        seconds: after which to stop; None: no limit.
        warm_up: count no batch, nor its time, before every worker has made one.
        report: called with the number of batches taken so far.

    Raises:
        SampleError, WorkerCrashed, BatchTimeout, KerasMPError: as in an iteration over it.
    """
    began = time.monotonic()
    first_batch_s = 0.0
    since = last = began
    counted = taken = samples = nbytes = 0
    is_warm = not warm_up
    stream = dataset.stream(epochs or _EPOCHS)
    try:
        for (batch,) in stream:
            now = time.monotonic()
            taken += 1
            report(taken)
            if taken == 1:
                first_batch_s, since, last = now - began, now, now
                continue
            if not is_warm:
                is_warm = _all_have_worked(dataset) or now - began - first_batch_s > _WARM_UP_S
                since = last = now
                continue
            counted, last = counted + 1, now
            samples += _rows(batch)
            nbytes += sum(int(getattr(leaf, "nbytes", 0)) for leaf in keras.tree.flatten(batch))
            if seconds is not None and now - since >= seconds:
                break
    finally:
        stream.close()
    return Throughput(first_batch_s, last - since, counted, samples, nbytes)


def _all_have_worked(dataset: LoadedDataset) -> bool:
    stats = dataset.stats()
    return not stats.pids or (len(stats.pids) == stats.workers and all(stats.busy_s))


def _rows(batch: Any) -> int:
    """Samples in a batch: the first length in it that there is."""
    for leaf in keras.tree.flatten(batch):
        shape = np.shape(leaf)
        if shape:
            return int(shape[0])
    return 1
