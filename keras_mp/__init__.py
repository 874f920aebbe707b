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
    from keras_mp.engines.processes import WorkerPool as WorkerPool
    from keras_mp.errors import *  # noqa: F403  # it says itself what is public
    from keras_mp.loading.collate import empty as empty
    from keras_mp.loading.per_worker import PerWorker as PerWorker
    from keras_mp.monitor import PipelineMonitor as PipelineMonitor
    from keras_mp.stats import Stats as Stats

__version__ = "0.1.0"

_MODULES = {
    "callbacks": ["BackupAndRestore"],
    "dataset": ["PoolDataset", "parallelize"],
    "engines.processes": ["WorkerPool"],
    "loading.collate": ["empty"],
    "loading.per_worker": ["PerWorker"],
    "monitor": ["PipelineMonitor"],
    "stats": ["Stats"],
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

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
