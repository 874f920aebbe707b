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
from keras_mp.errors import warn_user
from keras_mp.loaded import LoadedDataset

_DATA_FILE = "data.json"
_SEEDS_FILE = "seeds.npz"


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` that also restores the position in the data.

    Use: `model.fit(dataset, callbacks=[keras_mp.BackupAndRestore(dataset, "backup", save_freq=100)])`. When the script
    is run again after an interruption, `fit` goes on with the batch after the last backup. The resumed epoch has
    as many steps as it had batches left. The state of the global `random`, which Keras shuffles batches with, and the
    states of the model's seed generators (dropout), which Keras's callback leaves out, are restored too.

    With `steps_per_epoch`, the interrupted epoch of Keras has the steps that it had left. Of a stream without `length`
    it has all its steps again, on the data that follow. Where what is left of the data ends together with an epoch of
    Keras, Keras looks for more, and has an epoch without steps: a warning says so, and that `epochs=` needs one more.

    Args:
        dataset: the dataset that `fit` trains on. Its export cannot be resumed.
        backup_dir: folder for the backups; used for nothing else.
        save_freq: "epoch", or a number of batches.
        delete_checkpoint: delete the backups when `fit` has come to its end.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; in `fit`, the backup is of another
            dataset, or the model is not built.
    """

    def __init__(
        self,
        dataset: LoadedDataset,
        backup_dir: str | os.PathLike[str],
        save_freq: int | str = "epoch",
        *,
        delete_checkpoint: bool = True,
    ) -> None:
        if not isinstance(dataset, LoadedDataset):
            raise TypeError(f"dataset must be the one of keras_mp's that fit() trains on, got {type(dataset).__name__}")
        if save_freq != "epoch":
            save_freq = checks.check_count(save_freq, "save_freq")
        super().__init__(backup_dir=os.fspath(backup_dir), save_freq=save_freq, delete_checkpoint=delete_checkpoint)
        self._dataset = dataset
        self._folder = Path(backup_dir)
        self._number = 0
        self._quiet = contextlib.ExitStack()
        self._random_state: Any = None
        self._before_end: list[tuple[Any, Any]] = []
        self._begin(0, 0)

    def _begin(self, epoch: int, steps: int) -> None:
        """Training goes on in Keras's `epoch`, of which `steps` steps have been taken."""
        position = self._dataset.position
        self._epoch = epoch  # Keras's number
        self._steps_before = steps  # taken in this epoch of Keras before the interruption
        self._steps = 0  # taken in it since
        self._unsaved = 0
        # Of the pass over the dataset that is trained on: its epoch, its batches, and how many were trained on.
        self._data_epoch, self._done = position.epoch, 0
        self._length = min(len(position), position.limit or len(position))
        self._after_it = len(position) - self._length  # what is left of the epoch for another pass
        self._resumed = len(position) < position.count  # Keras expects more batches than there are

    # -- Keras's hooks -------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        backups = self._backups()
        self._number = backups[-1][0] if backups else 0
        folder = str(backups[-1][1]) if backups else self.backup_dir
        keras_part = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        keras_part.set_model(self.model)
        keras_part.on_train_begin(logs)
        epoch = steps = 0
        if backups:
            saved = json.loads((backups[-1][1] / _DATA_FILE).read_text())
            self._dataset.load_state_dict(saved["dataset"])
            version, words, gauss = saved["random"]
            self._random_state = (version, tuple(words), gauss)
            random.setstate(self._random_state)
            with np.load(backups[-1][1] / _SEEDS_FILE) as seeds:
                for variable, value in zip(_seed_states(self.model), seeds.values(), strict=True):
                    variable.assign(value)
            epoch, steps = saved["epoch"], saved["steps"]
            wanted = self.params.get("steps")
            if self._dataset.batches_per_epoch is None:
                steps = 0  # Keras cannot be made to end an epoch early whose data, as far as it knows, never end
            elif wanted is not None:
                self._divide(wanted, steps)
        self._begin(epoch, steps)

    def _divide(self, wanted: int, steps: int) -> None:
        """Keras takes `wanted` batches an epoch, and has taken `steps` of the one that goes on."""
        position = self._dataset.position
        left = len(position)
        if steps and wanted - steps < left:
            # Keras ends this epoch when its data ends; the next one has a pass of its own over the rest.
            position.limit = wanted - steps
            left -= wanted - steps
        if left < position.count and left % wanted == 0 and steps + left != wanted:
            warn_user(
                f"an epoch of this fit() will have no step: Keras takes {wanted} batches an epoch (steps_per_epoch), "
                f"expects a whole pass of the data, of which {left} are left, so that it finds the end only when it "
                "begins another epoch. No batch is lost; pass one more in epochs="
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch != self._epoch:
            self._steps_before = 0
        self._epoch, self._steps = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._random_state is not None:
            # Only now: Keras has drawn the order of this pass, which in the run that was interrupted came before.
            random.setstate(self._random_state)
            self._random_state = None
        steps = batch + 1 - self._steps
        self._steps = batch + 1
        self._unsaved += steps
        self._done += steps
        while self._done > self._length:
            self._begin_next_pass()
        if self._done == self._length and self._resumed:
            self._remember_counters()
            self._quiet.enter_context(warnings.catch_warnings())  # no earlier, as `fit` may raise
            warnings.filterwarnings("ignore", message="Your input ran out of data")  # as it should: it is resumed
        if self.save_freq != "epoch" and self._unsaved >= self.save_freq:
            self._save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._quiet.close()
        for variable, value in self._before_end:
            variable.assign(value)
        self._before_end = []
        if self.save_freq == "epoch":
            self._save(epoch_is_over=True)

    def on_train_end(self, logs: Any = None) -> None:
        if self.delete_checkpoint:
            for path in self._folder.glob("backup-*"):
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is in it, or it never came to be
                self._folder.rmdir()

    def _begin_next_pass(self) -> None:
        self._done -= self._length
        if self._after_it:
            self._length, self._after_it = self._after_it, 0
        else:
            self._data_epoch += 1
            self._length, self._resumed = self._dataset.position.count, False

    def _remember_counters(self) -> None:
        """Keeps what the step after the last one of a resumed epoch will change.

        Keras expects a whole epoch and tries that step. It finds no data, but in TensorFlow's graph whatever does not
        depend on the data has been done by then: counting the optimizer's iterations, advancing seed generators.
        """
        model = self.model
        counters = [v for v in model.optimizer.variables if v.ndim == 0] + _seed_states(model)
        self._before_end = [(variable, keras.ops.convert_to_numpy(variable).copy()) for variable in counters]

    # -- files ---------------------------------------------------------------------------------------------------

    def _save(self, epoch_is_over: bool = False) -> None:
        """Writes a backup that makes `fit` go on with the next batch."""
        steps = self._steps_before + self._steps
        if epoch_is_over or steps == self.params.get("steps") or self._done >= self._length:
            epoch, steps = self._epoch + 1, 0
        else:
            epoch = self._epoch
        self._unsaved = 0
        self._number += 1
        target = self._folder / f"backup-{self._number:08d}"
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        keras_part = keras.callbacks.BackupAndRestore(str(partial), delete_checkpoint=False)
        keras_part.set_model(self.model)
        keras_part.on_epoch_end(epoch - 1)
        progress = self._dataset.position.state_after(self._data_epoch, self._done)
        saved = {
            "epoch": epoch,
            "steps": steps,
            "dataset": self._dataset.state_of(progress),
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
