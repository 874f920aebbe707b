"""A process that ends while TensorFlow, or a loop, still asks for batches: it ends, and its workers too (P3, P4)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

import keras_mp
from tests.census import worker_pids
from tests.faults import scripts
from tests.support import python_path


def _ends(*arguments: str, backend: str = "tensorflow") -> None:
    """Runs `tests.exits`, which fails if a process hangs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.exits", *arguments],
        env={**os.environ, "PYTHONPATH": python_path(), "KERAS_BACKEND": backend},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=280)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):  # its runs too, which outlive it
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ends", [("exception", "sys.exit"), ("ctrl-c", "alive")], ids=" ".join)
@pytest.mark.parametrize("what", ["export", "dataset"])
def test_a_process_ends_whatever_is_in_use(what: str, ends: tuple[str, ...]) -> None:
    _ends(*(f"{what}+{end}" for end in ends), "--runs", "6" if what == "export" else "3")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_process_ends_on_other_backends(backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    _ends("dataset+exception", "dataset+ctrl-c", "--runs", "2", backend=backend)


def test_who_loads_in_process_may_finish(tmp_path: Path) -> None:
    """The script ends within a batch that a thread of TensorFlow's loads: the thread is waited for."""
    code = """
    started = threading.Event()
    def slow(index):
        if index == 40:
            started.set()
            time.sleep(2)
            print("finished", flush=True)
        return np.full(4, index)
    train = keras_mp.PoolDataset(range(400), slow, batch_size=4, workers=0)
    kept = iter(train.to_tf_dataset(prefetch=100))
    next(kept)
    assert started.wait(60)
    """
    assert scripts.run(code, tmp_path).splitlines().count("finished") == 1


# -- close() while somebody iterates ---------------------------------------------------------------------------------


def test_close_ends_the_workers_of_an_export_in_use() -> None:
    train = keras_mp.PoolDataset(range(4000), batch_size=4, workers=2)
    with train:
        iterator = iter(train.to_tf_dataset(prefetch=0))
        assert next(iterator).numpy().tolist() == [0, 1, 2, 3]
        assert worker_pids()
    assert worker_pids() == []
    with pytest.raises(tf.errors.OpError, match=r"PoolClosed.*PoolDataset has been closed"):
        for _ in range(1000):  # those that TensorFlow has taken come first
            next(iterator)


def test_close_ends_the_workers_of_an_iterator_in_use() -> None:
    train = keras_mp.PoolDataset(range(4000), batch_size=4, workers=2)
    iterator = iter(train)
    next(iterator)
    assert worker_pids()
    train.close()
    assert worker_pids() == []
    with pytest.raises(keras_mp.PoolClosed, match="PoolDataset has been closed"):
        next(iterator)
