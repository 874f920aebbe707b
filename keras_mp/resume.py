"""Going on in the middle of an epoch: `BackupAndRestore`, Keras's own callback with the position in the data.

Keras's callback restores weights, optimizer and epoch number, and starts the interrupted epoch over: batches that the
model has seen are seen again. Here a backup also says which batches of the epoch were trained on, so that the run goes
on with the next one, and ends with the weights of a run that was never interrupted.

A backup is a folder of its own, written under another name and renamed when it is complete; the one before it is
deleted after that. So whenever the process is killed, there is one whole backup or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mp import checks
from keras_mp.dataset import PoolDataset

_DATA_FILE = "data.json"
_SEEDS_FILE = "seeds.npz"


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` that also restores the position in the data.

    Use: `model.fit(dataset, callbacks=[keras_mp.BackupAndRestore(dataset, "backup", save_freq=100)])`. When the script
    is run again after an interruption, `fit` goes on with the batch after the last backup. The resumed epoch has
    as many steps as it had batches left. The state of the global `random`, which Keras shuffles batches with, and the
    states of the model's seed generators (dropout), which Keras's callback leaves out, are restored too.

    With `steps_per_epoch`, no batch is repeated or lost either, but the interrupted epoch of Keras gets its full number
    of steps again.

    Args:
        dataset: the `PoolDataset` that `fit` trains on. Its export cannot be resumed.
        backup_dir: folder for the backups; used for nothing else.
        save_freq: "epoch", or a number of batches.
        delete_checkpoint: delete the backups when `fit` has come to its end.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; in `fit`, the backup is of another
            dataset, or the model is not built.
    """

    def __init__(
        self,
        dataset: PoolDataset,
        backup_dir: str | os.PathLike[str],
        save_freq: int | str = "epoch",
        *,
        delete_checkpoint: bool = True,
    ) -> None:
        if not isinstance(dataset, PoolDataset):
            raise TypeError(f"dataset must be the PoolDataset that fit() trains on, got {type(dataset).__name__}")
        if save_freq != "epoch":
            save_freq = checks.check_count(save_freq, "save_freq")
        super().__init__(backup_dir=os.fspath(backup_dir), save_freq=save_freq, delete_checkpoint=delete_checkpoint)
        self._dataset = dataset
        self._folder = Path(backup_dir)
        self._number = 0
        self._quiet: warnings.catch_warnings[Any] | None = None
        self._random_state: Any = None
        self._before_end: list[tuple[Any, Any]] = []
        self._start(0)

    def _start(self, epoch: int) -> None:
        self._epoch = epoch  # Keras's number
        self._steps = 0  # of Keras's epoch
        self._data_epoch = self._dataset.epoch
        self._left = len(self._dataset)  # batches of the dataset's epoch not yet trained on
        self._total = self._left
        self._unsaved = 0

    # -- Keras's hooks -------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        backups = self._backups()
        self._number = backups[-1][0] if backups else 0
        folder = str(backups[-1][1]) if backups else self.backup_dir
        keras_part = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        keras_part.set_model(self.model)
        keras_part.on_train_begin(logs)
        epoch = 0
        if backups:
            saved = json.loads((backups[-1][1] / _DATA_FILE).read_text())
            self._dataset.load_state_dict(saved["dataset"])
            version, words, gauss = saved["random"]
            state = (version, tuple(words), gauss)
            random.setstate(state)
            if saved["dataset"]["remaining"] is not None:
                self._random_state = state
            with np.load(backups[-1][1] / _SEEDS_FILE) as seeds:
                for variable, value in zip(_seed_states(self.model), seeds.values(), strict=True):
                    variable.assign(value)
            epoch = saved["epoch"]
        self._start(epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._steps = epoch, 0
        if self._random_state is not None:
            self._quiet = warnings.catch_warnings()
            self._quiet.__enter__()
            warnings.filterwarnings("ignore", message="Your input ran out of data")  # as it should: it is resumed

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._random_state is not None:
            # Only now: Keras has drawn the order of this pass, which in the run that was interrupted came before.
            random.setstate(self._random_state)
            self._random_state = None
        steps = batch + 1 - self._steps
        self._steps = batch + 1
        self._unsaved += steps
        self._left -= steps
        epoch_ended = self._left <= 0
        if epoch_ended and self._quiet is not None:
            self._remember_counters()
        while self._left <= 0:
            self._data_epoch += 1
            self._total = self._dataset._plan.num_batches
            self._left += self._total
        if self.save_freq != "epoch" and self._unsaved >= self.save_freq:
            self._save(self._epoch + (epoch_ended or self._steps == self.params.get("steps")))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)
            self._quiet = None
            for variable, value in self._before_end:
                variable.assign(value)
            self._before_end = []
        if self.save_freq == "epoch":
            self._save(epoch + 1)

    def on_train_end(self, logs: Any = None) -> None:
        if self.delete_checkpoint:
            for path in self._folder.glob("backup-*"):
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is in it, or it never came to be
                self._folder.rmdir()

    def _remember_counters(self) -> None:
        """Keeps what the step after the last one of a resumed epoch will change.

        Keras expects a whole epoch and tries that step. It finds no data, but in TensorFlow's graph whatever does not
        depend on the data has been done by then: counting the optimizer's iterations, advancing seed generators.
        """
        model = self.model
        counters = [v for v in model.optimizer.variables if v.ndim == 0] + _seed_states(model)
        self._before_end = [(variable, keras.ops.convert_to_numpy(variable).copy()) for variable in counters]

    # -- files ---------------------------------------------------------------------------------------------------

    def _save(self, epoch: int) -> None:
        """Writes a backup that makes `fit` go on in Keras's epoch `epoch`."""
        self._unsaved = 0
        self._number += 1
        target = self._folder / f"backup-{self._number:08d}"
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        keras_part = keras.callbacks.BackupAndRestore(str(partial), delete_checkpoint=False)
        keras_part.set_model(self.model)
        keras_part.on_epoch_end(epoch - 1)
        done = self._total - self._left
        left = self._dataset._tracker.left_after(done) if done else list(range(self._total))
        saved = {
            "epoch": epoch,
            "dataset": self._dataset._state(self._data_epoch, left),
            "random": random.getstate(),
        }
        (partial / _DATA_FILE).write_text(json.dumps(saved))
        np.savez(partial / _SEEDS_FILE, *[keras.ops.convert_to_numpy(v) for v in _seed_states(self.model)])
        _to_disk(partial)
        older = self._backups()
        partial.rename(target)
        _to_disk(self._folder, deep=False)
        for _, folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def _backups(self) -> list[tuple[int, Path]]:
        """Whole backups, oldest first."""
        found = [path for path in self._folder.glob("backup-*") if path.suffix != ".partial"]
        return sorted((int(path.name.removeprefix("backup-")), path) for path in found)


def _seed_states(model: Any) -> list[Any]:
    """The variables of a model that are neither weights nor metrics: the states of its seed generators."""
    known = {id(variable) for variable in [*model.weights, *model.metrics_variables]}
    return [variable for variable in model.variables if id(variable) not in known]


def _to_disk(folder: Path, deep: bool = True) -> None:
    for path in [*(folder.iterdir() if deep else ()), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
