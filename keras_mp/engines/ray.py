"""Loading on Ray: `pool="ray"`, on the Ray that runs, or that is started here and then ended with its last dataset.

The package lies in Ray's object store, where every worker of a node maps the same memory; batches come back through it.
Ray runs the tasks of a worker that died again. Arrays in the store are read-only, so whatever is small in a package is
copied out of it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any

from keras_mp.engines import remote
from keras_mp.engines.backend import Load, Placed
from keras_mp.engines.package import Package
from keras_mp.errors import KerasMPError, PoolClosed, WorkerCrashed
from keras_mp.plan.request import Request

_MAX_RETRIES = 3  # of a task whose worker died, as often as Dask's
_LARGE_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 5.0
_SILENT_S = 15.0  # how long Ray's head may be out of reach

_lock = threading.Lock()
_users = 0  # datasets that use a Ray which was started here
_started = False


def check_installed() -> None:
    """Raises ImportError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("pool='ray' needs Ray; install it with: pip install 'keras-mp[ray]'")


@dataclasses.dataclass(frozen=True)
class InStore:
    """Place of a package in Ray's object store."""

    reference: Any
    is_held = True

    def open(self) -> Package:
        """The package; its large arrays are the store's own memory."""
        import ray

        package: Package = ray.get(self.reference)
        buffers = [buffer if buffer.nbytes >= _LARGE_BYTES else buffer.copy() for buffer in package.buffers]
        return dataclasses.replace(package, buffers=buffers)


class RayBackend:
    """Ray.

    Args:
        workers: how many CPUs a Ray that is started here may use.
    """

    name = "ray"
    pickles: bool | None = True

    def __init__(self, workers: int) -> None:
        import ray

        self._ends_ray = _start(workers)
        self._load = ray.remote(max_retries=_MAX_RETRIES)(remote.load)
        self._silent_since: float | None = None

    def submit(self, load: Load, request: Request) -> Future[Any]:
        import ray

        _, key, place = load.remotely
        if not ray.is_initialized():  # it would start another one
            raise _shut_down("a batch")
        task = self._load.remote(key, place, request)
        future: Future[Any] = Future()

        def finish(done: Future[Any]) -> None:
            try:
                if (error := done.exception()) is not None:
                    future.set_exception(error)
                else:
                    future.set_result(done.result())
            except InvalidStateError:  # cancelled meanwhile
                pass

        task.future().add_done_callback(finish)
        future.add_done_callback(lambda done: _give_up(task) if done.cancelled() else None)
        return future

    def put(self, package: Package) -> Placed:
        return _Put(package)

    def check(self, batch: str) -> None:
        import ray

        if not ray.is_initialized():
            raise _shut_down(batch)
        if _head_answers():
            self._silent_since = None
            return
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        if now - self._silent_since > _SILENT_S:
            raise WorkerCrashed(
                f"Ray's head, which was to have {batch} loaded, has not been within reach for {_SILENT_S:g} s; start "
                "Ray anew, and make a new dataset"
            )

    def explain(self, error: BaseException, batch: str) -> BaseException:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError) and isinstance(error.cause, KerasMPError):
            return error.cause
        if isinstance(error, RayTaskError):
            told: KerasMPError = KerasMPError(f"a Ray worker could not run the task that loads {batch}: {error}")
        elif isinstance(error, RayError):
            told = WorkerCrashed(
                f"{batch} cannot be loaded: a worker or node of Ray died (a task is tried again {_MAX_RETRIES} times): "
                f"{type(error).__name__}: {error}"
            )
        elif isinstance(error, PoolClosed):
            return _shut_down(batch)
        else:
            return error
        told.__cause__ = error
        return told

    def close(self) -> None:
        if self._ends_ray:
            self._ends_ray = False
            _end()


class _Put:
    """A package in Ray's object store."""

    def __init__(self, package: Package) -> None:
        import ray

        self.key = package.key
        self.place: Any = InStore(ray.put(package))

    def renewed(self, worker: str | None) -> None:
        pass  # Ray keeps it, or makes the task fail

    def close(self) -> None:
        self.place = None  # Ray lets go of what no reference stands for


def _start(workers: int) -> bool:
    """Starts Ray if it does not run; whether the caller must `_end` it again."""
    global _users, _started
    import ray

    with _lock:
        if not ray.is_initialized():
            if os.environ.get("RAY_ADDRESS"):  # of a cluster, which has its own number of CPUs
                ray.init()
            else:
                ray.init(num_cpus=workers, include_dashboard=False)
            _users, _started = 0, True
        _users += _started
        return _started


def _end() -> None:
    global _users, _started
    import ray

    with _lock:
        _users -= 1
        if _users == 0 and _started:
            _started = False
            ray.shutdown()


def _head_answers() -> bool:
    """Whether the port of Ray's head takes connections; True where its address is not to be had."""
    import ray

    try:
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    except Exception:  # a client of Ray's (ray://) has no such address
        return True
    return True


def _give_up(task: Any) -> None:
    import ray

    if ray.is_initialized():
        ray.cancel(task)


def _shut_down(batch: str) -> PoolClosed:
    return PoolClosed(
        f"Ray has been shut down, so {batch} cannot be loaded; call ray.shutdown() only when the dataset is not used "
        "any more"
    )
