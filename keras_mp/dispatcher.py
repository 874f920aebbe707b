"""The dispatcher: the parent's side of a worker pool, one thread that hands out jobs and watches the workers.

    consumer threads                    dispatcher thread                         worker processes
    ----------------                    -----------------                         ----------------
    submit(request) -> job  --queue-->  hands jobs to idle workers  --socket-->   load the batch INTO the slot
    job.take()  <--------- job's latch  reads replies, watches      <--socket--   reply: where it lies
      arrays alias the slot             exits, stops and deadlines

Jobs for small batches go to a worker in bundles: one message, one slot and one reply for all of them. Of a bundle that
goes wrong every job is handed out again, alone.

One socketpair a worker, and no lock or queue shared between processes, so a process that dies can take nothing with it:
its socket ends, the batch it was at is known, it alone is replaced, and its batches alone are run again (P3). What a
worker's end says of its batches is decided in `seat`. Whoever is killed, nothing is left: sockets, lifelines and memory
files have no name and end with their last holder (P4).

NOTE (finalisers take no lock): datasets and pools may be collected on any thread, also while it holds the pool's lock,
so finalisers only leave a note for the dispatcher and wake it.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import pickle
import selectors
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from keras_mp import wire
from keras_mp.arena import Lease
from keras_mp.errors import KerasMPError, PoolClosed, WorkerCrashed
from keras_mp.loading import Request
from keras_mp.messages import Done, Forget, Reply, Run
from keras_mp.seat import EXIT_GRACE_S, Seat
from keras_mp.spawn import Process, worker_environment
from keras_mp.starts import Starts
from keras_mp.task import Bundle, Job, Task

_TICK_S = 0.5
_EOF_GRACE_S = 1.0  # a process that ends closes its socket a moment earlier
_SEND_TIMEOUT_S = 10.0
_JOIN_TIMEOUT_S = 10.0
_INLINE_SAMPLES = 512  # a longer list of samples travels in the slot, so that a socket is never full


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
        self._seats: list[Seat] = []
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
        self._thread: threading.Thread | None = None
        self._ticking = False
        self._busy_at = 0.0
        self._watched_at = 0.0
        self._starts = Starts()
        self._next_number = 0
        self._warned = False
        self._warning = ""
        self.closed = False

    # -- called by consumers -------------------------------------------------------------------------------------

    def submit(self, task: Task, requests: Sequence[Request]) -> list[Job]:
        """Queues requests.

        Raises:
            PoolClosed: the pool or the task was closed, or this process is a fork of the pool's owner.
        """
        self.check_usable()
        jobs = [Job(task, request) for request in requests]
        with self._lock:
            if self.closed or task.closed:
                raise PoolClosed("the dataset or its pool has been closed; make a new one")
            self._queue.extend(jobs)
            if self._thread is None:
                thread = threading.Thread(target=self._dispatch, daemon=True, name="keras_mp-dispatcher")
                thread.start()
                self._thread = thread
            self._pump()
            if not self._ticking or (self._queue and len(self._seats) < self.workers):
                self.wake()
        return jobs

    def wait(self, job: Job) -> None:
        """Returns when the job has an answer.

        Raises:
            PoolClosed: there is nobody left to give one.
        """
        while not job.wait(_TICK_S):
            self.check_usable()
            if self._thread is None or not self._thread.is_alive():
                if job.wait(0):
                    break
                raise PoolClosed("the pool was closed while this batch was being loaded")
        # Here and not where it is found: there a lock is held, and a warning may be an exception or run user code.
        text, self._warning = self._warning, ""
        if text:
            warnings.warn(text, RuntimeWarning, stacklevel=2)

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
            if self._lock.acquire(blocking=False):
                try:
                    if self._thread is None and not self.closed:
                        self.closed = True
                        self._end_all(None)
                finally:
                    self._lock.release()
        elif wait and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT_S)

    def before_fork(self) -> None:
        """Waits until no worker is half started, as its descriptors would stay open in the fork."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Goes on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """A forked copy lets go of everything: as long as it held a lifeline, workers would outlive their parent."""
        for seat in self._seats:
            seat.process.abandon()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        self._lock.release()

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
                gone: list[Seat] = []
                with self._lock:
                    self._read_notes()
                    if not self.closed:
                        gone = self._watch()
                        self._pump()
                        self._start_missing()
                    now = time.monotonic()
                    if self._queue or any(s.bundles or not s.process.ready for s in self._seats):
                        self._busy_at = now
                    # On for a while: waking this thread for every batch would cost more than a look now and then.
                    self._ticking = now - self._busy_at < 4 * _TICK_S
                for seat in gone:
                    self._read(seat, gone=True)
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._lock:
                self.closed = True
                self._end_all(failure)

    def _read(self, seat: Seat, gone: bool = False) -> None:
        messages = seat.frames.frames()
        while True:
            try:
                message = next(messages, None)
            except EOFError:
                gone = True
                break
            except Exception as error:  # no memory for it, or not of our making
                seat.broken = f"sent a reply that could not be read ({error!r})"
                gone = True
                break
            if message is None:
                break
            with self._lock:
                if isinstance(message, Reply):
                    self._answer(seat, message)
                else:
                    seat.process.hello()
                    self._starts.succeeded()
                self._pump()
        if gone:
            with self._lock:
                if seat in self._seats:
                    self._bury(seat)
                self._pump()

    def _answer(self, seat: Seat, reply: Reply) -> None:
        if not seat.bundles or seat.bundles[0].number != reply.number:  # user code has forked, and the fork answers too
            seat.broken = "answered out of turn (does the dataset's code fork?)"
            seat.process.kill()
            return
        bundle = seat.bundles.popleft()
        seat.head_since = time.monotonic()
        if not self._take_over(bundle, reply.slot_size):
            return
        for job, batch in zip(bundle.jobs, reply.batches, strict=False):
            if isinstance(batch, Done):
                job.task.note_load(batch.load_s, batch.nbytes)
                if batch.refused:
                    self._warn_no_memory(batch.refused)
            job.finish(batch)
        self._put_back(bundle.jobs[len(reply.batches) :])

    def _take_over(self, bundle: Bundle, size: int | None) -> bool:
        """Maps what the worker has added to the slot: now, as it may be closed before its batches are taken."""
        if bundle.lease is None or size is None or all(job.done for job in bundle.jobs):
            return True
        bundle.lease.slot.size = size
        try:
            bundle.lease.remap()
            return True
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # a mapping takes a descriptor: do without
                self._warn_no_memory(str(error))
                for job in bundle.jobs:
                    job.by_socket = True
                self._put_back(bundle.jobs)
                return False
            for job in bundle.jobs:
                job.fail(
                    KerasMPError(
                        f"{job.name} is ready, but its {size} bytes could not be mapped: {error}. Raise the limit on "
                        "address space (ulimit -v), or lower batch_size or max_queue_size."
                    )
                )
            return False

    def _put_back(self, jobs: Sequence[Job]) -> None:
        for job in reversed(jobs):
            if not job.done:
                job.lease, job.alone = None, True
                self._queue.appendleft(job)

    def _pump(self) -> None:
        """Hands queued jobs to workers that have room, the idlest first."""
        while self._queue:
            job = self._queue[0]
            if job.task.closed:
                job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
            if job.cancelled or job.done:
                self._queue.popleft()
                continue
            usable = [
                seat
                for seat in self._seats
                if len(seat.bundles) < job.task.depth and seat.process.ready and not (seat.ended_for or seat.broken)
            ]
            if not usable:
                break
            most = job.task.bundle_size
            if job.task.spreads:
                most = min(most, -(-len(self._queue) // len(usable)))
            self._hand_over(min(usable, key=lambda seat: len(seat.bundles)), most)

    def _start_missing(self) -> None:
        """Starts as many workers as there is work for; on the dispatcher's thread, where no Ctrl-C can come between."""
        starting = sum(not seat.process.ready for seat in self._seats)
        while len(self._seats) < self.workers and starting < len(self._queue):
            if self._seats and self._starts.pausing:
                return
            try:
                process = Process(self._environment)
                try:
                    seat = Seat(process)
                    self._selector.register(process.sock, selectors.EVENT_READ, seat)
                    self._seats.append(seat)
                except BaseException:
                    process.reap()
                    raise
            except OSError as error:
                self._starts.pause()
                if self._seats:
                    return  # fewer workers than asked for still do the work
                self._give_up(
                    f"no worker process could be started: {error}. Received workers={self.workers}; lower it, or raise "
                    f"the limit on processes or open files (ulimit -u, ulimit -n). sys.executable={sys.executable!r} "
                    "must be a Python interpreter."
                )
                return
            starting += 1

    def _hand_over(self, seat: Seat, most: int) -> None:
        """Gives a worker the next job, and those after it that may go with it, `most` in all."""
        if not seat.bundles:
            seat.head_since = time.monotonic()
        bundle = Bundle(self._next_number)
        self._next_number += 1
        seat.bundles.append(bundle)  # empty as yet: should Ctrl-C come from here on, no job is lost
        try:
            self._fill(bundle, most)
            task = bundle.jobs[0].task
            self._trim(task)
            if seat.versions.get(task.number) != task.version:
                load, fds = task.load_message()
                wire.send(seat.process.sock, load, fds)
                seat.versions[task.number] = load.version
            run, fds = self._run_message(seat, bundle)
            if bundle.lease is None:
                seat.process.sock.settimeout(_SEND_TIMEOUT_S)  # a long request may fill the socket
            try:
                wire.send(seat.process.sock, run, fds)
            finally:
                if bundle.lease is None:
                    seat.process.sock.setblocking(False)
        except OSError:  # it died, or does not read: the end of its socket will put its jobs back
            seat.process.kill()
        except BaseException:  # Ctrl-C in a consumer: the worker may have half a message
            seat.process.kill()
            raise

    def _fill(self, bundle: Bundle, most: int) -> None:
        """Moves jobs from the queue to the bundle, and finds them a slot."""
        jobs = bundle.jobs
        jobs.append(self._queue.popleft())
        task = jobs[0].task
        while len(jobs) < most and self._queue and not jobs[0].alone:
            job = self._queue[0]
            if job.task is not task or job.alone or job.cancelled:
                break
            jobs.append(self._queue.popleft())
        if not jobs[0].by_socket:
            try:
                bundle.lease = task.arena.acquire()
            except OSError as error:
                self._warn_no_memory(str(error))
        for place, job in enumerate(jobs):
            job.lease, job.place = bundle.lease, place

    def _trim(self, task: Task) -> None:
        dropped = task.arena.trim()
        for seat in self._seats if dropped else ():
            known = [slot for slot in dropped if (task.number, slot) in seat.slots]
            if known:
                seat.slots.difference_update((task.number, slot) for slot in known)
                self._tell(seat, Forget(task.number, tuple(known)))

    def _tell(self, seat: Seat, message: Forget) -> None:
        try:
            wire.send(seat.process.sock, message)
        except OSError:  # as in `_hand_over`
            seat.process.kill()

    def _run_message(self, seat: Seat, bundle: Bundle) -> tuple[Run, list[int]]:
        task, lease = bundle.jobs[0].task, bundle.lease
        requests: list[Request] | int = [job.request for job in bundle.jobs]
        if lease is None:
            return Run(bundle.number, task.number, -1, None, requests), []
        if sum(len(job.request.samples) for job in bundle.jobs) > _INLINE_SAMPLES:
            try:
                requests = self._write(requests, lease)
            except OSError as error:
                self._warn_no_memory(str(error))
                bundle.lease = None
                for job in bundle.jobs:
                    job.lease = None
                return Run(bundle.number, task.number, -1, None, requests), []
        slot, fds = lease.slot, []
        if (task.number, slot.number) not in seat.slots:
            seat.slots.add((task.number, slot.number))
            fds = [slot.fd]
        return Run(bundle.number, task.number, slot.number, slot.size, requests), fds

    @staticmethod
    def _write(requests: Any, lease: Lease) -> int:
        data = pickle.dumps(requests, protocol=5)
        lease.slot.write(data)
        lease.remap()
        return len(data)

    # -- faults --------------------------------------------------------------------------------------------------

    def _watch(self) -> list[Seat]:
        """Ends workers that are past a deadline, or stopped; the end of their socket does the rest.

        Returns:
            Workers that have ended though their socket has not: a child of theirs may hold it.
        """
        now = time.monotonic()
        if now - self._watched_at < _TICK_S / 2:
            return []
        self._watched_at = now
        gone = []
        for seat in self._seats:
            if seat.process.has_ended():
                gone.append(seat)
            elif not seat.ended_for and (seat.jobs or not seat.process.ready):  # a bundle may be empty
                seat.ended_for = seat.missed_deadline(now)
                if seat.ended_for:
                    seat.ended_at = seat.current()
                    seat.process.kill()
        return gone

    def _bury(self, seat: Seat) -> None:
        """A worker's socket has ended: remove it, and put back what it was doing."""
        self._selector.unregister(seat.process.sock)
        self._seats.remove(seat)
        stderr = seat.process.captured_stderr()
        if not seat.ended_for and not seat.broken and not seat.process.has_ended(_EOF_GRACE_S):
            seat.broken = "closed its socket, but went on running"
        ended = seat.process.reap()
        if not seat.process.ready:
            if self._starts.failed(seat) and not self._seats:
                how = seat.ended_for or seat.broken or ended
                self._give_up(f"a worker process could not start ({how}). It said:\n{stderr or '(nothing)'}")
            return
        self.restarts += 1
        current = seat.current()
        if current is not None:
            seat.judge(current, seat.broken or f"ended with {ended}")
        self._put_back(seat.jobs)

    def _give_up(self, text: str) -> None:
        """Fails every queued job; a later request tries afresh."""
        while self._queue:
            job = self._queue.popleft()
            if not job.cancelled:
                job.fail(WorkerCrashed(text))

    def _warn_no_memory(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            self._warning = (
                f"keras_mp: no shared memory for a batch ({reason}); sending batches through the socket, which is "
                "slower. Free memory or file descriptors, or lower batch_size or max_queue_size."
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
            for job in seat.jobs:
                if job.task is task:  # its worker may finish it, for nobody
                    job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
            seat.slots = {key for key in seat.slots if key[0] != task.number}
            if seat.versions.pop(task.number, None) is not None:
                self._tell(seat, Forget(task.number))

    def _end_all(self, failure: BaseException | None) -> None:
        reason = "the pool was closed" if failure is None else f"the pool's dispatcher failed: {failure!r}"
        self._selector.close()
        for seat in self._seats:
            seat.process.hang_up()
            if seat.bundles or not seat.process.ready:
                seat.process.kill()  # nobody wants its batch any more
        deadline = time.monotonic() + EXIT_GRACE_S
        for seat in self._seats:
            seat.process.reap(max(0.0, deadline - time.monotonic()))
        jobs = [*self._queue, *(job for seat in self._seats for job in seat.jobs)]
        tasks = {job.task for job in jobs}
        self._seats, self._queue = [], collections.deque()
        for job in jobs:
            job.fail(PoolClosed(f"{reason} while {job.name} was being loaded"))
        tasks.update(task for task in self.notes if task is not None)
        for task in tasks:
            task.close()
        self.notes.clear()
        self._wake_read.close()
        self._wake_write.close()
