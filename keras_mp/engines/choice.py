"""Which engine a dataset's arguments ask for: `workers=`, `use_multiprocessing=`, `pool=` and `timeout=`."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import weakref
from typing import Any, Literal

import numpy as np

from keras_mp.checks import check_timeout, check_workers
from keras_mp.engines import ray
from keras_mp.engines.backend import Backend, ExecutorBackend
from keras_mp.engines.base import Engine
from keras_mp.engines.dask import DaskBackend, client_of
from keras_mp.engines.executor import ExecutorEngine
from keras_mp.engines.inline import InlineEngine
from keras_mp.engines.processes import WorkerPool, shared_pool
from keras_mp.engines.threads import ThreadsEngine
from keras_mp.errors import short_repr
from keras_mp.loading.base import Loader

# A Dask client too, whose type is known only where Dask is installed.
Pool = WorkerPool | concurrent.futures.Executor | Literal["keras", "ray"] | Any | None


@dataclasses.dataclass
class Running:
    """An engine at work; it lives only while batches are being loaded, and is never copied or pickled.

    Attributes:
        engine: where batches are loaded.
        loader: what loads them, with large arrays as they lie in shared memory.
        pool: the worker pool, which lives as long as somebody holds it.
    """

    engine: Engine
    loader: Loader
    pool: WorkerPool | None = None

    def close(self) -> None:
        """Closes the engine; if nobody else uses its pool, returns when the workers are gone."""
        self.engine.close()
        if self.pool is not None:
            pool, end = weakref.ref(self.pool), self.pool.end
            self.pool = None
            if pool() is None:
                end()


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """Checked arguments; `start` makes the engine.

    Attributes:
        workers: how many.
        use_multiprocessing: processes rather than threads.
        pool: as the user gave it.
        timeout_s: seconds that one batch may take in a worker process.
    """

    workers: int
    use_multiprocessing: bool
    pool: Pool
    timeout_s: float | None

    @classmethod
    def of(cls, workers: int | None, use_multiprocessing: bool, pool: Any, timeout: float | None) -> EngineChoice:
        """Checks a user's arguments.

        Raises:
            TypeError, ValueError: one is of the wrong kind or out of range, or two contradict each other.
        """
        is_pool = isinstance(pool, WorkerPool | concurrent.futures.Executor) or client_of(pool) is not None
        if not (pool is None or is_pool or (isinstance(pool, str) and pool in ("keras", "ray"))):
            raise TypeError(
                "pool must be None, 'keras', 'ray', a keras_mp.WorkerPool, a dask.distributed.Client or a "
                f"concurrent.futures.Executor, got {short_repr(pool, 80)}"
            )
        if isinstance(pool, str) and pool == "ray":
            ray.check_installed()
        if isinstance(pool, WorkerPool):
            if workers not in (None, pool.workers) or not use_multiprocessing:
                raise ValueError(
                    f"pool={pool!r} decides how batches are loaded, but workers={workers!r} and use_multiprocessing="
                    f"{use_multiprocessing!r} were given as well; leave them out"
                )
            workers = pool.workers
        if pool is not None and workers == 0:
            raise ValueError(f"workers=0 loads in-process, but pool={pool!r} was given as well; leave one of them out")
        return cls(check_workers(workers), use_multiprocessing, pool, check_timeout(timeout))

    @property
    def by_keras(self) -> bool:
        """Whether Keras's own pool asks for the batches, each in the process that it is asked in."""
        return isinstance(self.pool, str) and self.pool == "keras"

    @property
    def is_inline(self) -> bool:
        """Whether a batch is loaded by whoever asks for it, when it is asked for."""
        return self.by_keras or (self.pool is None and self.workers == 0)

    @property
    def shares_pool(self) -> bool:
        """Whether the workers are those that datasets share which are given no pool."""
        return self.pool is None and self.use_multiprocessing and self.workers > 0

    def without_pool(self) -> EngineChoice:
        """The same for a copy in another process, where the pool cannot be."""
        return self if self.by_keras else dataclasses.replace(self, pool=None)

    def start(self, loader: Loader) -> Running:
        """Makes the engine."""
        if (backend := self._backend()) is not None:
            return Running(ExecutorEngine(backend, loader), loader)
        if self.is_inline:
            return Running(InlineEngine(loader), loader)
        if self.pool is None and not self.use_multiprocessing:
            return Running(ThreadsEngine(self.workers, loader), loader)
        pool = self.pool if isinstance(self.pool, WorkerPool) else shared_pool(self.workers)
        engine = pool.client(loader, self.timeout_s)
        source = getattr(loader, "source", None)
        if type(source) is np.ndarray and (shared := engine.shared_view(source)) is not None:
            loader = copy.copy(loader)
            loader.source = shared  # the original may go, if the user does not keep it
            engine.update(loader)
        return Running(engine, loader, pool)

    def _backend(self) -> Backend | None:
        """The executor or cluster, if it is one that was given."""
        if client_of(self.pool) is not None:
            return DaskBackend(self.pool)
        if isinstance(self.pool, concurrent.futures.Executor):
            return ExecutorBackend(self.pool)
        return ray.RayBackend(self.workers) if isinstance(self.pool, str) and self.pool == "ray" else None

    def __str__(self) -> str:
        if not (self.pool is None or self.by_keras or isinstance(self.pool, WorkerPool)):
            return f"pool={self.pool if isinstance(self.pool, str) else type(self.pool).__name__}"
        if self.by_keras:
            kind = "(Keras's pool)"
        else:
            kind = "(in-process)" if self.is_inline else "processes" if self.use_multiprocessing else "threads"
        return f"workers={self.workers} {kind}"
