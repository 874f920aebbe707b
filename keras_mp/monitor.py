"""`PipelineMonitor`: does the training wait for its data?

Nobody can see that from one side. The dataset knows when each batch was handed out, Keras says when each step ended: a
step has waited for its batch as long as that came later than the end of the step before it.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import keras

from keras_mp import checks, exits
from keras_mp.loaded import LoadedDataset
from keras_mp.stats import Stats, Training


class _Phase:
    """Steps of one epoch of training, or of one evaluation.

    Args:
        taken: by dataset, how many of its batches had been used before.
    """

    def __init__(self, taken: dict[LoadedDataset, int]) -> None:
        self.taken = taken
        self.began = time.monotonic()
        self.ends: list[tuple[int, float]] = []  # steps done, and when
        self.stats = {dataset: dataset.stats() for dataset in _datasets()}

    def add_step(self, step: int) -> None:
        """The step of that number, from 0, has ended, and with it those before it."""
        self.ends.append((step + 1, time.monotonic()))

    @property
    def dataset(self) -> LoadedDataset | None:
        """Whose batches were used: of several, that of the most."""
        counts = {each: each.handed_out.count - self.taken.get(each, 0) for each in _datasets()}
        most = max(counts, key=counts.__getitem__, default=None)
        return most if most is not None and counts[most] > 0 and self.ends else None

    def measure(self, epoch: int) -> tuple[LoadedDataset, Training] | None:
        """What came of it, once the steps are over; None where no batch was ours."""
        dataset = self.dataset
        if dataset is None:
            return None
        first, before, done = self.taken.get(dataset, 0), self.began, 0
        waits, steps = [], []
        for count, end in self.ends:
            came = dataset.handed_out.time(first + count - 1)
            wait = 0.0 if came is None else min(max(0.0, came - before), end - before)
            waits.append(wait)
            steps.append((end - before - wait) / max(1, count - done))
            before, done = end, count
        between = dataset.stats(since=self.stats.get(dataset, Stats()))
        return dataset, Training(epoch, done, before - self.began, sum(waits), statistics.median(steps), between)


class PipelineMonitor(keras.callbacks.Callback):
    """Says after each epoch of `fit` how long it waited for data, and how busy the workers were.

    Use: `model.fit(dataset, callbacks=[keras_mp.PipelineMonitor()])`; the same with `dataset.to_tf_dataset()`, also
    where `map` and the like follow it. It finds the datasets by itself, training and validation data apart. Into the
    logs, and so to `History`, `TensorBoard` and `CSVLogger` (which stand after it in the list of callbacks), go:

    - `input_wait_fraction`: share of the time of the steps, from 0 to 1, in which no batch was there to train on;
    - `worker_busy_fraction`: share of their time that the workers were at batches;
    - `samples_per_second`: samples trained on;
    - the same with `val_` before them for validation data.

    `dataset.report()` uses what was measured to say how many workers would do. With `steps_per_execution`, what a group
    of steps waited is what it waited for the last of its batches, which is too much by the steps before that. Where the
    backend goes on while the device still computes, a step seems shorter, and a wait longer, than it is.

    Args:
        verbose: 0: silent; 1: a line after each epoch.

    Raises:
        ValueError: `verbose` is neither.
    """

    def __init__(self, verbose: int = 1) -> None:
        super().__init__()
        self._verbose = checks.check_choice(verbose, "verbose", (0, 1))
        self._taken: dict[LoadedDataset, int] = {}
        self._trained_on: LoadedDataset | None = None
        self._train: _Phase | None = None
        self._test: _Phase | None = None
        self._measured: dict[str, tuple[LoadedDataset, Training]] = {}
        self._epoch = 0
        self._line = ""

    # -- training ------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        self._trained_on = None
        self._taken = _all_handed_out()
        self._measured = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._write_line()
        self._epoch = epoch
        # Of the data that is trained on, batches of this epoch may have been handed out in the one before.
        taken = _all_handed_out()
        if self._trained_on is not None and self._trained_on in taken:
            taken[self._trained_on] = self._taken[self._trained_on]
        self._train = _Phase(taken if self._trained_on is not None else self._taken)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._train is not None:
            self._train.add_step(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._end_training()
        for prefix in ("", "val_"):
            if prefix in self._measured and logs is not None:
                logs |= _logs_of(self._measured[prefix][1], prefix)
        self._line = self._describe()
        self._measured = {}

    def on_train_end(self, logs: Any = None) -> None:
        self._write_line()
        self._train = None
        self._taken = {}
        self._trained_on = None

    def _end_training(self) -> None:
        """The steps of an epoch are over; validation may follow."""
        phase, self._train = self._train, None
        measured = phase.measure(self._epoch) if phase is not None else None
        if phase is None or measured is None:
            return
        dataset, training = self._measured[""] = measured
        dataset.training = training
        self._trained_on = dataset
        self._taken[dataset] = phase.taken.get(dataset, 0) + training.batches

    # -- validation, and `evaluate` ------------------------------------------------------------------------------

    def on_test_begin(self, logs: Any = None) -> None:
        self._end_training()
        self._test = _Phase(_all_handed_out())

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._test is not None:
            self._test.add_step(batch)

    def on_test_end(self, logs: Any = None) -> None:
        phase, self._test = self._test, None
        measured = phase.measure(self._epoch) if phase is not None else None
        if measured is not None:
            dataset, training = self._measured["val_"] = measured
            if dataset is self._trained_on:
                self._taken[dataset] = dataset.handed_out.count
            else:
                dataset.training = training

    # -- what is said --------------------------------------------------------------------------------------------

    def _describe(self) -> str:
        parts = []
        for prefix, who in (("", "fit"), ("val_", "validation")):
            if prefix in self._measured:
                dataset, training = self._measured[prefix]
                count = dataset.stats().workers
                workers = f"{count} workers were" if count != 1 else "1 worker was"
                busy = f", {workers} {training.stats.worker_busy_fraction:.0%} busy" if count else ""
                parts.append(
                    f"{who} waited {training.wait_fraction:.0%} of {training.elapsed_s:.3g} s for data{busy}, "
                    f"{training.samples_per_second:.4g} samples/s"
                )
        return f"keras_mp, epoch {self._epoch + 1}: {'; '.join(parts)}" if parts else ""

    def _write_line(self) -> None:
        """Only once Keras's progress bar is done with its line."""
        if self._line and self._verbose:
            sys.stdout.write(self._line + "\n")
            sys.stdout.flush()
        self._line = ""


def _datasets() -> list[LoadedDataset]:
    return [dataset for dataset in exits.open_datasets() if isinstance(dataset, LoadedDataset)]


def _all_handed_out() -> dict[LoadedDataset, int]:
    return {dataset: dataset.handed_out.count for dataset in _datasets()}


def _logs_of(training: Training, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}input_wait_fraction": training.wait_fraction,
        f"{prefix}worker_busy_fraction": training.stats.worker_busy_fraction,
        f"{prefix}samples_per_second": training.samples_per_second,
    }
