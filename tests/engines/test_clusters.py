"""Executors and clusters of the user's: the same data, placed once, and an end that comes (P2, P3, P4)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests import clusters
from tests.census import eventually
from tests.consumers import exported, fitted, iterated, seeded
from tests.shards import TOTAL, Numbers, assert_equal, stream
from tests.transforms import (
    Augmented,
    Counted,
    Deadly,
    Hangs,
    Kills,
    KillsOnce,
    Marked,
    fail_on_seven,
    process_facts,
    slow_where,
)

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("clusters"), pytest.mark.timeout(240)]

_SAMPLES, _BATCH = 40, 4
_POOLS = ["processes", "loky", "dask", "dask executor", "dask in this process", "ray"]
_REPLACING = ["dask", "dask executor", "ray"]  # those that go on when a worker has died


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[str], Any]]:
    """Pools by name, each started at its first use, and ended with the module."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Any] = {}

        def pool(name: str) -> Any:
            if name == "dask executor":
                return pool("dask").get_executor()
            if name not in started:
                started[name] = stack.enter_context(clusters.POOLS[name]())
            return started[name]

        yield pool
    assert eventually(lambda: not clusters.of_this_process())


def _digests(consume: Callable[[Any], Any], **options: Any) -> list[bytes]:
    return [batch.tobytes() for batch in seeded(consume, Augmented(), **options)]


@pytest.mark.parametrize("name", _POOLS)
def test_the_data_is_the_same_everywhere(name: str, pools: Callable[[str], Any]) -> None:  # P2
    expected = _digests(iterated, workers=0)
    for consume in (iterated, fitted, exported):
        assert _digests(consume, pool=pools(name)) == expected


@pytest.mark.parametrize("name", _REPLACING)
@pytest.mark.parametrize("consume", [fitted, exported])
def test_a_killed_worker_changes_nothing(
    name: str, consume: Callable[[Any], Any], pools: Callable[[str], Any], tmp_path: Path
) -> None:  # P2
    flag = tmp_path / "killed"

    def digests(**options: Any) -> list[bytes]:
        with keras_mp.PoolDataset(
            range(_SAMPLES), KillsOnce(flag), batch_size=_BATCH, shuffle=True, seed=11, **options
        ) as dataset:
            return [np.asarray(batch).tobytes() for batch in consume(dataset)]

    found = digests(pool=pools(name))
    assert flag.exists()
    assert found == digests(workers=0)


@pytest.mark.parametrize("name", ["loky", "dask", "dask in this process", "ray"])
def test_a_stream_is_the_same_everywhere(name: str, pools: Callable[[str], Any]) -> None:  # P1, P2
    with stream() as data:
        expected = [batch for _ in range(2) for batch in data]
    for options in ({}, {"length": TOTAL}):
        with stream(pool=pools(name), **options) as data:
            assert_equal([batch for _ in range(2) for batch in data], expected)
            assert data.count() == TOTAL


@pytest.mark.parametrize("name", _REPLACING)
def test_a_worker_that_is_killed_while_it_reads_changes_nothing(
    name: str, pools: Callable[[str], Any], tmp_path: Path
) -> None:  # P1, P2
    with stream() as data:
        expected = list(data)
    flag = tmp_path / "killed"
    with stream(Numbers(accident=(7, 17, "kill"), flag=flag), pool=pools(name)) as data:
        assert_equal(list(data), expected)
    assert flag.exists()


@pytest.mark.parametrize("name", ["processes", "loky", "dask", "ray"])
def test_the_source_is_unpickled_once_in_each_worker(name: str, pools: Callable[[str], Any], tmp_path: Path) -> None:
    source = Counted(tmp_path, 20_000_000)  # 160 MB
    with keras_mp.PoolDataset(source, batch_size=2, pool=pools(name)) as dataset:
        for _ in range(2):
            assert [int(batch[0, 0]) for batch in dataset] == list(range(0, 64, 2))
    marks = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert marks
    # On a busy machine Dask may hand a worker the source a second time; for each of 64 batches it does not.
    assert max(map(len, marks.values())) <= (2 if name == "dask" else 1)


@pytest.mark.parametrize("name", ["processes", "dask", "ray"])
def test_what_is_changed_between_epochs_reaches_the_workers(name: str, pools: Callable[[str], Any]) -> None:
    source = np.zeros((8, 2))
    with keras_mp.PoolDataset(source, batch_size=4, pool=pools(name)) as dataset:
        for value in (0.0, 1.0, 1.0, 2.0):
            source[:] = value
            assert {float(number) for batch in dataset for number in batch.ravel()} == {value}


@pytest.mark.parametrize("name", ["processes", "dask", "ray"])
def test_batches_can_be_written_to(name: str, pools: Callable[[str], Any]) -> None:
    with keras_mp.PoolDataset(np.ones((8, 1000)), batch_size=4, pool=pools(name)) as dataset:
        for batch in dataset:
            assert batch.ctypes.data % 64 == 0
            batch += 1
            assert batch.min() == 2


@pytest.mark.parametrize("name", _POOLS)
def test_an_error_names_sample_and_batch(name: str, pools: Callable[[str], Any]) -> None:
    with keras_mp.PoolDataset(range(16), fail_on_seven, batch_size=4, pool=pools(name)) as dataset:
        with pytest.raises(ValueError, match=r"sample 7 .*batch 1 of epoch 0") as caught:
            list(dataset)
    assert isinstance(caught.value, keras_mp.SampleError)


def test_nothing_stays_in_a_cluster_after_close(pools: Callable[[str], Any]) -> None:  # P4
    client = pools("dask")
    with keras_mp.PoolDataset(np.ones((64, 1000)), batch_size=2, pool=client) as dataset:
        next(iter(dataset))
        assert client.who_has()
    assert eventually(lambda: not client.who_has())


class _Weighing(concurrent.futures.Executor):
    """Runs tasks here, as they come out of a pickle, whose size it notes."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        task = pickle.dumps((fn, args, kwargs))
        self.bytes.append(len(task))
        function, arguments, options = pickle.loads(task)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments, **options))
        return future


def test_a_task_carries_the_request_alone() -> None:
    executor = _Weighing()
    with keras_mp.PoolDataset(np.ones((64, 1000)), batch_size=4, pool=executor) as dataset:
        assert len(list(dataset)) == 16
    assert len(executor.bytes) == 16
    assert max(executor.bytes) < 3000


@pytest.mark.parametrize("name", ["processes", "loky", "dask", "ray"])
def test_a_cache_in_memory_is_not_for_workers_elsewhere(name: str, pools: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"cache='ram' is memory .* pass a folder as cache=, or leave out pool="):
        keras_mp.PoolDataset(range(8), cache="ram", pool=pools(name))


@pytest.mark.parametrize("name", ["processes", "dask", "ray"])
def test_a_cache_in_a_folder_is_filled_by_all_workers(name: str, pools: Callable[[str], Any], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    for loaded in (16, 0):
        with keras_mp.PoolDataset(
            range(16), load=Marked(begun), batch_size=4, cache=tmp_path / "cache", cache_version=1, pool=pools(name)
        ) as dataset:
            assert np.concatenate(list(dataset)).tolist() == list(range(16))
        assert _begun(begun) == loaded
        for path in begun.iterdir():
            path.unlink()


# -- how much is asked for -------------------------------------------------------------------------------------------


def _begun(folder: Path) -> int:
    return len(list(folder.iterdir()))


@pytest.mark.parametrize("name", ["processes", "dask", "ray"])
def test_no_more_is_asked_for_than_may_be_in_flight(name: str, pools: Callable[[str], Any], tmp_path: Path) -> None:
    with keras_mp.PoolDataset(range(20), Marked(tmp_path), batch_size=1, pool=pools(name), max_queue_size=3) as dataset:
        for taken, batch in enumerate(itertools.islice(dataset, 10), 1):
            assert batch.tolist() == [taken - 1]
            assert eventually(functools.partial(lambda count: _begun(tmp_path) >= count, taken + 3), 60)
            assert _begun(tmp_path) == taken + 3


def _tasks_known_to(dask_worker: Any) -> int:
    return sum(str(key).startswith("load") for key in dask_worker.state.tasks)


@pytest.mark.parametrize("name", ["processes", "dask", "ray"])
def test_what_nobody_has_begun_is_dropped_with_the_loop(name: str, pools: Callable[[str], Any], tmp_path: Path) -> None:
    folder, gate, pool = tmp_path / "begun", tmp_path / "gate", pools(name)
    folder.mkdir()
    if name == "dask":
        pool.wait_for_workers(2, timeout=60)  # one may have been killed just now
    with (
        contextlib.ExitStack() as opened,
        keras_mp.PoolDataset(range(40), Marked(folder, gate), batch_size=1, pool=pool, max_queue_size=20) as dataset,
    ):
        opened.callback(gate.touch)  # whatever happens: the workers are those of other tests too
        batches = dataset.stream()
        assert next(batches)[0].tolist() == [0]
        assert eventually(lambda: _begun(folder) >= 3, 60)
        batches.close()
        if name == "dask":  # whose workers hear of it a moment later
            assert eventually(lambda: max(pool.run(_tasks_known_to).values()) == 1, 60)
        gate.touch()
        with keras_mp.PoolDataset(range(8), batch_size=1, pool=pool) as other:  # its turn comes after what was queued
            assert len(list(other)) == 8
        assert _begun(folder) <= 8  # of 21; a process pool has a few at its door


# -- workers that go and come ----------------------------------------------------------------------------------------


def _scale(client: Any, workers: int) -> None:
    client.cluster.scale(workers)
    assert eventually(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == workers, 60)


def test_workers_that_come_after_all_have_gone_get_the_source_anew(pools: Callable[[str], Any]) -> None:  # P2
    client, source = pools("dask"), np.arange(40.0)
    with keras_mp.PoolDataset(source, batch_size=2, pool=client, max_queue_size=3) as dataset:
        batches = iter(dataset)
        taken = [next(batches)]
        _scale(client, 0)
        _scale(client, 2)
        assert np.concatenate([*taken, *batches]).tolist() == source.tolist()


def _copies(dask_scheduler: Any) -> int:
    return sum(len(task.who_has) for key, task in dask_scheduler.tasks.items() if str(key).startswith("Package-"))


def test_workers_keep_the_source_over_a_pause_and_those_that_come_later_get_it(
    pools: Callable[[str], Any], tmp_path: Path
) -> None:
    client = pools("dask")
    client.wait_for_workers(2, timeout=60)
    source = Counted(tmp_path, 20_000_000)  # 160 MB
    with keras_mp.PoolDataset(source, slow_where, batch_size=2, pool=client, max_queue_size=8) as dataset:

        def all_load() -> bool:
            processes = set(np.unique(list(dataset)))  # of workers, or of those that they start beside themselves
            return all(pid in processes for pid in client.run(os.getpid).values())

        list(dataset)
        assert eventually(lambda: client.run_on_scheduler(_copies) == 1, 60)  # Dask drops what no task waits for
        assert all_load()
        assert {path.read_text() for path in tmp_path.iterdir()} == {"x"}  # none has unpickled it again
        _scale(client, 1)
        list(dataset)
        _scale(client, 2)
        list(dataset)  # in which the new worker is found not to have the source
        assert all_load()


def test_a_source_that_is_lost_and_was_changed_meanwhile_is_not_read_again(pools: Callable[[str], Any]) -> None:
    client, source = pools("dask"), np.arange(40.0)
    with keras_mp.PoolDataset(source, batch_size=2, pool=client, max_queue_size=3) as dataset:
        batches = iter(dataset)
        next(batches)
        source[:] = 0
        _scale(client, 0)
        _scale(client, 2)
        with pytest.raises(keras_mp.WorkerCrashed, match=r"batch \d+ of epoch 0 .*have been changed"):
            list(batches)


def test_a_cluster_that_stays_without_workers_is_an_error_that_names_the_batch(pools: Callable[[str], Any]) -> None:
    import dask

    client = pools("dask")
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        keras_mp.PoolDataset(range(40), batch_size=2, pool=client, max_queue_size=3) as dataset,
    ):  # P3
        batches = iter(dataset)
        next(batches)
        _scale(client, 0)
        with pytest.raises(keras_mp.WorkerCrashed, match=r"batch \d+ of epoch 0"):
            list(batches)
    _scale(client, 2)


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["processes", "loky"])
def test_an_executor_that_breaks_is_an_error_that_names_the_batch(name: str) -> None:  # P3
    with clusters.POOLS[name]() as pool:
        dataset = keras_mp.PoolDataset(range(16), Deadly(), batch_size=4, pool=pool, max_queue_size=1)
        with dataset, pytest.raises(keras_mp.WorkerCrashed, match=r"(?s)batch [12] of epoch 0.*new one") as caught:
            list(dataset)
        assert isinstance(caught.value.__cause__, concurrent.futures.BrokenExecutor)


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_sample_that_ends_one_worker_after_the_other(name: str, pools: Callable[[str], Any]) -> None:  # P3
    pool = pools(name)
    dataset = keras_mp.PoolDataset(range(16), Deadly(), batch_size=4, pool=pool, max_queue_size=1)
    with dataset, pytest.raises(keras_mp.WorkerCrashed, match=r"batch [12] of epoch 0"):
        list(dataset)


def test_a_dask_cluster_that_is_gone_is_an_error_that_names_the_batch(tmp_path: Path) -> None:  # P3
    with clusters.dask_cluster() as client:
        dataset = keras_mp.PoolDataset(range(16), Hangs(tmp_path / "x"), batch_size=4, pool=client, max_queue_size=1)
        with dataset:
            batches = iter(dataset)
            next(batches)
            assert eventually((tmp_path / "x").exists, 60)
            client.cluster.close()
            with pytest.raises(keras_mp.WorkerCrashed, match="batch 1 of epoch 0"):
                next(batches)


def test_fit_ends_with_an_error_that_names_the_batch_when_dasks_scheduler_is_killed(tmp_path: Path) -> None:  # P3
    with clusters.dask_of_commands(tmp_path) as (client, pid):
        with keras_mp.PoolDataset(range(40), Kills([pid]), batch_size=2, pool=client) as dataset:
            with pytest.raises(Exception, match=r"WorkerCrashed.*batch \d+ of epoch 0 .*Dask cluster .* is gone"):
                fitted(dataset)


def test_a_client_that_has_been_closed_is_an_error_that_names_the_batch() -> None:  # P3
    with clusters.dask_cluster() as client:
        with keras_mp.PoolDataset(range(16), batch_size=4, pool=client, max_queue_size=1) as dataset:
            batches = iter(dataset)
            next(batches)
            client.close()
            with pytest.raises(keras_mp.KerasMPError, match=r"batch \d of epoch 0"):
                list(batches)


@pytest.mark.parametrize("name", ["processes", "loky"])
def test_an_executor_that_has_been_shut_down(name: str) -> None:
    with clusters.POOLS[name]() as pool:
        pool.shutdown()
        with keras_mp.PoolDataset(range(4), batch_size=2, pool=pool) as dataset:
            with pytest.raises(keras_mp.PoolClosed, match=r"batch 0 of epoch 0.*keep it open"):
                list(dataset)


def test_an_executor_whose_processes_are_elsewhere_is_sent_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with clusters.Elsewhere() as pool, keras_mp.PoolDataset(np.arange(16), batch_size=4, pool=pool) as dataset:
        assert np.concatenate(list(dataset)).tolist() == list(range(16))
        assert np.concatenate(list(dataset)).tolist() == list(range(16))


def test_an_asynchronous_client_is_refused(pools: Callable[[str], Any]) -> None:
    import distributed

    async def refuse(address: str) -> None:
        async with distributed.Client(address, asynchronous=True) as client:
            with pytest.raises(ValueError, match="asynchronous=False"):
                keras_mp.PoolDataset(range(4), pool=client)

    asyncio.run(refuse(pools("dask").scheduler.address))


def test_worker_processes_import_no_keras(pools: Callable[[str], Any]) -> None:
    with keras_mp.PoolDataset(range(4), process_facts, batch_size=2, pool=pools("dask")) as dataset:
        assert {str(name) for batch in dataset for name in batch["heavy"]} == {""}


def test_a_ray_that_has_been_shut_down_is_an_error_that_names_the_batch(
    pools: Callable[[str], Any], tmp_path: Path
) -> None:  # P3; the last test, as it ends the Ray of them all
    import ray

    reached = tmp_path / "reached"
    with keras_mp.PoolDataset(range(16), Hangs(reached), batch_size=4, pool=pools("ray"), max_queue_size=1) as dataset:
        batches = iter(dataset)
        next(batches)
        assert eventually(reached.exists, 60)
        ray.shutdown()
        with pytest.raises(keras_mp.PoolClosed, match=r"batch 1 of epoch 0.*ray\.shutdown"):
            next(batches)
