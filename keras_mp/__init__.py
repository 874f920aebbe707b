"""keras_mp: the process-pool data loader for Keras.

Importing this package loads neither keras nor tensorflow: every public name is fetched from its module at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_mp.callbacks import BackupAndRestore
    from keras_mp.dataset import PoolDataset, parallelize
    from keras_mp.engines.processes import WorkerPool
    from keras_mp.errors import (
        BatchTimeout,
        KerasMPError,
        PoolClosed,
        SampleError,
        SampleFailure,
        TooManyFailures,
        WorkerCrashed,
    )
    from keras_mp.loading.collate import empty

__version__ = "0.1.0"

_HOMES = {
    "BackupAndRestore": "resume",
    "PoolDataset": "dataset",
    "parallelize": "dataset",
    "WorkerPool": "pool",
    "empty": "collate",
    "KerasMPError": "errors",
    "SampleError": "errors",
    "SampleFailure": "errors",
    "WorkerCrashed": "errors",
    "BatchTimeout": "errors",
    "TooManyFailures": "errors",
    "PoolClosed": "errors",
}

__all__ = [
    "BackupAndRestore",
    "BatchTimeout",
    "KerasMPError",
    "PoolClosed",
    "PoolDataset",
    "SampleError",
    "SampleFailure",
    "TooManyFailures",
    "WorkerCrashed",
    "WorkerPool",
    "empty",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
