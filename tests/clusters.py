"""Executors and clusters as users have them, started and ended."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from tests.census import eventually


@contextlib.contextmanager
def processes() -> Iterator[Any]:
    """The standard library's, by spawn: a process that runs TensorFlow is never forked."""
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@contextlib.contextmanager
def loky_processes() -> Iterator[Any]:
    """Loky's, whose workers are fresh interpreters."""
    import loky

    executor = loky.ProcessPoolExecutor(2, context=loky.backend.get_context("loky"))
    try:
        yield executor
    finally:
        executor.shutdown(kill_workers=True)


@contextlib.contextmanager
def dask_cluster(in_processes: bool = True) -> Iterator[Any]:
    """A client of two workers, which talk through TCP on loopback."""
    import dask
    import distributed

    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}):
        cluster = distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1 if in_processes else 2,
            processes=in_processes,
            protocol="tcp" if in_processes else None,
            dashboard_address=":0",
        )
        client = distributed.Client(cluster)
        try:
            yield client
        finally:
            client.close()
            cluster.close()


@contextlib.contextmanager
def dask_of_commands(folder: Path) -> Iterator[tuple[Any, int]]:
    """A client of one worker and a scheduler that are processes of their own, and the scheduler's process id."""
    import dask
    import distributed

    file = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli."]
    options = ["--scheduler-file", str(file), "--no-dashboard"]
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *more: str) -> None:
        started.append(
            subprocess.Popen(
                [*command[:-1], command[-1] + name, *options, *more],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}):
        try:
            start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
            assert eventually(file.exists, 60)
            start("dask_worker", "--nthreads", "2", "--no-nanny", "--death-timeout", "60")
            client = distributed.Client(scheduler_file=str(file), timeout="30s")
            try:
                client.wait_for_workers(1, timeout=60)
                yield client, started[0].pid
            finally:
                client.close()
        finally:
            for process in started:
                process.kill()
                process.wait()


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Ray with two CPUs."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    try:
        yield "ray"
    finally:
        ray.shutdown()


class Elsewhere(concurrent.futures.Executor):
    """Runs tasks in one process, where no other's memory can be opened."""

    def __init__(self) -> None:
        self._processes = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        return self._processes.submit(_without_proc, pickle.dumps((function, args, kwargs)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._processes.shutdown(wait, cancel_futures=cancel_futures)


def _without_proc(task: bytes) -> Any:
    import os

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise PermissionError(path)
        return opened(path, *arguments, **options)

    function, args, kwargs = pickle.loads(task)
    opened, os.open = os.open, refuse
    try:
        return function(*args, **kwargs)
    finally:
        os.open = opened


POOLS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "processes": processes,
    "loky": loky_processes,
    "dask": dask_cluster,
    "dask in this process": lambda: dask_cluster(in_processes=False),
    "ray": ray_cluster,
}

_HELPERS = ("resource_tracker",)  # of the standard library's and loky's, which end with this process


def of_this_process() -> list[str]:
    """The processes that are left of clusters."""
    left = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not any(name in line for name in _HELPERS):
                left.append(line)
    return left
