"""What is said to whoever waits: workers are starting, one stands at a sample for long, one was replaced."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.census import eventually
from tests.support import python_path


def _stands_at_five(value: float) -> float:
    if value == 5:
        time.sleep(63)
    return value


def test_a_sample_that_takes_a_minute_is_named_once_with_the_line_it_stands_at() -> None:
    """In a worker process and, meanwhile, in a thread."""
    line = f'File "{__file__}", line {_stands_at_five.__code__.co_firstlineno + 2} in _stands_at_five'
    with (
        keras_mp.PoolDataset(np.arange(16.0), _stands_at_five, batch_size=8, workers=1) as in_process,
        keras_mp.PoolDataset(
            np.arange(16.0), _stands_at_five, batch_size=8, workers=2, use_multiprocessing=False
        ) as in_thread,
        concurrent.futures.ThreadPoolExecutor(2) as consumers,
        pytest.warns(RuntimeWarning, match="batch 0 of epoch 0 has been at sample 5 for 6[0-9] s") as told,
    ):
        assert list(consumers.map(lambda dataset: len(list(dataset)), (in_process, in_thread))) == [2, 2]
        assert in_process.stats().restarts == 0
        (pid,) = in_process.stats().pids
    warnings = [each for each in told if "has been at sample" in str(each.message)]
    assert [each.filename for each in warnings] == [__file__] * 2
    of_process, of_thread = sorted((str(each.message) for each in warnings), key=lambda text: ", in a thread" in text)
    assert f"in worker process {pid}" in of_process and "timeout=seconds" in of_process and line in of_process
    assert ", in a thread" in of_thread
    assert of_thread.partition("innermost call first:\n")[2].splitlines() == [line]


_SLOW_START = """
import sys, time
import numpy as np
import keras_mp

def slow(value):
    time.sleep(4 if value == 0 else 0)
    return value

if __name__ == "__main__":
    with keras_mp.PoolDataset(np.arange(8.0), slow, batch_size=4, workers=1) as dataset:
        list(dataset)
    print("done")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_start_is_shown_on_a_terminal_only(tmp_path: Path, terminal: bool) -> None:
    script = tmp_path / "start.py"
    script.write_text(_SLOW_START)
    ours, theirs = pty.openpty() if terminal else os.pipe()
    environment = {**os.environ, "PYTHONPATH": python_path(), "TERM": "xterm", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen([sys.executable, script], stderr=theirs, stdout=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 4096):
                said += data
        except OSError:  # how a terminal ends
            pass
        assert process.stdout is not None and process.stdout.read() == b"done\n"
    os.close(ours)
    assert ("1 of 1 workers have started; waiting for the first batch" in _plain(said)) == terminal


def _plain(said: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode(errors="replace"))


def test_a_replaced_worker_is_logged(caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="keras_mp")
    with keras_mp.PoolDataset(np.arange(16.0), batch_size=8, workers=1) as dataset:
        list(dataset)
        (pid,) = dataset.stats().pids
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: any(f"worker process {pid} ended with signal SIGKILL" in m for m in caplog.messages))
