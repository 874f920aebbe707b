"""Starts workers as there is work for them, and decides, by how the starts before went, whether to go on.

For the dispatcher's thread: `start_missing` takes its lock by itself, the other methods are called under it.
"""

from __future__ import annotations

import sys
import threading
import time

from keras_mp.workers.faults import WorkerEnd
from keras_mp.workers.job_queue import JobQueue
from keras_mp.workers.worker_set import WorkerSet

_TRIES = 3
_PATIENCE_S = 30.0  # for starts that somebody's SIGKILL ends, say the system's, short of memory
_PAUSE_S = 10.0  # before another try, while the workers that there are do the work


class Starts:
    """The starts of a pool's workers.

    Args:
        workers: the pool's.
        queue: what they are needed for; its jobs fail where none can be had.
        lock: the dispatcher's.
    """

    def __init__(self, workers: WorkerSet, queue: JobQueue, lock: threading.Lock) -> None:
        self._workers = workers
        self._queue = queue
        self._lock = lock
        self._failed = 0
        self._failing_since = 0.0
        self._pause_until = 0.0

    def start_missing(self) -> None:
        """Starts as many workers as there is work for."""
        while self._wants_worker():
            try:
                self._workers.start(self._lock)
            except OSError as error:
                with self._lock:
                    self._pause()
                    if not self._workers.handles:  # else those that there are do the work
                        self._queue.fail_all(
                            f"no worker process could be started: {error}. Received workers={self._workers.count}; "
                            "lower it, or raise the limit on processes or open files (ulimit -u, ulimit -n). "
                            f"sys.executable={sys.executable!r} must be a Python interpreter."
                        )
                return

    def _wants_worker(self) -> bool:
        if self._workers.is_full:
            return False
        with self._lock:
            starting = sum(not handle.process.ready for handle in self._workers.handles)
            is_pausing = time.monotonic() < self._pause_until
            return starting < len(self._queue) and not (self._workers.handles and is_pausing)

    def _pause(self) -> None:
        """It was of no use; the next try is for later."""
        self._pause_until = time.monotonic() + _PAUSE_S

    def add_success(self) -> None:
        """A worker is ready."""
        self._failed = 0

    def add_failure(self, end: WorkerEnd, said: str) -> None:
        """A worker ended before it was ready; if that shows that none can start, no job waits for one any longer.

        One exit of its own does, or three faults. A kill from outside says little, unless they go on for a while.

        Args:
            end: how it ended.
            said: what it wrote to its stderr.
        """
        now = time.monotonic()
        if not self._failed:
            self._failing_since = now
        self._failed += 1
        timed_out = end.cause == "late" and not end.was_stopped
        if end.is_from_outside:
            hopeless = now - self._failing_since > _PATIENCE_S
        else:
            # 0 is all that is known of an end where the program has the system reap its children (SIGCHLD ignored).
            hopeless = (end.exit_code or 0) > 0 or timed_out or self._failed >= _TRIES
        if not hopeless:
            return
        self._failed = 0
        self._pause()
        # While another is ending, too, its failure would be that of jobs which come after this answer.
        if not self._workers.handles and not self._workers.are_ending:
            self._queue.fail_all(f"a worker process could not start: it {end.text}. It said:\n{said or '(nothing)'}")
