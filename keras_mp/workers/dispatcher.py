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

NOTE (the lock is never held across a wait): consumers take it for every batch. What takes time happens on the
dispatcher's thread without it: starting a process, and seeing to its end. A process that not even SIGKILL ends is left
to itself, and so is the slot that it may write to.

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

from keras_mp.errors import KerasMPError, PoolClosed, WorkerCrashed
from keras_mp.memory.slots import Lease
from keras_mp.plan.request import Request
from keras_mp.workers.handle import EXIT_GRACE_S, Seat
from keras_mp.workers.jobs import Bundle, Job, Task
from keras_mp.workers.messages import Done, Forget, Reply, Run
from keras_mp.workers.process import KILL_GRACE_S, Process, worker_environment
from keras_mp.workers.starts import Starts

_TICK_S = 0.5
_EOF_GRACE_S = 1.0  # a process that ends closes its socket a moment earlier
_ENDING_TICK_S = 0.005  # between looks at a process that is ending
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
        self._tasks: set[Task] = set()
        self._queue: collections.deque[Job] = collections.deque()
        self._seats: list[Seat] = []
        self._ending: list[Seat] = []  # no more jobs for them; what they had is settled when they are gone
        self._starting = threading.Lock()  # held, before `_lock`, while a process is being started
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
            self._tasks.add(task)
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
            if self._lock.acquire(blocking=False):  # else the thread is being started, and will read the note
                try:
                    if self._thread is None and not self.closed:
                        self._let_go(None)
                finally:
                    self._lock.release()
        elif wait and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT_S)

    def before_fork(self) -> None:
        """Waits until no worker is half started, as its descriptors would stay open in the fork."""
        self._starting.acquire()
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Lets workers be started again."""
        self._lock.release()
        self._starting.release()

    def after_fork_in_child(self) -> None:
        """A forked copy lets go of everything: as long as it held a lifeline, workers would outlive their parent."""
        for seat in [*self._seats, *self._ending]:
            seat.writer.close()
            seat.process.abandon()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        self._lock.release()
        self._starting.release()

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
                patience_s = _ENDING_TICK_S if self._ending else _TICK_S if self._ticking else None
                for key, events in self._selector.select(patience_s):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_read.recv(4096)
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._flush(key.data)
                    if events & selectors.EVENT_READ:
                        self._read(key.data)
                gone: list[Seat] = []
                with self._lock:
                    self._read_notes()
                    if not self.closed:
                        gone = self._watch()
                        if self._ending:
                            self._settle()
                        self._pump()
                    now = time.monotonic()
                    if self._queue or any(not seat.is_idle for seat in self._seats):
                        self._busy_at = now
                    # On for a while: waking this thread for every batch would cost more than a look now and then.
                    # And as long as a consumer has batches: what it lets go of is given back.
                    self._ticking = now - self._busy_at < 4 * _TICK_S or any(task.arena.lent for task in self._tasks)
                for seat in gone:
                    self._read(seat, gone=True)
                self._start_missing()
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._lock:
                self._let_go(failure)
            self._end_workers()

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
                    self._remove(seat)

    def _answer(self, seat: Seat, reply: Reply) -> None:
        if not seat.bundles or seat.bundles[0].number != reply.number:  # user code has forked, and the fork answers too
            seat.broken = "answered out of turn (does the dataset's code fork?)"
            seat.process.kill()
            return
        bundle = seat.bundles.popleft()
        seat.head_since = time.monotonic()
        taken_over = self._take_over(bundle, reply.slot_size)
        if reply.slot_is_held and bundle.lease is not None:
            bundle.jobs[0].task.arena.retire(bundle.lease.slot)
        if not taken_over:
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
                if len(seat.bundles) < job.task.depth and seat.process.ready and seat.process.killed_at is None
            ]
            if not usable:
                break
            most = job.task.bundle_size
            if job.task.spreads:
                most = min(most, -(-len(self._queue) // len(usable)))
            self._hand_over(min(usable, key=lambda seat: len(seat.bundles)), most)

    def _start_missing(self) -> None:
        """Starts as many workers as there is work for; on the dispatcher's thread, where no Ctrl-C can come between."""
        while self._wants_worker():
            try:
                with self._starting:
                    process = Process(self._environment)
                    try:
                        with self._lock:
                            seat = Seat(process)
                            self._selector.register(process.sock, selectors.EVENT_READ, seat)
                            self._seats.append(seat)
                    except BaseException:
                        process.end()
                        raise
            except OSError as error:
                with self._lock:
                    self._starts.pause()
                    if not self._seats:  # else those that there are do the work
                        self._give_up(
                            f"no worker process could be started: {error}. Received workers={self.workers}; lower it, "
                            "or raise the limit on processes or open files (ulimit -u, ulimit -n). sys.executable="
                            f"{sys.executable!r} must be a Python interpreter."
                        )
                return

    def _wants_worker(self) -> bool:
        if len(self._seats) + len(self._ending) >= self.workers or self.closed:
            return False
        with self._lock:
            starting = sum(not seat.process.ready for seat in self._seats)
            return starting < len(self._queue) and not (self._seats and self._starts.pausing)

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
                self._send(seat, load, fds)
                seat.versions[task.number] = load.version
            run, fds = self._run_message(seat, bundle)
            self._send(seat, run, fds)
        except OSError:  # no descriptor for a slot, say; the end of its socket will put its jobs back
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
                self._send(seat, Forget(task.number, tuple(known)))

    def _send(self, seat: Seat, message: Any, fds: Sequence[int] = ()) -> None:
        """Sends to a worker, and never waits for it: what its socket has no room for goes when there is room."""
        try:
            if not seat.writer.send(message, fds):
                self._selector.modify(seat.process.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, seat)
                self.wake()
        except OSError:  # it died: the end of its socket will put its jobs back
            seat.process.kill()

    def _flush(self, seat: Seat) -> None:
        with self._lock:
            try:
                if seat in self._seats and seat.writer.flush():
                    self._selector.modify(seat.process.sock, selectors.EVENT_READ, seat)
            except OSError:  # as in `_send`
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
        for task in self._tasks:
            self._trim(task)
        gone = []
        for seat in self._seats:
            if seat.process.has_ended() or seat.survives(now):
                gone.append(seat)
            elif not seat.ended_for and (seat.jobs or not seat.process.ready):  # a bundle may be empty
                seat.ended_for = seat.missed_deadline(now)
                if seat.ended_for:
                    seat.ended_at = seat.current()
                    seat.process.kill()
        return gone

    def _remove(self, seat: Seat) -> None:
        """A worker's socket has ended, or no more is expected of it. It gets no more jobs; those it has wait."""
        self._selector.unregister(seat.process.sock)
        self._seats.remove(seat)
        self._ending.append(seat)
        seat.removed_at = time.monotonic()
        if seat.broken:
            seat.process.kill()

    def _settle(self) -> None:
        """Puts back what workers were doing that have ended, or that cannot be made to."""
        now = time.monotonic()
        for seat in list(self._ending):
            if seat.process.has_ended() or seat.survives(now):
                self._ending.remove(seat)
                self._put_back_jobs_of(seat)
            elif seat.process.killed_at is None and now - seat.removed_at > _EOF_GRACE_S:
                seat.broken = "closed its socket, but went on running"
                seat.process.kill()

    def _put_back_jobs_of(self, seat: Seat) -> None:
        seat.writer.close()
        stderr = seat.process.captured_stderr()
        ended = seat.process.settle()
        if seat.process.exit_code is None:
            for bundle in seat.bundles:
                if bundle.lease is not None:  # it may yet write there, should it ever go on
                    bundle.jobs[0].task.arena.retire(bundle.lease.slot)
        how = seat.ended_for or seat.broken or ended
        if seat.process.exit_code is None:
            how += ", and even SIGKILL did not end it"
        if not seat.process.ready:
            if self._starts.failed(seat) and not self._seats:
                self._give_up(f"a worker process could not start: it {how}. It said:\n{stderr or '(nothing)'}")
            return
        self.restarts += 1
        current = seat.current()
        if current is not None:
            seat.judge(current, how)
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
        self._tasks.discard(task)
        for job in [job for job in self._queue if job.task is task]:
            self._queue.remove(job)
            job.fail(PoolClosed("the dataset was closed while this batch was waiting for a worker"))
        for seat in self._seats:
            for job in seat.jobs:
                if job.task is task:  # its worker may finish it, for nobody
                    job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
            seat.slots = {key for key in seat.slots if key[0] != task.number}
            if seat.versions.pop(task.number, None) is not None:
                self._send(seat, Forget(task.number))

    def _let_go(self, failure: BaseException | None) -> None:
        """Nobody waits any longer for what will not come, and no slot is lent out any more."""
        self.closed = True
        reason = "the pool was closed" if failure is None else f"the pool's dispatcher failed: {failure!r}"
        self._selector.close()
        self._ending += self._seats  # they stay known, for a fork to let go of
        jobs = [*self._queue, *(job for seat in self._ending for job in seat.jobs)]
        tasks, self._tasks = {*self._tasks, *(job.task for job in jobs)}, set()
        tasks.update(task for task in self.notes if task is not None)
        self._seats, self._queue = [], collections.deque()
        for job in jobs:
            job.fail(PoolClosed(f"{reason} while {job.name} was being loaded"))
        for task in tasks:
            task.close()
        self.notes.clear()
        self._wake_read.close()
        self._wake_write.close()

    def _end_workers(self) -> None:
        """Waits until the workers are gone, or cannot be made to go."""
        with self._lock:  # also here and below: a fork must not see a descriptor half closed
            for seat in self._ending:
                seat.writer.close()
                seat.process.hang_up()
                if not seat.is_idle:
                    seat.process.kill()  # nobody wants its batch any more
        deadline = time.monotonic() + EXIT_GRACE_S
        for seat in self._ending:
            if seat.process.killed_at is None and not seat.process.ends_by(deadline):
                seat.process.kill()
        deadline = time.monotonic() + KILL_GRACE_S
        for seat in self._ending:
            seat.process.ends_by(deadline)
        with self._lock:
            for seat in self._ending:
                seat.process.settle()
            self._ending = []
