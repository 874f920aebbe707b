"""Worker pools: shared by equal settings, gone when their users are, the environment of their workers (P4, P7)."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import keras_mp
from keras_mp.checks import check_workers
from keras_mp.loading.loader import SampleLoader
from keras_mp.plan.request import Request
from keras_mp.workers.client import PoolClient
from keras_mp.workers.dispatcher import Dispatcher
from tests import transforms
from tests.census import eventually, worker_pids

_DATA = np.arange(24.0)


def _pids(dataset: keras_mp.PoolDataset) -> set[int]:
    """Of the workers that made the dataset's batches, and of those that its pool has."""
    served = {int(pid) for batch in dataset for pid in batch["pid"]}
    pool: set[int] = set(dataset.stats()["pids"])
    assert served <= pool
    return pool


@pytest.fixture(scope="module")
def pool(running_pool: keras_mp.WorkerPool) -> keras_mp.WorkerPool:
    """One for all tests of this module."""
    return running_pool


def _dataset(**options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(_DATA, transforms.process_facts, **{"batch_size": 2, **options})


def test_datasets_with_equal_settings_share_one_pool() -> None:
    with _dataset(workers=2) as train, _dataset(workers=2, batch_size=5) as val, _dataset(workers=1) as other:
        assert _pids(train) == _pids(val)
        assert len(_pids(train)) == 2
        assert not _pids(train) & _pids(other)
        assert sorted(worker_pids()) == sorted(_pids(train) | _pids(other))


def test_a_pool_lives_as_long_as_one_dataset_uses_it() -> None:
    first, second = _dataset(workers=1), _dataset(workers=1)
    before = _pids(first)
    assert _pids(second) == before
    first.close()
    gc.collect()
    assert _pids(second) == before
    second.close()
    del first, second
    gc.collect()
    assert eventually(lambda: not worker_pids())  # P4


def test_a_dataset_that_is_garbage_ends_its_workers() -> None:  # P4
    dataset = _dataset(workers=1)
    batch = dataset[0]
    seen = weakref.ref(dataset)
    del dataset
    gc.collect()
    assert seen() is None
    assert eventually(lambda: not worker_pids())
    assert (batch["pid"] > 0).all()  # batches stay valid


def test_a_pool_of_the_users_outlives_its_datasets(pool: keras_mp.WorkerPool) -> None:
    with _dataset(pool=pool) as one:
        first = _pids(one)
    with _dataset(pool=pool) as two:
        assert _pids(two) == first
        assert two.stats()["workers"] == 2


def test_close_ends_the_workers_before_it_returns() -> None:  # P4
    pool = keras_mp.WorkerPool(2)
    with _dataset(pool=pool) as dataset:
        pids = _pids(dataset)
        pool.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        with pytest.raises(keras_mp.PoolClosed):
            dataset[0]
    pool.close()
    assert "closed" in repr(pool)


@pytest.mark.parametrize("close", [True, False])
def test_a_pool_that_was_never_used_leaves_nothing(close: bool) -> None:  # P4; the leak fixture looks
    pool = keras_mp.WorkerPool(2)
    if close:
        pool.close()


def test_a_closed_pool_serves_nobody_and_leaves_nothing() -> None:  # P4
    pool = keras_mp.WorkerPool(1)
    pool.close()
    with _dataset(pool=pool) as dataset, pytest.raises(keras_mp.PoolClosed):
        dataset[0]


def test_close_while_batches_are_being_loaded(tmp_path: Path) -> None:  # P3
    started = tmp_path / "started"

    def block(value: float) -> float:
        started.touch()
        signal.pause()
        return value

    pool = keras_mp.WorkerPool(1)
    dataset = keras_mp.PoolDataset(_DATA, block, batch_size=2, pool=pool)
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            dataset[0]
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    assert eventually(started.exists)
    pool.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(errors[0], keras_mp.PoolClosed)
    assert "batch 0 of epoch 0" in str(errors[0])
    dataset.close()


def test_a_full_pool_makes_no_more_workers_than_asked_for(pool: keras_mp.WorkerPool) -> None:
    with _dataset(pool=pool, batch_size=1, max_queue_size=24) as dataset:
        for _ in range(3):
            assert len(_pids(dataset)) == 2


def test_several_threads_may_take_batches(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(_DATA, batch_size=2, pool=pool) as dataset:
        got: dict[int, Any] = {}
        barrier = threading.Barrier(4)

        def take(first: int) -> None:
            barrier.wait(30)
            for batch in range(first, 12, 4):
                got[batch] = dataset[batch].tolist()

        threads = [threading.Thread(target=take, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert got == {batch: [2.0 * batch, 2.0 * batch + 1] for batch in range(12)}


# -- what a worker is ------------------------------------------------------------------------------------------------


def _asked(pool: keras_mp.WorkerPool | None, function: Any, **options: Any) -> Any:
    with keras_mp.PoolDataset([0], lambda _: function(), collate=lambda found: found[0], pool=pool, **options) as one:
        return one[0]


def test_workers_have_the_environment_they_need() -> None:
    def look() -> dict[str, Any]:
        import signal as signals
        import sys

        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MINE")
        return {
            **{name: os.environ.get(name) for name in names},
            "sigint": signals.getsignal(signals.SIGINT) == signals.SIG_IGN,
            "stdin": os.path.realpath("/proc/self/fd/0"),
            "path": sys.path,
            "main": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
            "cwd": os.getcwd(),
        }

    import sys

    with keras_mp.WorkerPool(1, env={"MINE": "yes"}, worker_threads=3) as pool:
        found = _asked(pool, look)
    assert found == {
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "MINE": "yes",
        "sigint": True,
        "stdin": "/dev/null",
        "path": sys.path,
        "main": "keras_mp.workers.main",
        "cwd": os.getcwd(),
    }


def test_a_worker_inherits_no_descriptor_of_ours(pool: keras_mp.WorkerPool, tmp_path: Path) -> None:  # P7
    def look() -> list[str]:
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:
                continue
        return found

    with (tmp_path / "secret").open("w"):
        found = _asked(pool, look)
    kinds = sorted(target.split(":")[0] for target in found if not target.startswith(("/memfd:keras_mp", "/proc/")))
    # stdin, stdout and stderr, the socket and the lifeline; nothing listens.
    assert not any("secret" in target for target in found)
    assert kinds.count("socket") <= 1 + sum(os.path.realpath(f"/proc/self/fd/{n}").count("socket:") for n in (1, 2))


def test_neither_parent_nor_workers_listen(pool: keras_mp.WorkerPool) -> None:  # P7
    with _dataset(pool=pool) as dataset:
        for pid in [os.getpid(), *_pids(dataset)]:
            assert not [c for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"]


def test_a_numpy_only_worker_is_small_and_free_of_frameworks(pool: keras_mp.WorkerPool) -> None:
    with _dataset(pool=pool, batch_size=4) as dataset:
        for batch in dataset:
            assert set(batch["heavy"].tolist()) == {""}
            assert batch["pss_kb"].max() < 45 * 1024


def test_a_large_source_is_shared_not_copied(pool: keras_mp.WorkerPool) -> None:
    def touch(row: Any) -> dict[str, Any]:
        return {"sum": row.sum(), **transforms.process_facts(row), "own_kb": _private_kb()}

    def _private_kb() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))

    small = np.ones((64, 4))
    large = np.ones((64, 1 << 17))  # 64 MB
    with keras_mp.PoolDataset(small, touch, batch_size=1, pool=pool) as dataset:
        base = max(int(batch["own_kb"][0]) for batch in dataset)
    with keras_mp.PoolDataset(large, touch, batch_size=1, pool=pool) as dataset:
        batches = list(dataset)
        assert sum(float(batch["sum"][0]) for batch in batches) == large.sum()
        # Every worker has touched many rows; had it a copy, 64 MB would be its own. Pages that only one worker has
        # touched so far count as private, so several read the whole.
        assert max(int(batch["own_kb"][0]) for batch in batches[:2]) - base < 16 * 1024
    parts = list(large.reshape(8, -1))  # 8 MB each: of the one at hand the transform has a copy

    def touch_all(part: Any) -> dict[str, Any]:
        return {"sum": part.sum(), "pid": os.getpid(), "own_kb": _anonymous_kb()}

    def _anonymous_kb() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))

    with keras_mp.PoolDataset(parts, touch_all, batch_size=1, pool=pool) as dataset:
        assert max(int(batch["own_kb"][0]) for batch in dataset) < 48 * 1024


def test_a_memmap_is_opened_again_in_the_workers(pool: keras_mp.WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.arange(64 * 100, dtype=np.float32).reshape(64, 100))

    def look(row: Any) -> dict[str, Any]:
        with open("/proc/self/maps") as maps:
            mapped = any(str(path) in line for line in maps)
        return {"row": row, "mapped": mapped}

    source = np.load(path, mmap_mode="r")
    with keras_mp.PoolDataset(source[10:40:2], look, batch_size=4, pool=pool) as dataset:
        batches = list(dataset)
    np.testing.assert_array_equal(np.concatenate([batch["row"] for batch in batches]), source[10:40:2])
    assert all(batch["mapped"].all() for batch in batches)


class _Buffered:
    """Batches built in buffers of its own, from arrays of its own that it changes on the way."""

    def __init__(self, rows: int) -> None:
        self.data = np.ones((4, rows))
        self.buffer = np.empty((2, rows))

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        self.buffer[...] = self.data[index] * index
        self.data[index] = 1
        return self.buffer


@pytest.mark.parametrize("rows", [10, 300_000])
def test_code_may_write_to_what_it_holds(rows: int, pool: keras_mp.WorkerPool) -> None:
    source = _Buffered(rows)
    with keras_mp.parallelize(source, pool=pool) as dataset:
        for _ in range(2):
            for number, batch in enumerate(dataset):
                assert (batch == number).all()
    source.data[...] = 7  # nobody else's copy


def test_workers_cannot_change_the_source(pool: keras_mp.WorkerPool) -> None:
    def scribble(row: Any) -> Any:
        row += 1
        return row

    source = np.zeros((8, 300_000))
    with keras_mp.PoolDataset(source, scribble, batch_size=4, pool=pool) as dataset:
        for _ in range(3):
            assert all((batch == 1).all() for batch in dataset)
    assert not source.any()


def test_usable_cores_are_the_default() -> None:
    with keras_mp.WorkerPool() as pool:
        assert pool.workers == check_workers(None) <= len(os.sched_getaffinity(0))


def test_affinity_limits_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert check_workers(None) == 1


def test_slots_are_reused_and_given_back(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(np.zeros((256, 1000)), batch_size=2, pool=pool, max_queue_size=4) as dataset:
        for _ in range(3):
            for _batch in dataset:
                pass
        assert dataset.stats()["slots"] <= 4 + 2 + 8
        held = [dataset[batch] for batch in range(128)] + [dataset[batch] for batch in range(128)]
        assert dataset.stats()["slots"] >= 256 // 8  # up to eight small batches share one
        for number, batch in enumerate(held):
            batch[...] = number  # batches are writable, and each has memory of its own
        assert all((batch == number).all() for number, batch in enumerate(held))  # P6
        del held, _batch, batch
        gc.collect()
        for _batch in dataset:
            pass
        assert dataset.stats()["slots"] < 24


def test_many_samples_in_one_batch(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(np.arange(100_000), batch_size=50_000, shuffle=True, seed=1, pool=pool) as dataset:
        both = list(dataset)
    assert sorted(np.concatenate(both).tolist()) == list(range(100_000))


def test_a_long_header_and_many_buffers(pool: keras_mp.WorkerPool) -> None:
    """Strings as Python objects make a pickle longer than a socket holds; thousands of arrays as many places."""

    def build(value: float) -> Any:
        return value

    def collate(values: list[float]) -> Any:
        return {"text": ["x" * 1000 + str(v) for v in values], "parts": [np.full(3, k) for k in range(3000)]}

    with keras_mp.PoolDataset(np.arange(400.0), build, batch_size=200, collate=collate, pool=pool) as dataset:
        for number, batch in enumerate(dataset):
            assert batch["text"][7] == "x" * 1000 + str(np.float64(200 * number + 7))
            assert [int(part[0]) for part in batch["parts"]] == list(range(3000))


def test_keras_mp_empty_needs_no_copy(pool: keras_mp.WorkerPool) -> None:
    def collate(values: list[Any]) -> Any:
        made = keras_mp.empty((len(values), 1000), np.float32)
        made[...] = np.asarray(values)[:, None]
        return made, made[:, :16]

    with keras_mp.PoolDataset(np.arange(8.0), batch_size=4, collate=collate, pool=pool) as dataset:
        whole, part = dataset[0]
        assert whole.ctypes.data % 64 == 0
        assert (whole == np.arange(4.0)[:, None]).all()
        assert (part == np.arange(4.0)[:, None]).all()


def test_a_large_source_is_in_memory_once() -> None:
    """The dataset's own reference moves to the shared copy, so the array it was made from can go."""
    array = np.arange(1 << 20, dtype=np.int64).reshape(-1, 8)
    kept = weakref.ref(array)
    with keras_mp.PoolDataset(array, batch_size=64, workers=1) as dataset:
        del array
        before = dataset[0].copy()
        gc.collect()
        assert kept() is None
        again = dataset.shard(2, 1)
        np.testing.assert_array_equal(dataset[0], before)
        np.testing.assert_array_equal(again[0], np.arange(512, 1024).reshape(-1, 8))
        again.close()


def _is_zombie(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_ZOMBIE)


class _BlocksOnce:
    """Says that it is at its third sample, and stays there the first time."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __call__(self, value: int) -> int:
        if value == 2 and not self.place.exists():
            self.place.touch()
            threading.Event().wait()
        return value


def test_a_worker_that_died_idle_is_not_held_against_a_batch_that_killed_another(tmp_path: Path) -> None:
    """The batch is handed to the dead one before its end is known; it has not begun there."""
    dispatcher = Dispatcher(2, None, 1)
    warm = PoolClient(dispatcher, SampleLoader(range(8)), None, None)
    for job in warm.submit([Request(0, batch, range(4)) for batch in range(2)]):
        warm.result(job)
    assert eventually(lambda: len(dispatcher.describe()["pids"]) == 2)
    client = PoolClient(dispatcher, SampleLoader(range(8), _BlocksOnce(tmp_path / "there")), None, None)
    (job,) = client.submit([Request(0, 0, range(4))])
    assert eventually((tmp_path / "there").exists)
    with dispatcher.lock:
        busy, idle = sorted(dispatcher.workers.handles, key=lambda handle: not handle.jobs)
        for handle in (busy, idle):
            os.kill(handle.process.pid, signal.SIGKILL)
            process = psutil.Process(handle.process.pid)
            assert eventually(functools.partial(_is_zombie, process))
    assert client.result(job).batch.tolist() == [0, 1, 2, 3]
    client.close()
    warm.close()
    dispatcher.close()
