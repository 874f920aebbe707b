"""The dispatcher: the parent's side of a worker pool, one thread that hands out jobs and watches the workers.

    consumer threads                    dispatcher thread                         worker processes
    ----------------                    -----------------                         ----------------
    client: request -> job   --queue--> hands jobs to idle workers  --socket-->   load the batch INTO the slot
    job.take()  <--------- job's latch  reads replies, watches      <--socket--   reply: where it lies
      arrays alias the slot             exits, stops and deadlines

Jobs for small batches go to a worker in bundles: one message, one slot and one reply for all of them. Of a bundle that
goes wrong every job is handed out again, alone. A batch that the system refuses memory for fails, and nothing else
does.

P3 *No hang.* One socketpair a worker, and no lock or queue shared between processes, so a process that dies can take
nothing with it: its socket ends, the batch it was at is known, it alone is replaced, and its batches alone are run
again. Every worker that has something to do has a deadline or is watched. A process that not even SIGKILL ends is left
to itself, and so is the slot that it may write to (P6).

P4 *No leak.* Sockets, lifelines and memory files have no name and end with their last holder, whoever is killed.

Who may do what: the dispatcher's thread alone starts workers, reads from them and sees to their end. Consumers add to
the queue and, under the lock, hand jobs out too: waking a thread for every batch would cost more than the batch.

NOTE (the lock is never held across a wait): consumers take it for every batch. What takes time happens on the
dispatcher's thread without it: starting a process, and seeing to its end.

NOTE (finalisers take no lock): datasets and pools may be collected on any thread, also while it holds the pool's lock,
so finalisers only put what is to be closed in a deque, and wake the dispatcher.
"""

from __future__ import annotations

import collections
import os
import selectors
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from keras_mp.errors import PoolClosed
from keras_mp.workers import timeline
from keras_mp.workers.handle import WorkerHandle
from keras_mp.workers.job_queue import JobQueue
from keras_mp.workers.jobs import Job
from keras_mp.workers.messages import Done, Refused, Reply
from keras_mp.workers.shared_loader import SharedLoader
from keras_mp.workers.starts import Starts
from keras_mp.workers.verdict import record_end
from keras_mp.workers.waiting import Patience
from keras_mp.workers.worker_set import WorkerSet

_TICK_S = 0.5
_ENDING_TICK_S = 0.005  # between looks at a process that is ending
_JOIN_TIMEOUT_S = 10.0


class Dispatcher:
    """Connects a queue of jobs and a set of workers. Its thread holds it, and never the `WorkerPool`.

    Attributes:
        lock: guards the queue, the workers and the loaders; whoever holds it sees them at rest.
        workers: the pool's.
        closed: nothing is accepted any more.
    """

    def __init__(self, workers: int, env: Mapping[str, str] | None, worker_threads: int) -> None:
        self.lock = threading.Lock()
        self.workers = WorkerSet(workers, env, worker_threads)
        self.closed = False
        self._owner = os.getpid()
        self._queue = JobQueue(self.workers)
        self._loaders: set[SharedLoader] = set()
        self._to_close: collections.deque[SharedLoader | None] = collections.deque()  # None: the pool
        self._thread: threading.Thread | None = None
        self._ticking = False  # the thread looks around by itself, and need not be woken
        self._busy_at = 0.0
        self._starts = Starts(self.workers, self._queue, self.lock)

    # -- called by consumers -------------------------------------------------------------------------------------

    def submit(self, loader: SharedLoader, jobs: Sequence[Job]) -> None:
        """Queues jobs of one loader.

        Raises:
            PoolClosed: the pool or the dataset was closed, or this process is a fork of the pool's owner.
        """
        self._check_owner()
        with self.lock:
            if self.closed or loader.closed:
                raise PoolClosed("the dataset or its pool has been closed; make a new one")
            self._loaders.add(loader)
            self._queue.extend(jobs)
            if self._thread is None:
                thread = threading.Thread(target=self._dispatch, daemon=True, name="keras_mp-dispatcher")
                thread.start()
                self._thread = thread
            self._queue.hand_out()
            if not self._ticking or (self._queue and not self.workers.is_full):
                self.workers.wake()

    def wait(self, job: Job) -> None:
        """Returns when the job has an answer.

        Raises:
            PoolClosed: there is nobody left to give one.
        """
        if job.wait(_TICK_S):
            return
        with Patience(job) as patience:
            while not job.wait(_TICK_S):
                self._check_owner()
                if self._thread is None or not self._thread.is_alive():
                    if job.wait(0):
                        break
                    raise PoolClosed("the pool was closed while this batch was being loaded")
                patience.look(self.workers.ready, self.workers.count)

    def give_up(self, loader: SharedLoader) -> None:
        """Has a loader, and what was asked of it, given up. For finalisers: takes no lock."""
        self._to_close.append(loader)
        self.workers.wake()
        if self.closed:  # nobody looks there any more
            loader.close()

    def close(self, wait: bool = True) -> None:
        """Ends all workers. With `wait`, returns when they are gone; without, it waits for no lock."""
        if os.getpid() != self._owner:
            return
        self._to_close.append(None)
        self.workers.wake()
        thread = self._thread
        if thread is None:
            if self.lock.acquire(blocking=False):  # else the thread is being started, and will see to it
                try:
                    if self._thread is None and not self.closed:
                        self._let_go(None)
                finally:
                    self.lock.release()
        elif wait and thread is not threading.current_thread():
            thread.join(_JOIN_TIMEOUT_S)

    def resize(self, count: int) -> None:
        """Has `count` workers from now on; those that are too many end when they have answered."""
        with self.lock:
            self.workers.count = count
            self.workers.wake()

    def describe(self) -> dict[str, Any]:
        """Numbers for `stats()`."""
        with self.lock:
            return {**self.workers.describe(), "queued": len(self._queue)}

    def before_fork(self) -> None:
        """Waits until no worker is half started, as its descriptors would stay open in the fork."""
        self.workers.starting.acquire()
        self.lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Lets workers be started again."""
        self.lock.release()
        self.workers.starting.release()

    def after_fork_in_child(self) -> None:
        """Lets a forked copy go of everything that is the parent's."""
        self.workers.abandon()
        self.after_fork_in_parent()

    def _check_owner(self) -> None:
        """Raises PoolClosed in a forked copy of the owner: it has neither the dispatcher nor the sockets."""
        if os.getpid() != self._owner:
            raise PoolClosed(
                f"this pool belongs to process {self._owner} and cannot be used in its fork {os.getpid()}; make the "
                "dataset in the forked process, or give it workers=0"
            )

    # -- the dispatcher's thread ---------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        failure: BaseException | None = None
        try:
            while not self.closed:
                patience_s = _ENDING_TICK_S if self.workers.are_ending else _TICK_S if self._ticking else None
                for handle, events in self.workers.wait(patience_s):
                    if events & selectors.EVENT_WRITE:
                        with self.lock:
                            self.workers.flush(handle)
                    if events & selectors.EVENT_READ:
                        self._read(handle)
                gone: list[WorkerHandle] = []
                with self.lock:
                    self._close_what_is_given_up()
                    if not self.closed:
                        gone = self.workers.look_around(self._loaders)
                        for handle in self.workers.ended():
                            self._settle(handle)
                        self.workers.shrink()
                        self._queue.hand_out()
                    now = time.monotonic()
                    if self._queue or any(not handle.is_idle for handle in self.workers.handles):
                        self._busy_at = now
                    # On for a while: waking this thread for every batch would cost more than a look now and then.
                    # And as long as a consumer has batches: what it lets go of is given back.
                    self._ticking = now - self._busy_at < 4 * _TICK_S or any(each.slots.lent for each in self._loaders)
                self.workers.log_ends()
                for handle in gone:
                    self._read(handle, gone=True)  # first the answers that it has given
                if not self.closed:
                    self._starts.start_missing()
        except BaseException as error:
            failure = error
            raise
        finally:
            with self.lock:
                self._let_go(failure)
            self.workers.end_all(self.lock)

    def _read(self, handle: WorkerHandle, gone: bool = False) -> None:
        messages = handle.replies.frames()
        while True:
            try:
                message = next(messages, None)
            except EOFError:
                gone = True
                break
            except Exception as error:  # no memory for it, or not of our making
                with self.lock:
                    handle.end_as("broken", f"sent a reply that could not be read ({error!r})")
                gone = True
                break
            if message is None:
                break
            with self.lock:
                if isinstance(message, Reply):
                    self._answer(handle, message)
                else:
                    handle.process.set_ready(message.where_fd)
                    self._starts.add_success()
                    timeline.add_start(handle, self.workers.restarts > 0, self._loaders)
                self._queue.hand_out()
        if gone:
            with self.lock:
                self.workers.remove(handle)

    def _answer(self, handle: WorkerHandle, reply: Reply) -> None:
        bundle = handle.answered(reply.number)
        if bundle is None:
            return
        slot = bundle.lease.slot
        slot.size = reply.slot_size
        if any(not job.done for job in bundle.jobs):  # else the loader, and its slots, are closed
            try:
                # Now, as the slot's descriptor may be closed before its batches are taken.
                bundle.lease.remap()
            except OSError as error:
                for job in bundle.jobs:
                    job.refuse(error, slot.size)
        if reply.slot_is_held:
            bundle.loader.slots.retire(slot)
        nbytes = 0
        for job, batch in zip(bundle.jobs, reply.batches, strict=False):
            if isinstance(batch, Refused):
                job.refuse(*batch)
                continue
            if isinstance(batch, Done):
                nbytes += batch.nbytes
                bundle.loader.record_batch(batch.load_s, batch.nbytes)
            job.finish(batch)
        bundle.loader.record_work(reply.work, nbytes)
        self._queue.put_back(bundle.jobs[len(reply.batches) :])

    def _settle(self, handle: WorkerHandle) -> None:
        """Puts back what a worker was doing that has ended, or that cannot be made to."""
        said = handle.process.captured_stderr()
        end = handle.settle()
        timeline.add_end(handle, end, self._loaders)
        if handle.is_surplus and not handle.bundles:  # it was let go, and has left
            return
        if not handle.process.ready:
            self._starts.add_failure(end, said)
            return
        self.workers.record_end(handle.process.pid, end)
        job = handle.blamable
        if job is not None:
            record_end(job, end, handle.process.pid, handle.process.killed_at or 0.0)
        jobs = handle.jobs
        handle.bundles.clear()  # whoever still holds the handle must not hold their slots
        self._queue.put_back(jobs)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _close_what_is_given_up(self) -> None:
        while self._to_close:
            loader = self._to_close.popleft()
            if loader is None:
                self.closed = True
                return
            if not loader.closed:
                self._close_loader(loader)

    def _close_loader(self, loader: SharedLoader) -> None:
        loader.close()
        self._loaders.discard(loader)
        self._queue.remove(loader)
        for handle in self.workers.handles:
            for job in handle.jobs:
                if job.loader is loader:  # its worker may finish it, for nobody
                    job.fail(PoolClosed(f"the dataset was closed while {job.name} was being loaded"))
        self.workers.forget(loader)

    def _let_go(self, failure: BaseException | None) -> None:
        """Nobody waits any longer for what will not come, and no slot is lent out any more."""
        self.closed = True
        reason = "the pool was closed" if failure is None else f"the pool's dispatcher failed: {failure!r}"
        jobs = self._queue.clear()
        for handle in self.workers.remove_all():
            jobs += handle.jobs
        loaders = {*self._loaders, *(job.loader for job in jobs), *filter(None, self._to_close)}
        self._loaders = set()
        for job in jobs:
            job.fail(PoolClosed(f"{reason} while {job.name} was being loaded"))
        for loader in loaders:
            loader.close()
        self._to_close.clear()
