"""Which engine a dataset's arguments ask for: `workers=`, `use_multiprocessing=`, `pool=` and `timeout=`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import weakref
from typing import Any, Literal

from keras_mp.checks import available_memory, check_count_or_none, check_timeout, check_workers
from keras_mp.engines import ray
from keras_mp.engines.backend import Backend, ExecutorBackend
from keras_mp.engines.base import Engine
from keras_mp.engines.dask import DaskBackend, client_of
from keras_mp.engines.executor import ExecutorEngine
from keras_mp.engines.inline import InlineEngine
from keras_mp.engines.processes import WorkerPool, shared_pool
from keras_mp.engines.readahead import NONE_AHEAD, Limit
from keras_mp.engines.threads import ThreadsEngine
from keras_mp.errors import short_repr, warn_user
from keras_mp.loading.base import Loader
from keras_mp.loading.recording import Recorder
from keras_mp.memory.system import missing_for_workers

_LEAST_IN_FLIGHT = 10
_BUNDLES_IN_FLIGHT = 4  # so of batches that travel eight at a time there may be more than ten

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
        self.loader.close()
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
        max_queue_size, max_queue_bytes: as the user gave them; see `limit`.
        is_auto: whether the number of workers is what a search begins with.
    """

    workers: int
    use_multiprocessing: bool
    pool: Pool
    timeout_s: float | None
    max_queue_size: int | None = None
    max_queue_bytes: int | None = None
    is_auto: bool = False

    @classmethod
    def of(
        cls,
        workers: int | Literal["auto"] | None,
        use_multiprocessing: bool,
        pool: Any,
        timeout: float | None,
        max_queue_size: int | None,
        max_queue_bytes: int | None,
    ) -> EngineChoice:
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
        is_auto = workers == "auto"
        if isinstance(workers, str) and workers != "auto":
            raise TypeError(f"workers must be an int, None or 'auto', got {workers!r}")
        if is_auto and (pool is not None or not use_multiprocessing):
            raise ValueError(
                f"workers='auto' is for worker processes of the dataset's own, but pool={pool!r} and "
                f"use_multiprocessing={use_multiprocessing!r} were given; leave them out, or give workers= a number"
            )
        count = check_workers(None if workers == "auto" else workers)
        if pool is None and use_multiprocessing and count and (missing := missing_for_workers()):
            _warn_of_threads(missing)
            use_multiprocessing = is_auto = False
        return cls(
            count,
            use_multiprocessing,
            pool,
            check_timeout(timeout),
            check_count_or_none(max_queue_size, "max_queue_size"),
            check_count_or_none(max_queue_bytes, "max_queue_bytes"),
            is_auto,
        )

    @property
    def by_keras(self) -> bool:
        """Whether Keras's own pool asks for the batches, each in the process that it is asked in."""
        return isinstance(self.pool, str) and self.pool == "keras"

    @property
    def is_inline(self) -> bool:
        """Whether a batch is loaded by whoever asks for it, when it is asked for."""
        return self.by_keras or (self.pool is None and self.workers == 0)

    @property
    def queue_size(self) -> int:
        """Batches in flight at most; where the user gives no number, enough to keep all workers busy."""
        return self.max_queue_size or max(_LEAST_IN_FLIGHT, 2 * self.workers)

    def limit(self) -> Limit:
        """How much may be in flight, by the memory that is available now, unless the user says it."""
        if self.is_inline:
            return NONE_AHEAD
        nbytes = self.max_queue_bytes or available_memory() // 4
        bundles = 0 if self.max_queue_size else _BUNDLES_IN_FLIGHT
        return Limit(self.queue_size, max(2, self.workers), nbytes, bundles)

    @property
    def shares_pool(self) -> bool:
        """Whether the workers are those that datasets share which are given no pool."""
        return self.pool is None and self.use_multiprocessing and self.workers > 0

    @property
    def shares_memory(self) -> bool:
        """Whether all that load a dataset can share memory of this process."""
        return self.pool is None or isinstance(self.pool, WorkerPool | concurrent.futures.ThreadPoolExecutor)

    def without_pool(self) -> EngineChoice:
        """The same for a copy in another process, where the pool cannot be."""
        return self if self.by_keras else dataclasses.replace(self, pool=None)

    def with_workers(self, workers: int | None) -> EngineChoice:
        """The same, with so many workers of its own: no pool of the user's or Keras's."""
        return dataclasses.replace(self, workers=check_workers(workers), pool=None, is_auto=False)

    def with_timeout(self, timeout: float | None) -> EngineChoice:
        """The same, with another `timeout`, if one is given."""
        return self if timeout is None else dataclasses.replace(self, timeout_s=check_timeout(timeout))

    def start(self, loader: Loader, recorder: Recorder | None = None) -> Running:
        """Makes the engine. What happens to its workers goes to `recorder`; of batches, it comes with them."""
        loader.open()
        try:
            return self._start(loader, recorder)
        except BaseException:
            loader.close()
            raise

    def _start(self, loader: Loader, recorder: Recorder | None) -> Running:
        if (backend := self._backend()) is not None:
            return Running(ExecutorEngine(backend, loader), loader)
        if self.is_inline:
            return Running(InlineEngine(loader), loader)
        if self.pool is None and not self.use_multiprocessing:
            return Running(ThreadsEngine(self.workers, loader), loader)
        if self.is_auto:
            pool = WorkerPool(self.workers)
        else:
            pool = self.pool if isinstance(self.pool, WorkerPool) else shared_pool(self.workers)
        engine = pool.client(loader, self.timeout_s, recorder, tuned=self.is_auto)
        shared = loader.sharing(engine.shared_view)
        if shared is not loader:  # the original arrays may go, if the user does not keep them
            engine.update(shared)
        return Running(engine, shared, pool)

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
        return f"workers={self.workers} {kind}{', found by itself' if self.is_auto else ''}"


@functools.cache  # it is said once, not for each dataset
def _warn_of_threads(missing: str) -> None:
    warn_user(
        f"keras_mp: worker processes cannot run here, as {missing}. Threads load the batches in their place: the data "
        "is the same, but Python code runs on one core at a time, and timeout= has no effect. Pass a "
        "concurrent.futures.ProcessPoolExecutor or a Dask client as pool= for processes, or use_multiprocessing=False "
        "to have threads without this warning."
    )
