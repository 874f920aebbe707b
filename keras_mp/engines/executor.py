"""Loading on an executor or cluster of the user's, which keeps and ends its own workers.

Some executors run their tasks in this process and share the loader. Any other has it placed where each of its workers
finds it once (see `package`), and a task carries the request alone. Nobody needs to know which kind it is: a task that
is pickled is another one than a task that is not.

The consumer's threads and the backend's come here. A batch that a worker could not load for want of the loader, or that
was lost with a worker, is asked for again when it is wanted: until then it is not ready (P2, P3).
"""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy as np

from keras_mp.engines import remote
from keras_mp.engines.backend import Backend, Load
from keras_mp.engines.futures import FuturesEngine, Job
from keras_mp.engines.package import Bytes, NextKey, Package
from keras_mp.errors import KerasMPError, WorkerCrashed
from keras_mp.loading.base import Loaded, Loader
from keras_mp.memory.files import ALIGNMENT
from keras_mp.workers.messages import Failed, error_of

_CHECK_S = 2.0  # how often whoever waits for a batch looks whether anybody is left to load it
_MAX_ATTEMPTS = 4


class ExecutorEngine(FuturesEngine):
    """Loads on a backend.

    Args:
        backend: the executor or cluster; what is the user's own is left running by `close`.
        loader: what loads the batches.

    Raises:
        KerasMPError: the loader cannot be sent to the workers.
    """

    def __init__(self, backend: Backend, loader: Loader) -> None:
        super().__init__()
        self._backend = backend
        self._next_key = NextKey()
        self._load = Load(loader, self._isolation)
        self._digest: bytes | None = None
        self._futures: dict[Job, concurrent.futures.Future[Any]] = {}  # of jobs that have not ended
        self.update(loader)

    def start(self, job: Job) -> None:
        self._start(job, self._load)

    def cancel(self, handle: Job) -> None:
        super().cancel(handle)
        if (future := self._futures.pop(handle, None)) is not None:
            future.cancel()

    def is_ready(self, handle: Job) -> bool:
        if not handle.done() or handle.cancelled() or handle.exception() is not None:
            return handle.done()
        return isinstance(handle.result(), Loaded | remote.Batch | Failed)

    def wait(self, job: Job) -> Any:
        while not job.done():
            concurrent.futures.wait([job], _CHECK_S)
            if not job.done():
                try:
                    self._backend.check(job.name)
                except KerasMPError as error:
                    job.fail(error)  # unless it has ended meanwhile
        return job.result()

    def result(self, handle: Job) -> Loaded:
        job: Job = handle
        for _ in range(_MAX_ATTEMPTS):
            reply = super().result(job)
            if isinstance(reply, Loaded):
                return reply
            if isinstance(reply, remote.Batch):
                return _unpacked(reply)
            if isinstance(reply, Failed):
                raise error_of(reply)
            job = self._again(handle, reply.worker)
        raise WorkerCrashed(
            f"{job.name} was given to {self._backend.name} {_MAX_ATTEMPTS} times, and each time its worker, or what "
            "the worker loads with, was lost"
        )

    def update(self, loader: Loader) -> bool | None:
        """Where nothing has changed it costs the pickling, and a digest: a second and a half for 1 GiB of arrays."""
        placed, changed = None, None
        if self._backend.pickles is not False:
            try:
                package = Package.of(loader, self._next_key())
            except KerasMPError:
                if self._backend.pickles:
                    raise
                self._digest = None  # who knows whether it pickles
            else:
                placed, changed = self._load.placed, package.digest != self._digest
                if changed:
                    placed = self._backend.put(package)
                    self._digest = package.digest
        self._load = Load(loader, self._isolation, placed)
        return changed

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        while self._futures:
            self._futures.popitem()[1].cancel()
        if self._load.placed is not None:
            self._load.placed.close()
            remote.drop_closed()  # an executor may run pickled tasks in this process
        self._backend.close()

    def stats(self) -> dict[str, Any]:
        return {"engine": self._backend.name}

    def _start(self, job: Job, load: Load) -> None:
        job.load = load
        try:
            future = self._backend.submit(load, job.request)
        except Exception as error:  # each batch is told on its own, in its turn
            self._fail(job, error)
            return
        self._futures[job] = future
        future.add_done_callback(lambda done: self._end(job, done))

    def _again(self, handle: Job, worker: str | None) -> Job:
        """A new job for what `worker` could not load, or what was lost."""
        job = Job(handle.request)
        self._jobs.add(job)
        self.check_open()
        try:
            load = handle.load.renewed(worker)
        except Exception as error:
            self._fail(job, error)
        else:
            self._start(job, load)
        return job

    def _end(self, job: Job, future: concurrent.futures.Future[Any]) -> None:
        self._futures.pop(job, None)  # it refers to the job, and neither may keep a batch that is done with
        if future.cancelled():
            self._fail(job, concurrent.futures.CancelledError())
        elif (error := future.exception()) is not None:
            self._fail(job, error)
        else:
            job.finish(future.result())

    def _fail(self, job: Job, error: BaseException) -> None:
        told = self._backend.explain(error, job.name)
        if told is None:
            job.finish(remote.Missing())
        else:
            job.fail(told)


def _unpacked(batch: remote.Batch) -> Loaded:
    loaded = Loaded(None, batch.failures, batch.work, nbytes=batch.nbytes)
    return loaded._replace(batch=batch.unpack([_owned(buffer) for buffer in batch.buffers]))


def _owned(buffer: Bytes) -> Bytes:
    """The bytes where the caller may write, and TensorFlow need not copy them."""
    if buffer.flags.writeable and buffer.ctypes.data % ALIGNMENT == 0:
        return buffer
    memory = np.empty(buffer.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    owned = memory[start : start + buffer.nbytes]
    owned[:] = buffer
    return owned
