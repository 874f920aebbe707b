"""keras_mp: the process-pool data loader for Keras.

Importing this package loads neither keras nor tensorflow: every public name is fetched from its module at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_mp.callbacks import BackupAndRestore as BackupAndRestore
    from keras_mp.dataset import PoolDataset as PoolDataset
    from keras_mp.dataset import parallelize as parallelize
    from keras_mp.directories import audio_dataset_from_directory as audio_dataset_from_directory
    from keras_mp.directories import image_dataset_from_directory as image_dataset_from_directory
    from keras_mp.directories import text_dataset_from_directory as text_dataset_from_directory
    from keras_mp.directories import timeseries_dataset_from_array as timeseries_dataset_from_array
    from keras_mp.engines.processes import WorkerPool as WorkerPool
    from keras_mp.errors import *  # noqa: F403  # it says itself what is public
    from keras_mp.loading.collate import empty as empty
    from keras_mp.loading.pad import pad as pad
    from keras_mp.loading.per_worker import PerWorker as PerWorker
    from keras_mp.monitor import PipelineMonitor as PipelineMonitor
    from keras_mp.plan.buckets import Buckets as Buckets
    from keras_mp.plan.orders import balanced as balanced
    from keras_mp.plan.orders import weighted as weighted
    from keras_mp.plan.views import concat as concat
    from keras_mp.plan.views import split as split
    from keras_mp.plan.views import windows as windows
    from keras_mp.plan.views import zip as zip
    from keras_mp.plot import plot_timeline as plot_timeline
    from keras_mp.report.report import Report as Report
    from keras_mp.stats import Stats as Stats
    from keras_mp.stream import StreamDataset as StreamDataset

__version__ = "0.1.0"

_MODULES = {
    "callbacks": ["BackupAndRestore"],
    "dataset": ["PoolDataset", "parallelize"],
    "directories": [
        "audio_dataset_from_directory",
        "image_dataset_from_directory",
        "text_dataset_from_directory",
        "timeseries_dataset_from_array",
    ],
    "engines.processes": ["WorkerPool"],
    "loading.collate": ["empty"],
    "loading.pad": ["pad"],
    "loading.per_worker": ["PerWorker"],
    "monitor": ["PipelineMonitor"],
    "report.report": ["Report"],
    "plot": ["plot_timeline"],
    "stats": ["Stats"],
    "stream": ["StreamDataset"],
    "plan.buckets": ["Buckets"],
    "plan.orders": ["balanced", "weighted"],
    "plan.views": ["concat", "split", "windows", "zip"],
    "errors": [
        "BatchTimeout",
        "KerasMPError",
        "PoolClosed",
        "SampleError",
        "SampleFailure",
        "TooManyFailures",
        "WorkerCrashed",
    ],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF.keys() - {"zip"})  # `from keras_mp import *` leaves Python's own `zip` alone


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
