"""What an executor or cluster must be able to do for `ExecutorEngine`; any `concurrent.futures.Executor` does it."""

from __future__ import annotations

import functools
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol

from keras_mp.engines import remote
from keras_mp.engines.isolation import ThreadIsolation, ThreadLoader
from keras_mp.engines.package import InTask, Key, MemoryFile, Nowhere, Package, Place
from keras_mp.errors import KerasMPError, PoolClosed, WorkerCrashed
from keras_mp.loading.base import Loaded, Loader
from keras_mp.memory import pickling
from keras_mp.memory.system import missing_for_workers
from keras_mp.plan.request import Request


class Placed(Protocol):
    """A package where workers find it, until this is closed or nobody refers to it any more."""

    key: Key

    @property
    def place(self) -> Any:
        """What a task is given in order to get at it: a `Place`, or what the backend makes one of."""

    def renewed(self, worker: str | None) -> Any:
        """What a task is given whose worker has not got at it before; None: the place, which has been seen to.

        Args:
            worker: who that was, if it has said so.

        Raises:
            Exception: there is no place any more; `Backend.explain` says why.
        """

    def close(self) -> None:
        """Gives it up, also for tasks that have not ended."""


class Load:
    """What is run for a request: `load(request)`. What it is pickled to works in another process too.

    Args:
        loader: what loads the batch.
        isolation: of the threads of this process.
        placed: the loader as other processes get it; None: they cannot.
        place: where this task's worker finds it, if that is not where the others do.
    """

    def __init__(
        self, loader: Loader, isolation: ThreadIsolation, placed: Placed | None = None, place: Any = None
    ) -> None:
        self.placed = placed
        self._place = place
        self._loader = loader
        self._isolation = isolation
        self._in_threads = ThreadLoader(loader, isolation)

    @property
    def remotely(self) -> tuple[Any, ...]:
        """Function and arguments, but for the request, that load in another process.

        Raises:
            KerasMPError: the loader cannot be sent there.
        """
        if self.placed is None:
            pickling.dump_user_object(self._loader, "dataset")
            raise KerasMPError("the executor is one of threads, which need no pickle")
        return remote.load, self.placed.key, self.placed.place if self._place is None else self._place

    def renewed(self, worker: str | None) -> Load:
        """The same for a task whose worker has not got at the loader before."""
        place = None if self.placed is None else self.placed.renewed(worker)
        return Load(self._loader, self._isolation, self.placed, place)

    def __call__(self, request: Request) -> Loaded:
        return self._in_threads.load(request)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, self.remotely


class Backend(Protocol):
    """Where tasks run. Any thread may call any method.

    Attributes:
        name: in words, for messages.
        pickles: whether a task is pickled; None: that is not known.
    """

    name: str
    pickles: bool | None

    def submit(self, load: Load, request: Request) -> Future[Any]:
        """Starts a task. Cancelling its future gives it up, without waiting for anything."""

    def put(self, package: Package) -> Placed:
        """Makes a package known to the workers; has read all of it when it returns."""

    def check(self, batch: str) -> None:
        """Called now and then while somebody waits for `batch` (P3).

        Raises:
            WorkerCrashed, PoolClosed: nothing is there any more that could load it.
        """

    def explain(self, error: BaseException, batch: str) -> BaseException | None:
        """What the user is told where the task of `batch` ended with an error that is not of the user's code.

        None: it was lost, and had better be tried again.
        """

    def close(self) -> None:
        """Lets go of what was started for this dataset alone."""


class ExecutorBackend:
    """An executor of the user's. Its workers, if they are processes, open a memory file of this one."""

    def __init__(self, executor: Executor) -> None:
        self.name = type(executor).__name__
        self.pickles = False if isinstance(executor, ThreadPoolExecutor) else None
        self._executor = executor

    def submit(self, load: Load, request: Request) -> Future[Any]:
        return self._executor.submit(load, request)

    def put(self, package: Package) -> Placed:
        return _InTasks(package) if missing_for_workers() else _InMemoryFile(package)

    def check(self, batch: str) -> None:
        pass  # there is no question that could be asked: it ends its futures itself when its workers are gone

    def explain(self, error: BaseException, batch: str) -> BaseException:
        return broken_or_shut_down(error, batch, self.name)

    def close(self) -> None:
        pass


class _InMemoryFile:
    def __init__(self, package: Package) -> None:
        self.key = package.key
        self._file = MemoryFile(package)
        self.place = self._file.place

    def renewed(self, worker: str | None) -> Place:
        return InTask(self._file.package())

    def close(self) -> None:
        self._file.close()


class _InTasks:
    """Where there are no memory files: a worker says that it lacks the package, and gets it with the task."""

    place = Nowhere()

    def __init__(self, package: Package) -> None:
        self.key = package.key
        self._package = package.copied()

    def renewed(self, worker: str | None) -> Place:
        return InTask(self._package)

    def close(self) -> None:
        pass


def broken_or_shut_down(error: BaseException, batch: str, name: str) -> BaseException:
    """The error for a batch of an executor that is broken, or has been shut down; any other stays as it is."""
    if isinstance(error, BrokenExecutor):
        broken: KerasMPError = WorkerCrashed(
            f"a worker of the {name} that was given as pool= died, so {batch} cannot be loaded: "
            f"{type(error).__name__}: {error}\nAn executor that has lost a worker is broken as a whole: make a new one "
            "and a new dataset. Worker processes of keras_mp's own (pool=None) are replaced instead, and the batch is "
            "loaded again."
        )
        broken.__cause__ = error
        return broken
    is_shut_down = isinstance(error, RuntimeError) and "shutdown" in str(error)
    if is_shut_down or isinstance(error, CancelledError):
        closed = PoolClosed(
            f"the {name} that was given as pool= has been shut down, or has cancelled {batch}; keep it open as long as "
            "the dataset is in use"
        )
        closed.__cause__ = error
        return closed
    return error
