"""One dataset on a worker pool: the engine through which it asks for batches.

The consumer's threads alone come here. The client packs the loader and makes the jobs; the dispatcher's thread has the
`SharedLoader` and the jobs, and never the client: when the client is dropped, its finaliser has them given up.
"""

from __future__ import annotations

import dataclasses
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.errors import KerasMPError
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.recording import Recorder
from keras_mp.memory import files, pickling
from keras_mp.memory.segment import Segment
from keras_mp.plan.request import Request
from keras_mp.workers.dispatcher import Dispatcher
from keras_mp.workers.faults import SampleNames
from keras_mp.workers.jobs import Job
from keras_mp.workers.messages import Place, SetLoader
from keras_mp.workers.shared_loader import SharedLoader

# Buffers from this size on are kept apart, so that an epoch that changes only an index array does not copy the images.
_LARGE_BYTES = 1 << 20


class PoolClient:
    """One dataset's access to a pool; satisfies `engines.base.Engine`.

    Args:
        dispatcher: the pool's.
        loader: what its workers load batches with.
        timeout_s: seconds that a batch may take in a worker; None: any time.
        pool: whatever must live as long as somebody may ask for a batch.
        recorder: gets what happens when, for a timeline.

    Raises:
        KerasMPError: the loader cannot be pickled, or there is no shared memory for it.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        loader: Loader,
        timeout_s: float | None,
        pool: object,
        recorder: Recorder | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._pool: object | None = pool
        self._shared = SharedLoader(SampleNames(loader), timeout_s, recorder)
        self._message: SetLoader | None = None
        self._small: Segment | None = None
        self._large: Segment | None = None
        self._large_places: dict[int, Place] = {}  # by the address the buffer came from
        try:
            self._files = loader.descriptors()  # the same in all its states
        except OSError as error:
            raise KerasMPError(f"no descriptor for the dataset's cache: {error}. Raise `ulimit -n`") from error
        self.update(loader)
        self._finalizer = weakref.finalize(self, dispatcher.give_up, self._shared)
        self._finalizer.atexit = False

    @property
    def bundle_size(self) -> int:
        """How many requests had better travel together."""
        return self._shared.bundle_size

    @property
    def batch_bytes(self) -> int | None:
        """Bytes of the arrays in the batch that came last; None as long as none has come."""
        return self._shared.batch_bytes

    def submit(self, requests: Sequence[Request]) -> list[Job]:
        """Queues requests.

        Raises:
            PoolClosed: the pool or the dataset was closed, or this process is a fork of the pool's owner.
        """
        jobs = [Job(self._shared, request) for request in requests]
        self._dispatcher.submit(self._shared, jobs)
        return jobs

    def is_ready(self, job: Job) -> bool:
        """Whether `result` would return, or raise, at once."""
        return job.done and not job.refused

    def result(self, job: Job) -> Loaded:
        """Waits for the job and takes its batch.

        Raises:
            SampleError: user code failed.
            WorkerCrashed, BatchTimeout, PoolClosed: as the pool found.
            KerasMPError: shared memory was refused, also a second time.
        """
        self._dispatcher.wait(job)
        if job.refused:  # while reading ahead: by now, memory or descriptors may have been given back
            (job,) = self.submit([job.request])
            self._dispatcher.wait(job)
        return job.take()

    def cancel(self, job: Job) -> None:
        """Nobody will ask for this job's result: it is dropped if no worker has it yet."""
        job.cancelled = True

    def update(self, loader: Loader) -> bool:
        """Uses a new state of the loader for the requests that follow; large arrays that have not changed stay.

        Where nothing has changed it costs the pickling, and a comparison: a quarter of a second for 1 GiB of arrays,
        and none for what the loader has as a `shared_view`.

        Returns:
            Whether anything has changed since the last time.

        Raises:
            KerasMPError: something in it cannot be pickled, or there is no shared memory for it.
        """
        buffers: pickling.Buffers = []
        body = loader.dump(buffers)
        is_large = [buffer.raw().nbytes >= _LARGE_BYTES for buffer in buffers]
        large = [buffer for buffer, big in zip(buffers, is_large, strict=True) if big]
        small = [pickle.PickleBuffer(body)] + [buffer for buffer, big in zip(buffers, is_large, strict=True) if not big]
        small_places, small_size = files.place_buffers(small)
        large_places, large_size = files.place_buffers(large)
        message = SetLoader(
            loader=self._shared.number,
            version=self._shared.version,
            pickle=small_places[0],
            small=small_places[1:],
            large=large_places,
            order=is_large,
            sizes=(small_size, large_size),
            files=len(self._files),
        )
        large_segment = self._large
        if large_segment is not None and not large_segment.holds(large, large_places, large_size):
            large_segment = None
        if large_segment is not None and message == self._message and self._small is not None:
            if self._small.holds(small, small_places, small_size):
                return False
        try:
            large_segment = large_segment or Segment.holding(large, large_places, large_size)
            small_segment = Segment(small, small_places, small_size)
        except OSError as error:
            if large_segment is not None and large_segment is not self._large:
                large_segment.close()  # now: the error's traceback keeps it
            raise KerasMPError(
                f"no shared memory for the dataset's source, {small_size + large_size} bytes: {error}. Free memory or "
                "file descriptors (ulimit -n), or pass what is read from disk sample by sample: paths, or a np.memmap."
            ) from error
        self._message = dataclasses.replace(message, version=message.version + 1)
        self._small, self._large = small_segment, large_segment
        addresses = [np.frombuffer(buffer.raw(), np.uint8).ctypes.data for buffer in large]
        self._large_places = dict(zip(addresses, large_places, strict=True))
        self._shared.replace(self._message, (small_segment, large_segment, *self._files))
        return True

    def shared_view(self, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """A large array of the loader's as it lies in shared memory, read-only; None if it does not lie there whole.

        Who uses it in place of the array lets that go: the data is then in memory once, for parent and workers.
        """
        place = self._large_places.get(array.ctypes.data)
        if place is None or place[1] != array.nbytes or not array.flags.c_contiguous:
            return None
        if self._large is None or self._shared.closed:
            return None
        memory = self._large.view()
        return np.ndarray(array.shape, array.dtype, buffer=memory[place[0] : place[0] + place[1]].data)

    def close(self) -> None:
        """Drops this dataset's requests, memory and hold on the pool, whoever still holds the client."""
        self._finalizer()
        self._pool = None

    def stats(self) -> dict[str, Any]:
        """The pool's numbers, and this dataset's slots: how many, and bytes of address space in all."""
        slots = self._shared.slots
        numbers = {} if self._pool is None else self._dispatcher.describe()
        return {
            "engine": "worker pool",
            **numbers,
            "slots": len(slots.slots),
            "slot_bytes": slots.nbytes,
            "work": self._shared.totals,
        }
