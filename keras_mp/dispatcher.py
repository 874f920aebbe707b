"""The dispatcher: the parent's side of a worker pool, one thread that hands out jobs and watches the workers.

    consumer threads                    dispatcher thread                         worker processes
    ----------------                    -----------------                         ----------------
    submit(request) -> job  --queue-->  hands jobs to idle workers  --socket-->   load the batch INTO the slot
    job.take()  <--------- job's latch  reads replies, watches      <--socket--   reply: where it lies
      arrays alias the slot             exits, stops and deadlines

One socketpair a worker, and no lock or queue shared between processes, so a process that dies can take nothing with it:
its socket ends, the batch it was at is known, it alone is replaced, and that batch alone is run again (P3).
A batch that two workers died on is given up, and so is one that took too long twice. Whoever is killed, nothing is
left: sockets, lifelines and memory files have no name and end with their last holder (P4).

NOTE (finalisers take no lock): datasets and pools may be collected on any thread, also while it holds the pool's lock,
so finalisers only leave a note for the dispatcher and wake it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

from keras_mp import wire
from keras_mp.errors import BatchTimeout, PoolClosed, WorkerCrashed
from keras_mp.loading import Request
from keras_mp.spawn import Process, worker_environment
from keras_mp.task import Job, Task
from keras_mp.worker import Done, Failed, Run

_START_TIMEOUT_S = 120.0
_START_TRIES = 3
_EXIT_GRACE_S = 2.0
_STOPPED_GRACE_S = 5.0  # a terminal's Ctrl-Z stops parent and workers together; both go on within this
_TICK_S = 0.5
_JOIN_TIMEOUT_S = 10.0
_INLINE_SAMPLES = 512  # a longer list of samples travels in the slot, so that a socket is never full


class _Seat:
    """A worker process and what it is doing."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.frames = wire.FrameReader(process.sock)
        self.jobs: collections.deque[tuple[int, Job]] = collections.deque()
        self.head_since = 0.0
        self.stopped_since: float | None = None
        self.versions: dict[int, int] = {}
        self.slots: set[tuple[int, int]] = set()
        self.forget_tasks: list[int] = []
        self.ended_for = ""


class Dispatcher:
    """All state of a pool. Its thread holds it, and never the `WorkerPool`, so that can be collected."""

    def __init__(self, workers: int, env: Mapping[str, str] | None, worker_threads: int) -> None:
        self.workers = workers
        self.owner = os.getpid()
        self.restarts = 0
        self.notes: collections.deque[Task | None] = collections.deque()  # tasks to close; None: close the pool
        self._environment = worker_environment(env, worker_threads)
        self._lock = threading.Lock()
        self._queue: collections.deque[Job] = collections.deque()
        self._seats: list[_Seat] = []
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None
        self._ticking = False
        self._failed_starts = 0
        self._next_job = 0
        self._warned = False
        self.closed = False

    # -- called by consumers -------------------------------------------------------------------------------------

    def submit(self, task: Task, request: Request) -> Job:
        """Queues a request.

        Raises:
            PoolClosed: the pool or the task was closed, or this process is a fork of the pool's owner.
        """
        self.check_usable()
        job = Job(task, request)
        with self._lock:
            if self.closed or task.closed:
                raise PoolClosed("the dataset or its pool has been closed; make a new one")
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._dispatch, daemon=True, name="keras_mp-dispatcher")
                self._thread.start()
            self._pump()
            if not self._ticking:
                self.wake()
        return job

    def wait(self, job: Job) -> None:
        """Returns when the job has an answer.

        Raises:
            PoolClosed: there is nobody left to give one.
        """
        while not job.wait(_TICK_S):
            self.check_usable()
            if self._thread is None or not self._thread.is_alive():
                if job.wait(0):
                    return
                raise PoolClosed("the pool was closed while this batch was being loaded")

    def check_usable(self) -> None:
        """Raises PoolClosed in a forked copy of the owner: it has neither the dispatcher nor the sockets."""
        if os.getpid() != self.owner:
            raise PoolClosed(
                f"this pool belongs to process {self.owner} and cannot be used in its fork {os.getpid()}; make the "
                "dataset in the forked process, or give it workers=0"
            )

    def wake(self) -> None:
        """Makes the dispatcher look around. Takes no lock."""
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def close(self, wait: bool = True) -> None:
        """Ends all workers. With `wait`, returns when they are gone."""
        if os.getpid() != self.owner:
            return
        self.notes.append(None)
        self.wake()
        thread = self._thread
        if thread is None:
            self.closed = True
        elif wait and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT_S)

    def after_fork_in_child(self) -> None:
        """A forked copy lets go of everything: as long as it held a lifeline, workers would outlive their parent."""
        for seat in self._seats:
            seat.process.abandon()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def describe(self) -> dict[str, Any]:
        """Numbers for `stats()`."""
        with self._lock:
            return {
                "pids": [seat.process.pid for seat in self._seats],
                "restarts": self.restarts,
                "queued": len(self._queue),
                "running": sum(len(seat.jobs) for seat in self._seats),
            }

    # -- the dispatcher ------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        failure: BaseException | None = None
        try:
            while not self.closed:
                for key, _ in self._selector.select(_TICK_S if self._ticking else None):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_read.recv(4096)
                    else:
                        self._read(key.data)
                with self._lock:
                    self._read_notes()
                    if not self.closed:
                        self._watch()
                        self._pump()
                    self._ticking = bool(self._queue) or any(s.jobs or not s.process.ready for s in self._seats)
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._lock:
                self.closed = True
                self._end_all(failure)

    def _read(self, seat: _Seat) -> None:
        try:
            for message in seat.frames.frames():
                with self._lock:
                    if isinstance(message, Done | Failed):
                        self._answer(seat, message)
                    else:
                        seat.process.hello()
                        self._failed_starts = 0
                    self._pump()
        except EOFError:
            with self._lock:
                if seat in self._seats:
                    self._bury(seat)

    def _answer(self, seat: _Seat, reply: Done | Failed) -> None:
        _, job = seat.jobs.popleft()
        seat.head_since = time.monotonic()
        if isinstance(reply, Done):
            job.task.note_load(reply.load_s)
            if job.lease is not None and reply.slot_size is not None:
                job.lease.slot.size = reply.slot_size
            if reply.refused:
                self._warn_no_memory(reply.refused)
        job.finish(reply)

    def _pump(self) -> None:
        """Hands queued jobs to workers that have room, the idlest first, and starts workers that are missing."""
        while self._queue:
            job = self._queue[0]
            if job.cancelled or job.task.closed:
                self._queue.popleft()
                continue
            seat = min((s for s in self._seats if s.process.ready), key=lambda s: len(s.jobs), default=None)
            if seat is None or len(seat.jobs) >= job.task.depth:
                break
            self._queue.popleft()
            self._hand_over(seat, job)
        if self._queue and len(self._seats) < self.workers:
            self._start_missing()

    def _start_missing(self) -> None:
        while len(self._seats) < self.workers:
            try:
                seat = _Seat(Process(self._environment))
                self._selector.register(seat.process.sock, selectors.EVENT_READ, seat)
            except OSError as error:
                if self._seats:
                    return  # fewer workers than asked for still do the work
                self._give_up(
                    f"no worker process could be started: {error}. Received workers={self.workers}; lower it, or raise "
                    "the limit on processes or open files (ulimit -u, ulimit -n)."
                )
                return
            self._seats.append(seat)

    def _hand_over(self, seat: _Seat, job: Job) -> None:
        task = job.task
        number, self._next_job = self._next_job, self._next_job + 1
        if not seat.jobs:
            seat.head_since = time.monotonic()
        seat.jobs.append((number, job))
        dropped = task.arena.trim()
        for other in self._seats:
            other.slots.difference_update((task.number, slot) for slot in dropped)
        if job.lease is None:
            try:
                job.lease = task.arena.acquire()
            except OSError as error:
                self._warn_no_memory(str(error))
        try:
            if seat.versions.get(task.number) != task.version:
                load, fds = task.load_message()
                wire.send(seat.process.sock, load, fds)
                seat.versions[task.number] = task.version
            run, fds = self._run_message(seat, number, job, tuple(dropped))
            wire.send(seat.process.sock, run, fds)
        except OSError:  # it died, or does not read: the end of its socket will put the job back
            seat.process.kill()

    def _run_message(self, seat: _Seat, number: int, job: Job, dropped: tuple[int, ...]) -> tuple[Run, list[int]]:
        forget, seat.forget_tasks = tuple(seat.forget_tasks), []
        request: Request | int = job.request
        if job.lease is None:
            return Run(number, job.task.number, -1, None, request, forget, dropped), []
        slot = job.lease.slot
        if len(job.request.samples) > _INLINE_SAMPLES:
            data = pickle.dumps(job.request, protocol=5)
            slot.write(data)
            request = len(data)
        fds = []
        if (job.task.number, slot.number) not in seat.slots:
            seat.slots.add((job.task.number, slot.number))
            fds = [slot.fd]
        return Run(number, job.task.number, slot.number, slot.size, request, forget, dropped), fds

    # -- faults --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Ends workers that are past a deadline, or stopped; the end of their socket does the rest."""
        now = time.monotonic()
        for seat in self._seats:
            if seat.ended_for:
                continue
            if not seat.process.ready:
                if now - seat.process.started > _START_TIMEOUT_S:
                    seat.ended_for = "start"
            elif seat.jobs:
                timeout_s = seat.jobs[0][1].task.timeout_s
                if timeout_s is not None and now - seat.head_since > timeout_s:
                    seat.ended_for = f"took longer than timeout={timeout_s:g} s"
                elif not seat.process.is_stopped():
                    seat.stopped_since = None
                elif seat.stopped_since is None:
                    seat.stopped_since = now
                elif now - seat.stopped_since > _STOPPED_GRACE_S:
                    seat.ended_for = f"stood stopped (SIGSTOP) for {_STOPPED_GRACE_S:g} s"
            if seat.ended_for:
                seat.process.kill()

    def _bury(self, seat: _Seat) -> None:
        """A worker's socket has ended: remove it, and put back what it was doing."""
        self._selector.unregister(seat.process.sock)
        self._seats.remove(seat)
        stderr = seat.process.captured_stderr()
        seat.process.kill()
        ended = seat.process.reap()
        if not seat.process.ready:
            self._failed_starts += 1
            if (seat.process.exit_code or 0) >= 0 or self._failed_starts >= _START_TRIES:
                self._failed_starts = 0
                self._give_up(f"a worker process could not start ({ended}). It said:\n{stderr or '(nothing)'}")
            return
        self.restarts += 1
        jobs = [job for _, job in seat.jobs]
        if jobs and self._is_spent(jobs[0], seat, ended):
            jobs.pop(0)
        self._queue.extendleft(reversed(jobs))

    def _is_spent(self, job: Job, seat: _Seat, ended: str) -> bool:
        """Whether the job has now failed for good; then it is told so."""
        sample = job.sample_in_progress()
        at = "before its first sample" if sample is None else f"at sample {sample}"
        if seat.ended_for:
            job.timeouts += 1
            job.crashes.append(f"process {seat.process.pid} {seat.ended_for}, {at}")
            if job.timeouts < 2:
                return False
            text = f"{job.name} took too long in a worker, twice"
            advice = "Raise timeout=, or make the source and transform give up by themselves."
            job.fail(BatchTimeout(f"{text}: {'; '.join(job.crashes)}. {advice}"))
            return True
        if sample is None and job.lease is not None:
            return False  # it died while idle or before the batch: nothing speaks against the batch
        job.crashes.append(f"process {seat.process.pid} ended with {ended}, {at}")
        if len(job.crashes) - job.timeouts < 2:
            return False
        advice = (
            "Load that sample with workers=0 under a debugger; SIGKILL often means that memory ran out (dmesg), "
            "SIGSEGV a fault in compiled code, whose traceback is on stderr above."
        )
        job.fail(WorkerCrashed(f"{job.name} ended its worker twice: {'; '.join(job.crashes)}. {advice}"))
        return True

    def _give_up(self, text: str) -> None:
        """Fails every queued job; a later request tries afresh."""
        while self._queue:
            job = self._queue.popleft()
            if not job.cancelled:
                job.fail(WorkerCrashed(text))

    def _warn_no_memory(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"keras_mp: no shared memory for a batch ({reason}); sending batches through the socket, which is "
                "slower. Free memory or file descriptors, or lower batch_size or max_queue_size.",
                RuntimeWarning,
                stacklevel=2,
            )

    # -- ends ----------------------------------------------------------------------------------------------------

    def _read_notes(self) -> None:
        while self.notes:
            task = self.notes.popleft()
            if task is None:
                self.closed = True
                return
            self._close_task(task)

    def _close_task(self, task: Task) -> None:
        if task.closed:
            return
        task.close()
        for job in [job for job in self._queue if job.task is task]:
            self._queue.remove(job)
            job.fail(PoolClosed("the dataset was closed while this batch was waiting for a worker"))
        for seat in self._seats:
            seat.slots = {key for key in seat.slots if key[0] != task.number}
            if seat.versions.pop(task.number, None) is not None:
                seat.forget_tasks.append(task.number)

    def _end_all(self, failure: BaseException | None) -> None:
        reason = "the pool was closed" if failure is None else f"the pool's dispatcher failed: {failure!r}"
        for seat in self._seats:
            self._selector.unregister(seat.process.sock)
            seat.process.hang_up()
            if seat.jobs or not seat.process.ready:
                seat.process.kill()  # nobody wants its batch any more
        deadline = time.monotonic() + _EXIT_GRACE_S
        for seat in self._seats:
            seat.process.reap(max(0.0, deadline - time.monotonic()))
        jobs = [*self._queue, *(job for seat in self._seats for _, job in seat.jobs)]
        tasks = {job.task for job in jobs}
        self._seats, self._queue = [], collections.deque()
        for job in jobs:
            job.fail(PoolClosed(f"{reason} while {job.name} was being loaded"))
        for task in tasks:
            task.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
