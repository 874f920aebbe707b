"""On systems that lack what Linux has: macOS, where all works, and Windows, where threads take the workers' place.

What these systems lack is taken away in a process of its own, for its workers as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

import keras_mp
from tests.support import python_path, run_script

pytestmark = pytest.mark.timeout(600)  # several interpreters one after the other, each of which imports Keras
_MACOS = Path(__file__).parent / "platforms" / "macos"


def _script(text: str) -> str:
    return textwrap.dedent(text).lstrip()


def _macos_path() -> str:
    return os.pathsep.join((str(_MACOS), python_path()))


_SAMPLES = _script(
    """
    import os, signal, sys
    import numpy as np
    import keras_mp

    assert not hasattr(os, "memfd_create") and not hasattr(os, "waitid")

    def load(item):
        return np.full((40, 40), item, np.float32)

    def transform(sample, rng):
        return sample + np.float32(rng.random()), int(sample[0, 0])

    def make(**options):
        options = {"transform": transform, "load": load, "batch_size": 8, "shuffle": True, "seed": 3} | options
        return keras_mp.PoolDataset([*range(100)], **options)

    def same(batches, others):
        batches, others = list(batches), list(others)
        assert len(batches) == len(others) == 13
        for batch, other in zip(batches, others):
            for one, another in zip(batch, other):
                np.testing.assert_array_equal(one, another)
    """
)


def test_macos_serves_the_same_data_through_kills_stops_and_a_cache(tmp_path: Path) -> None:  # P2, P3
    code = _SAMPLES + _script(
        """
        with make(workers=0) as plain:
            epochs = [list(plain) for _ in range(4)]
        with keras_mp.WorkerPool(2) as pool, make(pool=pool, cache="ram") as dataset:
            same(dataset, epochs[0])
            same(dataset, epochs[1])  # from the cache
            for epoch, how in ((2, signal.SIGKILL), (3, signal.SIGSTOP)):
                batches = []
                for batch in dataset:
                    if len(batches) == 1:
                        for pid in pool.stats()["pids"]:
                            os.kill(pid, how)
                    batches.append(batch)
                same(batches, epochs[epoch])
            print("restarts", pool.stats()["restarts"])
            pids = pool.stats()["pids"]
        for pid in pids:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                pass
            else:
                raise SystemExit(f"{pid} is left")
        """
    )
    output = run_script(tmp_path / "train.py", code, timeout_s=500, PYTHONPATH=_macos_path(), KERAS_BACKEND="numpy")
    assert int(output.split()[-1]) >= 2


def test_macos_exports_and_shares_no_descriptor_with_children(tmp_path: Path) -> None:  # P4
    code = _SAMPLES + _script(
        """
        def inheritable(_):
            found = []
            for fd in range(3, 256):
                try:
                    found.append(os.get_inheritable(fd))
                except OSError:
                    pass
            assert found
            return sum(found)

        if __name__ == "__main__":
            big = np.arange(1 << 20, dtype=np.float32).reshape(256, -1)  # shared with the workers
            with make(workers=2) as dataset, make(workers=0) as plain:
                same([[part.numpy() for part in batch] for batch in dataset.to_tf_dataset()], plain)
            with keras_mp.PoolDataset(big, batch_size=64, workers=2, cache="ram") as dataset:
                np.testing.assert_array_equal(np.concatenate(list(dataset)), big)
            with keras_mp.PoolDataset(range(32), inheritable, batch_size=4, workers=2, cache="ram") as dataset:
                assert not np.concatenate(list(dataset)).any()
        """
    )
    run_script(tmp_path / "train.py", code, timeout_s=500, PYTHONPATH=_macos_path(), KERAS_BACKEND="tensorflow")


def test_macos_leaves_no_worker_when_the_training_is_killed(tmp_path: Path) -> None:  # P4
    code = _SAMPLES + _script(
        """
        def endless(item):
            while True:
                pass

        pool = keras_mp.WorkerPool(2)
        while len(pool.stats()["pids"]) < 2:
            with keras_mp.PoolDataset(range(16), batch_size=1, pool=pool) as started:
                list(started)
        dataset = make(transform=endless, load=None, pool=pool)
        print(*pool.stats()["pids"], flush=True)
        next(iter(dataset))
        """
    )
    script = tmp_path / "train.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": _macos_path(), "KERAS_BACKEND": "numpy"}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as training:
        try:
            assert training.stdout is not None
            workers = [psutil.Process(int(pid)) for pid in training.stdout.readline().split()]
        finally:
            training.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=60)[1]


_WINDOWS = _script(
    """
    import asyncio, concurrent.futures, multiprocessing.connection, multiprocessing.resource_tracker, random, warnings
    import keras, numpy as np
    import tempfile
    from tests.platforms.windows import become_windows

    def transform(item, rng):
        return np.float32(item + rng.random())

    def drawing(item):
        return np.float32(item + random.random() + np.random.random())

    def make(function=transform, **options):
        return keras_mp.PoolDataset([*range(50)], function, batch_size=8, shuffle=True, seed=3, **options)

    def batches(function=transform, **options):
        with make(function, **options) as dataset:
            return [batch.tolist() for _ in range(2) for batch in dataset]

    if __name__ == "__main__":
    """
)


def _windows(tmp_path: Path, text: str, before: str = "") -> str:
    text = f"{_script(before)}become_windows()\nimport keras_mp\n{_script(text)}"
    code = _WINDOWS + textwrap.indent(text, "    ")
    return run_script(tmp_path / "train.py", code, timeout_s=500, KERAS_BACKEND="numpy")


def test_windows_imports_every_public_name(tmp_path: Path) -> None:
    output = _windows(
        tmp_path,
        """
        import keras_mp.cli
        print(*(getattr(keras_mp, name).__name__ for name in keras_mp.__all__))
        """,
    )
    assert sorted(output.split()) == sorted(keras_mp.__all__)


def test_windows_has_threads_in_place_of_workers_and_says_so_once(tmp_path: Path) -> None:  # P2
    output = _windows(
        tmp_path,
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for function in (transform, drawing):
                expected = batches(function, workers=0)
                assert expected == batches(function, workers=2) == batches(function, workers="auto")
            for expected, got in zip(batches(workers=0), batches()):
                assert expected == got
            with make(workers=2) as dataset:
                print(dataset)
            for warning in caught:
                print(warning.category.__name__, warning.filename, warning.message)
        """,
    )
    dataset, warning = output.strip().splitlines()
    assert "workers=2 threads" in dataset
    for text in ("RuntimeWarning", "train.py", "win32", "fcntl", "AF_UNIX", "pool=", "use_multiprocessing=False"):
        assert text in warning, text


def test_windows_takes_executors_and_refuses_what_needs_processes_of_ours(tmp_path: Path) -> None:
    output = _windows(
        tmp_path,
        """
        warnings.simplefilter("error")
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            for function in (transform, drawing):
                assert batches(function, pool=threads) == batches(function, workers=0)
        assert batches(pool=processes) == batches(workers=0)
        processes.shutdown()
        with tempfile.TemporaryDirectory() as folder:
            assert batches(workers=2, use_multiprocessing=False, cache=folder) == batches(workers=0)
        for refused in (
            lambda: keras_mp.WorkerPool(2),
            lambda: batches(workers=2, use_multiprocessing=False, cache="ram"),
        ):
            try:
                refused()
            except keras_mp.KerasMPError as error:
                print(error)
        """,
        before="""
        # Multiprocessing starts these as on Linux, which it needs to have for that.
        processes = concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
        list(processes.map(abs, range(8)))
        """,
    )
    pool, cache = output.strip().splitlines()
    assert "win32" in pool and "ProcessPoolExecutor" in pool
    assert "win32" in cache and "pass a folder as cache=" in cache
