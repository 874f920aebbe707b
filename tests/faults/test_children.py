"""Processes that the dataset's code starts in a worker end with the worker, however it ends (P4)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keras_mp
from tests.census import eventually, is_gone
from tests.faults import scripts
from tests.faults.harm import Harm

_GONE_S = 5.0


class StartsChild:
    """Starts a process that nobody ends, once in each worker; does harm at sample 5."""

    def __init__(self, folder: Path, harm: Harm | None = None) -> None:
        self.folder, self.harm = folder, harm

    def __call__(self, value: int) -> int:
        if not (self.folder / f"child-of-{os.getpid()}").exists():
            child = subprocess.Popen(["sleep", "1000"])
            new = self.folder / f"new-{child.pid}"
            new.write_text(str(child.pid))
            new.rename(self.folder / f"child-of-{os.getpid()}")
        if value == 5 and self.harm is not None:
            self.harm.strike()
        return value

    @property
    def children(self) -> list[int]:
        """Those started so far."""
        return [int(path.read_text()) for path in self.folder.glob("child-of-*")]


def _all_gone(children: list[int]) -> Callable[[], bool]:
    return lambda: all(is_gone(pid) for pid in children)


@pytest.mark.parametrize("kind", [None, "exit", "SIGSEGV", "SIGKILL", "SIGSTOP", "hang"])
def test_children_end_with_their_worker(kind: str | None, tmp_path: Path) -> None:
    harm = None if kind is None else Harm(kind, tmp_path)
    transform = StartsChild(tmp_path, harm)
    options: dict[str, Any] = {"batch_size": 2, "timeout": 2.0, "workers": 2}
    with keras_mp.PoolDataset(range(8), transform, **options) as dataset:
        assert [batch.tolist() for batch in dataset] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        before = transform.children
        assert before
        if harm is not None:
            victim = int((tmp_path / f"child-of-{harm.victims[0]}").read_text())
            assert eventually(_all_gone([victim]), _GONE_S)
    assert eventually(_all_gone(transform.children), _GONE_S)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("state", ["idle", "busy", "stopped"])
def test_children_end_with_the_program(state: str, number: signal.Signals, tmp_path: Path) -> None:
    code = f"""
    from tests.faults.test_children import StartsChild
    harm = {{"idle": None, "busy": Harm("hang", here), "stopped": Harm("SIGSTOP", here)}}["{state}"]
    dataset = keras_mp.PoolDataset(range(8), StartsChild(here, harm), batch_size=2, workers=2)
    dataset[0]
    if harm is not None:
        while not harm.struck:
            time.sleep(0.01)
    (here / "ready").touch()
    signal.pause()
    """
    process = scripts.start(code, tmp_path)
    assert eventually((tmp_path / "ready").exists, 60), scripts.finish(process, 0)
    children = StartsChild(tmp_path).children
    assert children
    process.send_signal(number)
    assert scripts.finish(process)[0] == -number
    assert eventually(_all_gone(children), _GONE_S)
