"""A pool that is made smaller while its workers are busy: what the surplus ones were at is not lost (P1, P3)."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import keras_mp
from tests.census import eventually


class _Blocks:
    """Says that sample 0 or 2 has been reached, and goes on when it may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, value: float) -> float:
        if value in (0, 2) and not (self.folder / "go on").exists():
            (self.folder / f"at {value:g}").touch()
            while not (self.folder / "go on").exists():
                time.sleep(0.01)
        return value


def test_a_surplus_worker_that_is_killed_at_a_batch_loses_none(tmp_path: Path) -> None:
    with (
        keras_mp.WorkerPool(2) as pool,
        keras_mp.PoolDataset(np.arange(8.0), _Blocks(tmp_path), batch_size=2, pool=pool) as data,
    ):
        ahead = data.stream()
        taken: list[np.ndarray[Any, Any]] = []
        consumer = threading.Thread(target=lambda: taken.extend(batch for (batch,) in ahead))
        consumer.start()
        assert eventually(lambda: all((tmp_path / f"at {value}").exists() for value in (0, 2)))
        first, second = data.stats().pids
        pool.resize(1)
        os.kill(second, signal.SIGKILL)
        assert eventually(lambda: data.stats().pids == (first,))
        (tmp_path / "go on").touch()
        consumer.join(60)
        assert not consumer.is_alive()
    assert [batch.tolist() for batch in taken] == [[0, 1], [2, 3], [4, 5], [6, 7]]
