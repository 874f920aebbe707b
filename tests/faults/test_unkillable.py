"""A process that SIGKILL does not end, as one that waits for a file system that hangs: nobody waits for it (P3, P6).

It is had by freezing it with the first version of control groups, which needs root.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.census import eventually, is_gone
from tests.faults.harm import Harm

_FREEZERS = Path("/sys/fs/cgroup/freezer")
_PATIENCE_S = 30.0


class Freezer:
    """Freezes processes; they can be killed only when they have been thawed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def freeze(self, pid: int) -> None:
        """Takes in a process, and waits until it is frozen."""
        (self._folder / "cgroup.procs").write_text(str(pid))
        (self._folder / "freezer.state").write_text("FROZEN")
        assert eventually(lambda: (self._folder / "freezer.state").read_text().strip() == "FROZEN")

    def thaw(self) -> None:
        """Lets them go on."""
        (self._folder / "freezer.state").write_text("THAWED")


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    folder = _FREEZERS / f"keras_mp-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this system does not let a test freeze a process")
    if not (folder / "freezer.state").exists():
        folder.rmdir()
        pytest.skip("this system has no control groups of version 1")
    made = Freezer(folder)
    yield made
    made.thaw()
    assert eventually(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


class _Waits:
    """Waits at sample 5 until a file is there, once; then goes on writing its batch, if it is let."""

    def __init__(self, harm: Harm) -> None:
        self.harm = harm

    def __call__(self, value: int) -> Any:
        if value == 5:
            self.harm.strike()
        return np.full(50_000, value)


class _Freezes(threading.Thread):
    """Freezes the worker that is struck."""

    def __init__(self, freezer: Freezer, harm: Harm) -> None:
        super().__init__()
        self._freezer, self._harm = freezer, harm
        self.start()

    def run(self) -> None:
        assert eventually(lambda: bool(self._harm.struck and self._harm.victims[0]), _PATIENCE_S)
        self._freezer.freeze(self._harm.victims[0])


def _right(batches: list[Any]) -> bool:
    return all((batch == np.array([[2 * i], [2 * i + 1]])).all() for i, batch in enumerate(batches))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_is_made_elsewhere(workers: int, tmp_path: Path, freezer: Freezer) -> None:
    harm = Harm("hang", tmp_path)
    helper = _Freezes(freezer, harm)
    with keras_mp.PoolDataset(range(40), _Waits(harm), batch_size=2, workers=workers, timeout=2.0) as dataset:
        started = time.monotonic()
        held = list(dataset)
        assert time.monotonic() - started < _PATIENCE_S
        helper.join()
        assert _right(held)
        victim = harm.victims[0]
        assert not is_gone(victim)
        assert victim not in dataset.stats()["pids"]
        descriptors = os.listdir("/proc/self/fd")
        freezer.thaw()  # what it may write now, it writes where nobody reads
        assert eventually(lambda: is_gone(victim))
        assert len(os.listdir("/proc/self/fd")) <= len(descriptors)
        held += list(dataset)
        assert _right(held[:20])
        assert _right(held[20:])


@pytest.mark.parametrize("moment", ["busy", "idle"])
def test_close_does_not_wait_for_it(moment: str, tmp_path: Path, freezer: Freezer) -> None:
    harm = Harm("hang", tmp_path, 1 if moment == "busy" else 0)
    with keras_mp.WorkerPool(2) as pool, keras_mp.PoolDataset(range(40), _Waits(harm), batch_size=2, pool=pool) as data:
        data[0]
        if moment == "busy":
            _Freezes(freezer, harm).join()
            victim = harm.victims[0]
        else:
            assert _right(list(data))
            victim = pool.stats()["pids"][0]
            freezer.freeze(victim)
        started = time.monotonic()
        data.close()
        pool.close()
        assert time.monotonic() - started < _PATIENCE_S
        assert not is_gone(victim)
    freezer.thaw()
    assert eventually(lambda: is_gone(victim))


def test_nobody_waits_for_the_pool_while_it_waits(tmp_path: Path, freezer: Freezer) -> None:
    harm = Harm("hang", tmp_path)
    pool = keras_mp.WorkerPool(2)
    with keras_mp.PoolDataset(range(40), _Waits(harm), batch_size=2, pool=pool) as data:
        data[0]
        _Freezes(freezer, harm).join()
        closing = threading.Thread(target=pool.close)
        closing.start()
        looks = 0
        while closing.is_alive():
            pool.stats()
            looks += 1
        assert looks > 100
    freezer.thaw()
    assert eventually(lambda: is_gone(harm.victims[0]))
