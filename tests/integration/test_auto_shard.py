"""Keras's own division of the data among processes (3.16 on), in two real processes of JAX on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest

from tests.support import python_path

_SCRIPT = Path(__file__).parents[1] / "scripts" / "auto_shard.py"

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(
        not hasattr(keras.distribution.DataParallel, "num_data_shards"),
        reason=f"Keras {keras.__version__} does not divide a PyDataset; tests/test_handles.py asks as 3.16 does",
    ),
]


def _train(how: str) -> list[dict[str, Any]]:
    """What each of two processes says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, _SCRIPT, str(rank), port, how],
            env={**os.environ, "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(next(line for line in lines.splitlines() if line.startswith("{"))) for lines in said]


@pytest.mark.parametrize("how", ["shuffled", "plain", "by-hand"])
def test_each_sample_is_trained_on_once_an_epoch(how: str) -> None:  # P1
    for process in _train(how):
        assert process["epoch"] == 3
        for epoch in process["trained"]:
            assert sorted(sample for step in epoch for sample in step) == list(range(22))
            assert len(epoch) == 3
        if how == "plain":
            assert [sorted(epoch) for epoch in process["trained"]] == [sorted(epoch) for epoch in process["plain"]]
        else:
            assert process["trained"] == process["plain"]


@pytest.mark.parametrize("how", ["stream", "stream-by-hand"])
def test_a_stream_is_divided_as_by_shard(how: str) -> None:  # P2
    for process in _train(how):
        assert process["epoch"] == 3
        assert process["trained"] == process["plain"]
        assert all(len(step) == len(set(step)) == 8 for epoch in process["trained"] for step in epoch)


def test_of_a_stream_without_length_each_process_gets_every_other_batch() -> None:  # P1
    for process in _train("stream-steps"):
        for epoch in process["trained"]:
            assert sorted(sample for step in epoch for sample in step) == list(range(22))


def test_dividing_twice_is_refused() -> None:
    for process in _train("twice"):
        assert "auto_shard_dataset=False" in process["refused"]
