"""One worker as the dispatcher has it: its process and socket, what it is doing and knows, its deadline, and its end.

Only the dispatcher calls this, under its lock. Nothing here waits, neither for the worker nor for room on its socket,
and nothing here says what an end means for a batch: that is `verdict`'s.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import time
from collections.abc import Sequence
from typing import Any, Literal

from keras_mp.memory import frames
from keras_mp.workers.faults import WorkerEnd
from keras_mp.workers.jobs import Bundle, Job
from keras_mp.workers.messages import Forget, Run
from keras_mp.workers.process import KILL_GRACE_S, Process
from keras_mp.workers.shared_loader import SharedLoader
from keras_mp.workers.waiting import StallWatch

EXIT_GRACE_S = 2.0  # what a worker gets to end by itself, or to finish a batch that nobody wants any more
INLINE_SAMPLES = 512  # a longer list of samples travels in the slot, so that a socket is never full
_EOF_GRACE_S = 1.0  # a process that ends closes its socket a moment earlier
_START_TIMEOUT_S = 120.0
_STOPPED_GRACE_S = 5.0  # who stops all of a program's processes for a moment lets them go on one after the other


class WorkerHandle:
    """A worker process and what it is doing.

    Attributes:
        process: the process.
        replies: reads what it sends.
        bundles: what it has been asked for and has not answered, in order.
        end: how it ended; None as long as nothing is known of an end.
        stalls: watches it for samples that take very long.
        is_surplus: there is one too many, and this is the one to go.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.replies = frames.FrameReader(process.sock)
        self.bundles: collections.deque[Bundle] = collections.deque()
        self.end: WorkerEnd | None = None
        self.stalls = StallWatch()
        self.is_surplus = False
        self._writer = frames.FrameWriter(process.sock)
        self._versions: dict[int, int] = {}  # of the loaders that it has, by their numbers
        self._slots: set[tuple[int, int]] = set()  # that it has, by the numbers of loader and slot
        self._head_since = 0.0  # when it came to its first bundle
        self._busy_s = 0.0  # at bundles that it has answered
        self._stopped_since: float | None = None
        self._late_at: Job | None = None  # the batch that it was at when it was found late
        self._removed_at = 0.0

    # -- what it is doing ----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and has nothing to do."""
        return not self.bundles and self.process.ready and self.process.killed_at is None

    @property
    def is_usable(self) -> bool:
        """Whether it may be given something to do, now or later."""
        return self.process.ready and self.process.killed_at is None and not self.is_surplus

    def has_room(self, depth: int) -> bool:
        """Whether it may be given a bundle, where it may hold `depth` of them."""
        return self.is_usable and len(self.bundles) < depth

    @property
    def busy_s(self) -> float:
        """How long it has been at batches, in seconds."""
        return self._busy_s + (time.monotonic() - self._head_since if self.bundles and self.process.ready else 0.0)

    @property
    def head_since(self) -> float:
        """When it came to the first of its bundles, in seconds of `time.monotonic`."""
        return self._head_since

    @property
    def ready_s(self) -> float:
        """How long it has been ready for work, in seconds."""
        return time.monotonic() - self.process.ready_at if self.process.ready else 0.0

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped (SIGSTOP) when last looked at."""
        return self._stopped_since is not None

    @property
    def jobs(self) -> list[Job]:
        """The batches that it has been asked for, in order."""
        return [job for bundle in self.bundles for job in bundle.jobs]

    @property
    def current(self) -> Job | None:
        """The batch that it is at."""
        return next((job for job in self.jobs if not job.is_finished), None)

    # -- messages ------------------------------------------------------------------------------------------------

    def begin_bundle(self, bundle: Bundle) -> None:
        """Counts a bundle, empty as yet, among what the worker has: should Ctrl-C come from here on, no job is lost."""
        if not self.bundles:
            self._head_since = time.monotonic()
        self.bundles.append(bundle)

    def send_bundle(self, bundle: Bundle) -> None:
        """Asks for the batches of the bundle begun last; before that come loader and slot, if the worker lacks them."""
        loader, slot = bundle.loader, bundle.lease.slot
        requests: Any = [job.request for job in bundle.jobs]
        if sum(job.request.weight for job in bundle.jobs) > INLINE_SAMPLES:
            data = pickle.dumps(requests, protocol=5)
            try:
                slot.write(data)
                bundle.lease.remap()
            except OSError as error:
                self.bundles.pop()
                for job in bundle.jobs:
                    job.refuse(error, len(data))
                return
            requests = len(data)
        if self._versions.get(loader.number) != loader.version:
            message, fds = loader.message()
            self._send(message, fds)
            self._versions[loader.number] = message.version
        is_new = (loader.number, slot.number) not in self._slots
        self._slots.add((loader.number, slot.number))
        self._send(Run(bundle.number, loader.number, slot.number, slot.size, requests), [slot.fd] if is_new else ())

    def forget_slots(self, loader: SharedLoader, numbers: Sequence[int]) -> None:
        """Slots of the loader will not be used again."""
        known = [number for number in numbers if (loader.number, number) in self._slots]
        if known:
            self._slots.difference_update((loader.number, number) for number in known)
            self._send(Forget(loader.number, tuple(known)))

    def forget(self, loader: SharedLoader) -> None:
        """The loader will not be used again."""
        self._slots = {key for key in self._slots if key[0] != loader.number}
        if self._versions.pop(loader.number, None) is not None:
            self._send(Forget(loader.number))

    def flush(self) -> None:
        """Sends what is waiting, as far as there is room."""
        try:
            self._writer.flush()
        except OSError:  # as in `_send`
            self.process.kill()

    @property
    def has_unsent(self) -> bool:
        """Whether something is waiting for room on the socket."""
        return self._writer.is_waiting

    def answered(self, number: int) -> Bundle | None:
        """Takes the bundle that a reply is for; None if it is out of turn, and the worker has been ended for it."""
        if not self.bundles or self.bundles[0].number != number:  # user code has forked, and the fork answers too
            self.end_as("broken", "answered out of turn (does the dataset's code fork?)")
            return None
        now = time.monotonic()
        self._busy_s += now - self._head_since
        self._head_since = now
        return self.bundles.popleft()

    def _send(self, message: Any, fds: Sequence[int] = ()) -> None:
        try:
            self._writer.send(message, fds)
        except OSError:  # it died, or it has half a message: the end of its socket will put its jobs back
            self.process.kill()

    # -- its end -------------------------------------------------------------------------------------------------

    def end_as(self, cause: Literal["late", "broken"], text: str) -> None:
        """Kills the worker; the end of its socket does the rest. The first cause counts."""
        if self.end is None:
            self.end = WorkerEnd(cause, text, self.is_stopped)
            self._late_at = self.current
        self.process.kill()

    def check_deadline(self, now: float) -> None:
        """Ends the worker if what it has to do takes too long, or if it stands stopped."""
        if self.end is None and (self.bundles or not self.process.ready):
            text = self._missed_deadline(now)
            if text:
                self.end_as("late", text)

    def _missed_deadline(self, now: float) -> str:
        jobs = self.jobs  # none, if it is Ctrl-C that came between the making of a bundle and its filling
        if not self.process.ready:
            if now - self.process.started > _START_TIMEOUT_S:
                return f"was not ready within {_START_TIMEOUT_S:g} s"
        elif jobs:
            loader = jobs[0].loader
            if loader.timeout_s is not None and now - self._head_since > loader.timeout_s:
                return f"took longer than timeout={loader.timeout_s:g} s"
            if loader.closed and now - max(self._head_since, loader.closed_at) > EXIT_GRACE_S:
                return "was at a batch of a closed dataset"
        if not self.process.is_stopped():
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since > _STOPPED_GRACE_S:
            return f"stood stopped (SIGSTOP) for {_STOPPED_GRACE_S:g} s"
        return ""

    def is_gone(self, now: float) -> bool:
        """Whether it has ended, though its socket may be open; or has been killed, and had the time to be gone."""
        killed_at = self.process.killed_at
        return self.process.has_ended() or (killed_at is not None and now - killed_at > KILL_GRACE_S)

    def remove(self) -> None:
        """No more is expected of it: its socket has ended, or what it sends is of no use. It gets no more to do."""
        self._removed_at = time.monotonic()
        if self.end is not None:
            self.process.kill()

    def check_removed(self, now: float) -> None:
        """Ends a worker whose socket has ended, but which goes on."""
        if self.process.killed_at is None and now - self._removed_at > _EOF_GRACE_S:
            self.end_as("broken", "closed its socket, but went on running")

    def drop_unsent(self) -> None:
        """Gives up what is waiting to be sent."""
        self._writer.close()

    def settle(self) -> WorkerEnd:
        """Lets go of a worker that has ended, or that cannot be made to end; says how it ended.

        A slot that such a process may yet write to is never lent again (P6).
        """
        self.drop_unsent()
        text = self.process.settle()
        end = dataclasses.replace(self.end or WorkerEnd("exited", text), exit_code=self.process.exit_code)
        if end.exit_code is None:
            end = dataclasses.replace(end, text=f"{end.text}, and even SIGKILL did not end it")
            for bundle in self.bundles:
                bundle.loader.slots.retire(bundle.lease.slot)
        self.end = end
        return end

    @property
    def blamable(self) -> Job | None:
        """The batch that its end may be the doing of."""
        job = self.current
        if job is None or job.done or (self.end is not None and self.end.cause == "late" and job is not self._late_at):
            return None  # it was the batch before this one that it was ended for
        return job
