"""What the fault tests share: batches in a form to compare, and the batches of an undisturbed run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

import keras_mp
from tests.faults.harm import BATCH_SIZE, pieces

SEED = 11


def digest(batch: Any) -> str:
    """A batch as text: structure, and dtype, shape and every byte of its arrays."""
    if isinstance(batch, np.ndarray):
        data = repr(batch.tolist()).encode() if batch.dtype.hasobject else np.ascontiguousarray(batch).tobytes()
        return f"{batch.dtype}{batch.shape}{hashlib.sha256(data).hexdigest()}"
    if isinstance(batch, dict):
        return "{" + ",".join(f"{key!r}:{digest(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return f"{type(batch).__name__}({','.join(map(digest, batch))})"
    return type(batch).__name__


def digests(batches: Iterable[Any]) -> list[str]:
    """The batches as text; none of them is kept."""
    return [digest(batch) for batch in batches]


def undisturbed(moment: str = "load", epochs: int = 1, **options: Any) -> list[str]:
    """The batches that a dataset of `harm.pieces(moment)` gives where nothing happens."""
    with harmed(moment, None, workers=0, **options) as dataset:
        return [text for _ in range(epochs) for text in digests(dataset)]


def harmed(moment: str, harm: Any, **options: Any) -> keras_mp.PoolDataset:
    """A dataset of `harm.pieces`."""
    return keras_mp.PoolDataset(**pieces(moment, harm), batch_size=BATCH_SIZE, shuffle=False, seed=SEED, **options)
