"""Loading on a Dask cluster: `pool=Client`, or the executor that `client.get_executor()` gives.

The package is scattered to all workers once, and each keeps what it makes of it. It is no dependency of the tasks:
Dask drops all copies but one of what no task is waiting for (`ReduceReplicas` of its active memory manager), and gives
tasks to workers that have what they depend on, until others steal some. After each pause workers would be sent it and
unpack it anew, while one loads. A worker that has no copy says so, and gets one with a task that is meant for it.
Batches come back as the bytes of their arrays, straight from the worker where the client can reach it.

Dask runs the tasks of a worker that died again, and gives a task up that has ended more workers than
`distributed.scheduler.allowed-failures`. A package that went with the last worker is scattered anew. If its connection
to the scheduler ends, the client tries for `distributed.comm.timeouts.connect` to get it back; that long a scheduler
may be silent, or without a worker, too, before whoever waits for a batch is told (P3).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, NamedTuple, cast

from keras_mp.engines import remote
from keras_mp.engines.backend import Load, Placed, broken_or_shut_down
from keras_mp.engines.package import Key, Package
from keras_mp.errors import KerasMPError, WorkerCrashed
from keras_mp.plan.request import Request

_REACH_TIMEOUT_S = 2.0
_FIRST_WORKER_TIMEOUT_S = 60.0  # a cluster may be just starting
_POLL_S = 0.05
_WATCH_S = 2.0  # how often a worker asks whether the datasets that it has loaders of are still open


def client_of(pool: Any) -> Any:
    """The Dask client that `pool` is, or whose executor it is; None if it is neither. Imports nothing.

    Raises:
        ValueError: the client is an asynchronous one.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    client = _part_of(pool, distributed.Client) if _is_executor(pool) else pool
    if not isinstance(client, distributed.Client):
        return None
    if client.asynchronous:
        raise ValueError(
            "pool is an asynchronous Dask client, but batches are waited for on ordinary threads; make it with "
            "Client(..., asynchronous=False)"
        )
    return client


def _is_executor(pool: Any) -> bool:
    return isinstance(pool, sys.modules["distributed"].cfexecutor.ClientExecutor)


def _part_of(executor: Any, kind: type) -> Any:
    """The executor's client, or its options: it has no public names for them, and its own way to cancel logs errors."""
    return next((part for part in vars(executor).values() if isinstance(part, kind)), None)


class DaskBackend:
    """A Dask cluster.

    Args:
        pool: a client, or a client's executor, whose options (`workers=`, `resources=`) hold for the tasks.
    """

    pickles: bool | None = True

    def __init__(self, pool: Any) -> None:
        self._client = client_of(pool)
        self._options = {**((_part_of(pool, dict) or {}) if _is_executor(pool) else {}), "pure": False}
        self.name = "dask"
        self._direct = _reaches_workers(self._client)
        self._timeout_s = _timeout_s()
        self._alone_since: float | None = None  # when the scheduler was first found without a worker

    def submit(self, load: Load, request: Request) -> Future[Any]:
        _, key, place = load.remotely
        package, options = None, self._options
        if place.worker is not None:
            package, options = place.future, {**options, "workers": [place.worker], "allow_other_workers": True}
        task = self._client.submit(load_in_worker, key, place.future.key, request, package, **options)
        future: Future[Any] = Future()
        future.add_done_callback(lambda done: self._give_up(task) if done.cancelled() else None)
        self._client.loop.add_callback(self._gather, task, future)
        return future

    def put(self, package: Package) -> Placed:
        return _Scattered(self, package)

    def scatter(self, package: Package, again: bool = False) -> Any:
        """Sends the package to every worker; the future of it, for as long as which they keep it."""
        self._wait_for_scheduler()
        timeout_s = self._timeout_s if again else max(self._timeout_s, _FIRST_WORKER_TIMEOUT_S)
        try:
            return self._client.scatter(package, broadcast=True, hash=False, timeout=timeout_s)
        except Exception as error:
            raise WorkerCrashed(
                f"Dask has no worker that takes the dataset's source and functions: {type(error).__name__}: {error}\n"
                "Wait for workers first: client.wait_for_workers(1)"
            ) from error

    def check(self, batch: str) -> None:
        if self._client.status == "connecting":  # Dask itself sees to it that this ends
            return
        if self._client.status != "running":
            raise self._gone(batch)
        try:
            found = self._client.sync(self._client.scheduler.identity, n_workers=0, callback_timeout=self._timeout_s)
        except Exception as error:
            if self._client.status == "connecting":
                return
            raise self._gone(batch, f"its scheduler has not answered for {self._timeout_s:g} s ({error!r})") from error
        if found["n_workers"]:
            self._alone_since = None
            return
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since > self._timeout_s:
            raise self._gone(batch, f"it has had no worker for {self._timeout_s:g} s")

    def explain(self, error: BaseException, batch: str) -> BaseException | None:
        from distributed import KilledWorker

        if isinstance(error, CancelledError | asyncio.CancelledError):
            return None
        if isinstance(error, KilledWorker):
            killed = WorkerCrashed(
                f"{batch} was on one Dask worker after the other that died, so it is not tried again: {error}\nThe "
                "workers' logs say more; often a worker had too little memory. distributed.scheduler.allowed-failures "
                "is how many deaths are allowed for."
            )
            killed.__cause__ = error
            return killed
        if self._client.status != "running" and not isinstance(error, KerasMPError):
            return self._gone(batch)
        if isinstance(error, WorkerCrashed) and batch not in str(error):
            return WorkerCrashed(f"{batch} cannot be loaded: {error}")
        return broken_or_shut_down(error, batch, "Dask client")

    def close(self) -> None:
        pass  # the client is the user's

    def _wait_for_scheduler(self) -> None:
        """Waits while the client is connecting anew, which Dask gives up after its timeout."""
        deadline = time.monotonic() + self._timeout_s + _REACH_TIMEOUT_S
        while self._client.status == "connecting" and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if self._client.status != "running":
            raise self._gone("a batch")

    def _gone(self, batch: str, how: str = "the connection to its scheduler has ended") -> KerasMPError:
        return WorkerCrashed(
            f"the Dask cluster that was to load {batch} is gone: {how}; the client's status is "
            f"{self._client.status!r}. Make a new client, and a new dataset with pool=client."
        )

    async def _gather(self, task: Any, future: Future[Any]) -> None:
        """Runs in the client's event loop: brings the batch here as soon as it is loaded."""
        try:
            (reply,) = await self._client.gather([task], direct=self._direct, asynchronous=True)
        except (CancelledError, asyncio.CancelledError):
            future.cancel()
        except Exception as error:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                future.set_result(reply)

    def _give_up(self, task: Any) -> None:
        if self._client.status == "running":
            self._client.loop.add_callback(lambda: self._client.cancel([task], asynchronous=True))


class _Scattered:
    """A package in the memory of the cluster's workers, for as long as this refers to Dask's future of it."""

    def __init__(self, backend: DaskBackend, package: Package) -> None:
        self.key = package.key
        self.place: _Task | None = _Task(backend.scatter(package))
        self._backend = backend
        self._package = package
        self._lock = threading.Lock()

    def renewed(self, worker: str | None) -> _Task | None:
        with self._lock:
            if self.place is not None and self.place.future.status != "finished":
                if not self._package.is_unchanged:
                    raise WorkerCrashed(
                        "Dask has lost the dataset's source with its workers, and the arrays in it have been changed "
                        "since, so that what was read of it in this epoch cannot be read again"
                    )
                self.place = _Task(self._backend.scatter(self._package, again=True))
            return self.place and self.place._replace(worker=worker)

    def close(self) -> None:
        self.place = None  # Dask lets go of what no future stands for


class _Task(NamedTuple):
    """What a task is made with: Dask's future of the package, and the worker, if any, that gets it with the task."""

    future: Any
    worker: str | None = None


def load_in_worker(key: Key, name: str, request: Request, package: Package | None) -> Any:
    """Loads a batch in a worker of Dask's.

    Args:
        key: whose loader.
        name: Dask's key of the package.
        request: which batch.
        package: None: the worker has it, or says that it has not.
    """
    from distributed import get_worker

    reply = remote.load(key, InWorker(name, package), request)
    return remote.Missing(get_worker().address) if isinstance(reply, remote.Missing) else reply


@dataclasses.dataclass(frozen=True)
class InWorker:
    """Place of a package that came to a worker with the task, or that Dask may have put there."""

    name: str
    package: Package | None = dataclasses.field(repr=False)

    @property
    def is_held(self) -> bool:
        """Whether the scheduler has not let go of it, as it does when the dataset is closed or its client gone."""
        return self.name in _held

    def open(self) -> Package | None:
        """The package, if it is here."""
        from distributed import get_worker

        worker = get_worker()
        package = self.package or cast("Package | None", worker.data.get(self.name))
        if package is not None and self.name not in _held:
            _held.add(self.name)
            worker.loop.add_callback(_watch, worker, self.name)
        return package


_held: set[str] = set()  # the packages that loaders of this process were made of, as long as the scheduler has them


async def _watch(worker: Any, name: str) -> None:
    """Runs in a worker's event loop: lets go of what was made of a package when the scheduler has let go of that."""
    try:
        while (await worker.scheduler.who_has(keys=[name]))[name]:
            await asyncio.sleep(_WATCH_S)
    except OSError:  # the scheduler is gone, and the worker soon will be
        pass
    finally:
        _held.discard(name)
        remote.drop_closed()


def _timeout_s() -> float:
    import dask
    from dask.utils import parse_timedelta

    return float(parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"), default="s"))


def _reaches_workers(client: Any) -> bool:
    """Whether batches may come straight from the workers: the user's choice, or whether one can be connected to."""
    from distributed.comm.addressing import get_address_host_port

    if client.direct_to_workers is not None:
        return bool(client.direct_to_workers)
    workers = client.scheduler_info(n_workers=1)["workers"]
    try:
        with socket.create_connection(get_address_host_port(next(iter(workers))), _REACH_TIMEOUT_S):
            return True
    except (StopIteration, OSError, ValueError):
        return False
