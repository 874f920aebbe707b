"""One dataset as the pool has it: its loader, packed in shared memory, its slots, and how fast its batches are made.

The dispatcher and the jobs hold this, and it holds neither of them, nor the client or anything of the consumer's: so a
dataset that nobody uses any more can be collected while its batches are on their way. No thread waits here for another.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time

from keras_mp.errors import PoolClosed
from keras_mp.loading.recording import Recorder
from keras_mp.loading.timing import Work, WorkTotals
from keras_mp.memory.files import Descriptor
from keras_mp.memory.segment import Segment
from keras_mp.memory.slots import SlotPool
from keras_mp.plan.request import Request
from keras_mp.workers.faults import SampleNames
from keras_mp.workers.messages import SetLoader

# Batches that take less than this are handed out several at a time, and the next ones before these are done: the way
# there and back would cost more than a batch. Others are handed out one by one, so that none waits behind a slow one.
_SHORT_LOAD_S, _SHORT_BUNDLE = 0.002, 4
# And of these one worker makes more than a consumer can take, so that it costs nothing to leave the others idle.
_TINY_LOAD_S, _TINY_BUNDLE = 0.00015, 8
_BUNDLE_BYTES = 1 << 20  # as one batch that is kept keeps the slot of them all

_AFFINITIES_KEPT = 4096
_LEAST_LATE_S = 0.1

_numbers = itertools.count()


class SharedLoader:
    """A loader in shared memory, and the slots that its batches are built in.

    Args:
        samples: tells of which samples a batch is made.
        timeout_s: seconds that a batch may take in a worker; None: any time.
        recorder: gets what happens when, for a timeline.
    """

    def __init__(self, samples: SampleNames, timeout_s: float | None, recorder: Recorder | None = None) -> None:
        self.number = next(_numbers)
        self.samples = samples
        self.timeout_s = timeout_s
        self.slots = SlotPool()
        self.version = 0  # of the state that workers are to use
        self.stall: str | None = None  # what is to be said of a worker that stands at a sample for long
        self.stall_is_told = False
        self.closed = False
        self.closed_at = 0.0
        self.totals = WorkTotals()
        self.recorder = recorder or Recorder()
        # By what a request says of its affinity: the process id of the worker that had the last one of the same.
        self._workers: collections.OrderedDict[tuple[int, int], int] = collections.OrderedDict()
        self._mean_load_s = _SHORT_LOAD_S
        self.batch_bytes: int | None = None  # of the last one
        self._lock = threading.Lock()  # of what follows, and never held for long
        self._message: SetLoader | None = None
        self._segments: tuple[Segment | Descriptor, ...] = ()
        self._retired: list[Segment | Descriptor] = []  # the dispatcher may still be sending their descriptors

    def replace(self, message: SetLoader, segments: tuple[Segment | Descriptor, ...]) -> None:
        """From now on workers get this state of the loader. Segments that come again stay as they are."""
        with self._lock:
            self._retired += [segment for segment in self._segments if segment not in segments]
            self._message, self._segments, self.version = message, segments, message.version
        if self.closed:
            self.close()

    def message(self) -> tuple[SetLoader, list[int]]:
        """What gives a worker this loader, and the descriptors that go with it, valid until the next call.

        Raises:
            PoolClosed: the dataset has been closed.
        """
        with self._lock:
            while self._retired:
                self._retired.pop().close()
            message, segments = self._message, self._segments
        if self.closed:
            self.close()
        if self.closed or message is None:
            raise PoolClosed("the dataset has been closed")
        return message, [segment.fd for segment in segments]

    def worker_of(self, request: Request) -> int | None:
        """Process id of the worker that has at hand what this request goes on with; None: all are alike."""
        return None if request.affinity is None else self._workers.get(request.affinity)

    def set_worker(self, request: Request, pid: int) -> None:
        """That worker is given the request."""
        if request.affinity is not None:
            self._workers[request.affinity] = pid
            if len(self._workers) > _AFFINITIES_KEPT:
                self._workers.popitem(last=False)

    def is_late(self, since: float) -> bool:
        """Whether a worker that came to its batch at `since` is at it for much longer than usual."""
        return time.monotonic() - since > max(_LEAST_LATE_S, 4 * self._mean_load_s)

    @property
    def depth(self) -> int:
        """How many bundles of its batches one worker may hold at once."""
        return 2 if self._mean_load_s < _SHORT_LOAD_S else 1

    @property
    def bundle_size(self) -> int:
        """How many of its batches may go to a worker together."""
        if self._mean_load_s >= _SHORT_LOAD_S:
            return 1
        most = _SHORT_BUNDLE if self.spreads else _TINY_BUNDLE
        return max(
            1, min(most, _BUNDLE_BYTES // max(1, _BUNDLE_BYTES if self.batch_bytes is None else self.batch_bytes))
        )

    @property
    def spreads(self) -> bool:
        """Whether it is worth while to keep several workers busy."""
        return self._mean_load_s >= _TINY_LOAD_S

    def record_batch(self, load_s: float, nbytes: int) -> None:
        """Takes a batch's loading time and size into account."""
        self._mean_load_s += 0.2 * (load_s - self._mean_load_s)
        self.batch_bytes = nbytes

    def record_work(self, work: Work | None, nbytes: int) -> None:
        """Counts what a worker says that it did, for batches of `nbytes`."""
        if work is not None:
            self.totals.add(work, nbytes)
            self.recorder.add(work.events)

    def close(self) -> None:
        """Gives up segments and slots; batches that the consumer holds stay valid.

        Called by finalisers too, so it waits for no lock: who holds it closes what it finds closed.
        """
        if not self.closed:
            self.closed, self.closed_at = True, time.monotonic()
        self.slots.close()
        if self._lock.acquire(blocking=False):
            try:
                for segment in (*self._segments, *self._retired):
                    segment.close()
                self._message, self._segments = None, ()
                self._retired.clear()
            finally:
                self._lock.release()
