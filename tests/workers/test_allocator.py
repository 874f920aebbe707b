"""What a worker keeps of the memory that the user's code has freed: enough to use again, and no more than that."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import keras_mp

_MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)  # Dask sets one in the process that starts a cluster


def _held_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / _MIB


def _free(pieces: int) -> Any:
    """MiB that are held more after so many pieces of 100 MiB each have been allocated, filled and freed."""
    before = _held_mib()
    arrays = [np.ones(100 * _MIB, np.uint8) for _ in range(pieces)]
    del arrays
    return np.float64(_held_mib() - before)


def _held_after(pieces: list[int], env: dict[str, str]) -> list[float]:
    with keras_mp.WorkerPool(1, env=env) as pool, keras_mp.PoolDataset(pieces, _free, batch_size=1, pool=pool) as data:
        return [float(batch[0]) for batch in data]


def test_freed_memory_is_kept_for_the_next_batch() -> None:
    (kept,) = _held_after([1], {})
    assert 90 < kept < 150


def test_what_is_kept_is_bounded() -> None:
    (kept,) = _held_after([5], {})
    assert kept < 300


_SETTINGS = [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]


@pytest.mark.parametrize("settings", _SETTINGS, ids=str)
def test_the_users_own_settings_win(settings: dict[str, str]) -> None:
    (kept,) = _held_after([1], settings)
    assert kept < 20
