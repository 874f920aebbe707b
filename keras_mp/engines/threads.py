"""Loading on threads of this process.

The threads are daemons: one that hangs in the user's code cannot be ended, and neither `close` nor the interpreter's
end waits for it longer than a moment (P3).
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import queue
import threading
import time
import weakref
from typing import Any

from keras_mp.engines.futures import FuturesEngine, Job
from keras_mp.engines.isolation import ThreadIsolation, ThreadLoader
from keras_mp.errors import PoolClosed, warn_user
from keras_mp.loading.base import Loader
from keras_mp.loading.per_worker import close_those_of_this_thread
from keras_mp.loading.stalls import STALL_S, describe_stall, stack_of

_JOIN_TIMEOUT_S = 2.0  # what the threads get to finish batches that nobody wants any more

_REMEDY = (
    "A thread cannot be ended; use_multiprocessing=True with timeout=seconds would have the worker replaced, and the "
    "batch run again."
)

_Queue = queue.SimpleQueue[tuple[Job, ThreadLoader] | None]


class ThreadsEngine(FuturesEngine):
    """Loads on threads of its own, which share the loader.

    Args:
        count: how many threads.
        loader: what loads the batches.
    """

    def __init__(self, count: int, loader: Loader) -> None:
        super().__init__()
        self._process = os.getpid()
        self._running: dict[int, Job] = {}  # by thread
        self._stall_is_told = False
        self._queue: _Queue = queue.SimpleQueue()
        self.update(loader)
        self._end_threads = weakref.finalize(self, _end_threads, self._isolation, self._queue, count)
        self._end_threads.atexit = False  # the dataset is closed there, which waits
        self._threads = [
            threading.Thread(target=_serve, args=(self._queue, self._running), daemon=True, name=f"keras_mp-loader-{n}")
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, job: Job) -> None:
        self._queue.put((job, self._loader))

    def result(self, handle: Job) -> Any:
        while not handle.done() and not self._stall_is_told:
            now = time.monotonic()
            if handle.since and now - handle.since >= STALL_S:
                self._tell_of_stall(handle, now)
            else:
                concurrent.futures.wait([handle], STALL_S - (now - handle.since if handle.since else 0.0))
        return super().result(handle)

    def _tell_of_stall(self, job: Job, now: float) -> None:
        """Warns, once, that a batch has stood at a sample for a minute."""
        self._stall_is_told = True
        samples, position = job.request.samples, job.position
        index = int(samples[position]) if 0 <= position < len(samples) else None
        thread = next((thread for thread, each in list(self._running.items()) if each is job), 0)
        warn_user(describe_stall(job.name, position, index, now - job.since, "a thread", _REMEDY, stack_of(thread)))

    def update(self, loader: Loader) -> None:
        self._loader = ThreadLoader(loader, self._isolation)

    def close(self) -> None:
        """Ends the threads too, and waits a moment for those that are at a batch."""
        if self._closed:
            return
        super().close()
        self._end_threads()
        if self._process != os.getpid():
            return
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [job.name for thread, job in list(self._running.items()) if thread != threading.get_ident()]
        if stuck:
            warn_user(
                f"keras_mp: {_JOIN_TIMEOUT_S:g} s after the dataset was closed, threads are still at "
                f"{', '.join(stuck)}. A thread cannot be ended, so they are left running; use_multiprocessing=True "
                "loads in processes, which can, and knows timeout=."
            )

    def stats(self) -> dict[str, Any]:
        return {"engine": "threads", "workers": len(self._threads)}

    def check_open(self) -> None:
        super().check_open()
        if self._process != os.getpid():
            raise PoolClosed(
                f"the dataset's threads are in process {self._process}, which made it, and this is a forked copy, "
                f"{os.getpid()}; make the dataset in the forked process, or give it workers=0"
            )


def _serve(jobs: _Queue, running: dict[int, Job]) -> None:
    """Runs in each thread. It knows nothing of its engine, so that an engine that is dropped can be collected."""
    thread = threading.get_ident()
    while (item := jobs.get()) is not None:
        job, loader = item
        running[thread] = job
        job.run(functools.partial(loader.load, report_position=job.report))
        del running[thread], item, job, loader  # a batch must not live on until the next one is requested
    close_those_of_this_thread()


def _end_threads(isolation: ThreadIsolation, jobs: _Queue, count: int) -> None:
    isolation.abandon()
    for _ in range(count):
        jobs.put(None)  # safe in a finaliser: it takes no lock of Python's
