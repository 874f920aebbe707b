"""The workers of a pool: how many there are to be, which are there, starting or ending, and which of them have said
something.

The dispatcher calls this under its lock, but for what waits: `wait`, `start` and `end_all` are for its thread alone,
which does not hold the lock then. Which job a worker gets, and what its end means for a job, is not known here.
"""

from __future__ import annotations

import collections
import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keras_mp.workers.faults import WorkerEnd
from keras_mp.workers.handle import EXIT_GRACE_S, WorkerHandle
from keras_mp.workers.process import KILL_GRACE_S, Process, worker_environment
from keras_mp.workers.shared_loader import SharedLoader

_log = logging.getLogger("keras_mp")

_LOOK_S = 0.25  # between looks at deadlines


class WorkerSet:
    """Handles of a pool's workers, and the selector that says which of them has sent something.

    Attributes:
        count: how many there may be.
        restarts: how many have ended that others took the place of.
        handles: of those that may be given jobs, or are starting.
        starting: held, before the dispatcher's lock, while a process is being started: a fork in between would inherit
            what keeps it alive.
    """

    def __init__(self, count: int, env: Mapping[str, str] | None, worker_threads: int) -> None:
        self.count = count
        self.handles: list[WorkerHandle] = []
        self.starting = threading.Lock()
        self._ending: list[WorkerHandle] = []  # no more jobs for them; what they had is settled when they are gone
        self._environment = worker_environment(env, worker_threads)
        self._looked_at = 0.0
        self.restarts = self._timeouts = 0
        self._ends: collections.deque[str] = collections.deque()
        self._ended_busy_s = self._ended_ready_s = 0.0  # of those that have ended
        self._wake_read, self._wake_write = socket.socketpair()
        try:
            self._selector = selectors.DefaultSelector()
        except OSError:
            self._wake_read.close()
            self._wake_write.close()
            raise
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    @property
    def are_ending(self) -> bool:
        """Whether any of them is being waited for."""
        return bool(self._ending)

    @property
    def ready(self) -> int:
        """How many have started."""
        return sum(handle.process.ready for handle in list(self.handles))

    def record_end(self, pid: int, end: WorkerEnd) -> None:
        """Counts a worker whose place another one takes."""
        self.restarts += 1
        self._timeouts += end.cause == "late"
        self._ends.append(f"worker process {pid} {end.text}; another takes its place")

    def log_ends(self) -> None:
        """Logs what `record_end` was told. Not under a lock, as a handler of the user's may wait."""
        while self._ends:
            _log.info(self._ends.popleft())

    def describe(self) -> dict[str, Any]:
        """Numbers for `stats()`."""
        handles = self.handles
        return {
            "workers": self.count,
            "pids": tuple(handle.process.pid for handle in handles),
            "busy_s": tuple(handle.busy_s for handle in handles),
            "ready_s": tuple(handle.ready_s for handle in handles),
            "pool_busy_s": self._ended_busy_s + sum(handle.busy_s for handle in handles),
            "pool_ready_s": self._ended_ready_s + sum(handle.ready_s for handle in handles),
            "restarts": self.restarts,
            "timeouts": self._timeouts,
            "running": sum(len(handle.jobs) for handle in handles),
        }

    @property
    def is_full(self) -> bool:
        """Whether there are as many as there may be, those included that are ending."""
        return len(self.handles) + len(self._ending) >= self.count

    # -- what they send, and what is sent ------------------------------------------------------------------------

    def wake(self) -> None:
        """Ends a `wait`. Takes no lock."""
        try:
            self._wake_write.send(b"x")
        except OSError:  # it is full, and so `wait` will end; or closed
            pass

    def wait(self, patience_s: float | None) -> list[tuple[WorkerHandle, int]]:
        """Waits until workers have sent something or have room; those, and which of the two (selectors.EVENT_...)."""
        events = []
        for key, mask in self._selector.select(patience_s):
            if key.data is not None:
                events.append((key.data, mask))
                continue
            try:
                self._wake_read.recv(4096)
            except BlockingIOError:
                pass
        return events

    def watch_room(self, handle: WorkerHandle) -> None:
        """Has `wait` look for room on a worker's socket, where something is waiting for that."""
        if handle.has_unsent and handle in self.handles:
            self._selector.modify(handle.process.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, handle)

    def flush(self, handle: WorkerHandle) -> None:
        """Sends a worker what there is room for now."""
        if handle in self.handles:
            handle.flush()
            if not handle.has_unsent:
                self._selector.modify(handle.process.sock, selectors.EVENT_READ, handle)

    def trim(self, loader: SharedLoader) -> None:
        """Gives back slots of the loader that are not likely to be needed, here and in the workers."""
        dropped = loader.slots.trim()
        for handle in self.handles if dropped else ():
            handle.forget_slots(loader, dropped)
            self.watch_room(handle)

    def forget(self, loader: SharedLoader) -> None:
        """The loader will not be used again."""
        for handle in self.handles:
            handle.forget(loader)
            self.watch_room(handle)

    # -- starts --------------------------------------------------------------------------------------------------

    def start(self, lock: threading.Lock) -> None:
        """Starts a worker. On the dispatcher's thread, where no Ctrl-C can come between.

        Args:
            lock: the dispatcher's, which is not held while the process starts.

        Raises:
            OSError: no process or descriptor is to be had, or there is no such interpreter.
        """
        with self.starting:
            process = Process(self._environment)
            try:
                with lock:
                    handle = WorkerHandle(process)
                    self._selector.register(process.sock, selectors.EVENT_READ, handle)
                    self.handles.append(handle)
            except BaseException:
                process.end()
                raise

    # -- ends ----------------------------------------------------------------------------------------------------

    def look_around(self, loaders: Iterable[SharedLoader]) -> list[WorkerHandle]:
        """Now and then gives back slots, and ends workers that are past a deadline, or stopped.

        Returns:
            Workers that have ended though their socket has not: a child of theirs may hold it.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return []
        self._looked_at = now
        for loader in loaders:
            self.trim(loader)
        gone = []
        for handle in self.handles:
            if handle.is_gone(now):
                gone.append(handle)
            else:
                handle.check_deadline(now)
                handle.stalls.check(handle.process, handle.current, now)
        return gone

    def shrink(self) -> None:
        """Ends workers that are too many, as soon as they have nothing to do."""
        for number, handle in enumerate(list(self.handles)):
            handle.is_surplus = number >= self.count
            if handle.is_surplus and handle.is_idle:
                self.remove(handle)
                handle.process.hang_up()

    def remove(self, handle: WorkerHandle) -> None:
        """A worker's socket has ended, or no more is expected of it. It gets no more jobs; those it has wait."""
        if handle in self.handles:
            self._selector.unregister(handle.process.sock)
            self.handles.remove(handle)
            self._ended_busy_s += handle.busy_s
            self._ended_ready_s += handle.ready_s
            self._ending.append(handle)
            handle.remove()

    def ended(self) -> Iterator[WorkerHandle]:
        """Yields, once, those removed ones that have ended, or that cannot be made to end."""
        now = time.monotonic()
        for handle in list(self._ending):
            if handle.is_gone(now):
                self._ending.remove(handle)
                yield handle
            else:
                handle.check_removed(now)

    def remove_all(self) -> list[WorkerHandle]:
        """Gives none of them jobs any more, and hears none; returns those that may have some."""
        self._ending += self.handles  # they stay known, for a fork to let go of
        self.handles = []
        self._close_descriptors()
        return list(self._ending)

    def end_all(self, lock: threading.Lock) -> None:
        """Waits until the removed workers are gone, or cannot be made to go; `lock` is the dispatcher's."""
        with lock:  # also here and below: a fork must not see a descriptor half closed
            for handle in self._ending:
                handle.drop_unsent()
                handle.process.hang_up()
                if not handle.is_idle:
                    handle.process.kill()  # nobody wants its batch any more
        deadline = time.monotonic() + EXIT_GRACE_S
        for handle in self._ending:
            if handle.process.killed_at is None and not handle.process.ends_by(deadline):
                handle.process.kill()
        deadline = time.monotonic() + KILL_GRACE_S
        for handle in self._ending:
            handle.process.ends_by(deadline)
        with lock:
            for handle in self._ending:
                handle.process.settle()
            self._ending = []

    def abandon(self) -> None:
        """Lets go of every descriptor, in a fork: as long as it held a lifeline, workers would outlive their parent."""
        for handle in [*self.handles, *self._ending]:
            handle.drop_unsent()
            handle.process.abandon()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
