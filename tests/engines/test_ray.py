"""Ray in scripts of their own: one that a dataset starts and ends, and one that is killed (P3, P4)."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from tests.support import run_script

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("clusters")]


def test_a_ray_that_a_dataset_started_ends_with_the_last_one(tmp_path: Path) -> None:  # P4
    code = textwrap.dedent(
        """
        import numpy as np
        import psutil
        import ray
        import keras_mp

        data = np.arange(64.0)
        first = keras_mp.PoolDataset(data, batch_size=8, pool="ray", workers=2)
        second = keras_mp.PoolDataset(data, batch_size=8, pool="ray", workers=2)
        with first:
            with second:
                print(ray.is_initialized())
                print([batch.tolist() for batch in first] == [batch.tolist() for batch in second])
            print(ray.is_initialized(), len(list(first)))
        print(ray.is_initialized())
        gone, alive = psutil.wait_procs(psutil.Process().children(recursive=True), 30)
        print(alive)
        """
    )
    output = run_script(tmp_path / "train.py", code, KERAS_BACKEND="numpy")
    assert output.splitlines() == ["False", "True", "True 8", "False", "[]"]


def test_fit_ends_with_an_error_that_names_the_batch_when_ray_is_killed(tmp_path: Path) -> None:  # P3
    code = textwrap.dedent(
        """
        import os
        import signal
        import threading
        import keras
        import numpy as np
        import psutil
        import ray
        import keras_mp

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
        children = psutil.Process().children(recursive=True)
        victims = [child.pid for child in children if child.name() in ("gcs_server", "raylet")]
        assert len(victims) == 2

        def kill(x):
            if x == 9:
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                threading.Event().wait(600)
            return np.float32([x]), np.float32([x])

        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        with keras_mp.PoolDataset(range(40), kill, batch_size=2, pool="ray") as data:
            try:
                model.fit(data, verbose=0)
            except Exception as error:
                print(type(error).__name__, str(error), flush=True)  # TensorFlow's own, if its thread took the batch
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)  # Ray's own shutdown would wait for the head
        """
    )
    output = run_script(tmp_path / "train.py", code)
    assert "WorkerCrashed" in output
    assert re.search(r"batch \d+ of epoch 0", output)
