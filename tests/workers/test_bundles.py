"""Small batches go to a worker several at a time; what befalls one of them is that one's affair (P1, P3, P5)."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from keras_mp.loading.batch_loader import BatchLoader
from keras_mp.memory import files, frames, pickling
from keras_mp.memory.segment import Segment
from keras_mp.memory.slots import Slot
from keras_mp.plan.request import Request
from keras_mp.workers import main
from keras_mp.workers.client import PoolClient
from keras_mp.workers.dispatcher import Dispatcher
from keras_mp.workers.faults import SampleNames
from keras_mp.workers.jobs import Bundle
from keras_mp.workers.messages import Done, Failed, Forget, Reply, Run, SetLoader
from keras_mp.workers.shared_loader import SharedLoader

_BATCHES = 40


class _Batches:
    """Tiny batches that say who made them; from the moment the file is there, batch `odd` does what `harm` says."""

    def __init__(self, armed: Path, odd: int, harm: str) -> None:
        self.armed, self.odd, self.harm = armed, odd, harm

    def __len__(self) -> int:
        return _BATCHES

    def __getitem__(self, index: int) -> Any:
        if index == self.odd and self.armed.exists():
            if self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.harm == "once":
                self.armed.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.harm == "raise":
                raise ValueError("odd")
            elif self.harm == "slow":
                time.sleep(0.05)
            else:
                time.sleep(60)
        return np.full((2, 3), index)


def _submit(client: PoolClient) -> list[Any]:
    return client.submit([Request(0, batch, [batch]) for batch in range(_BATCHES)])


@pytest.mark.parametrize("harm", ["kill", "once", "raise", "slow", "stall"])
@pytest.mark.parametrize("odd", [0, 3, _BATCHES - 1])
def test_one_odd_batch_leaves_the_others_alone(harm: str, odd: int, pool: keras_mp.WorkerPool, tmp_path: Path) -> None:
    timeout_s = 2.0 if harm == "stall" else None
    client = pool.client(BatchLoader(_Batches(tmp_path / "armed", odd, harm)), timeout_s=timeout_s)
    for _ in range(20):  # where the machine is busy, it takes a while until they are known to be quick
        for job in _submit(client):
            client.result(job)
        if client.bundle_size > 1:
            break
    assert client.bundle_size > 1
    (tmp_path / "armed").touch()
    errors = {"kill": keras_mp.WorkerCrashed, "raise": keras_mp.SampleError, "stall": keras_mp.BatchTimeout}
    jobs = _submit(client)
    for index, job in enumerate(jobs):
        if index == odd and harm in errors:
            with pytest.raises(errors[harm], match=f"batch {odd} of epoch 0"):
                client.result(job)
        else:
            assert (client.result(job).batch == index).all()
    assert [index for index, job in enumerate(jobs) if job.faults] == (
        [odd] if harm in ("kill", "once", "stall") else []
    )
    client.close()


def test_batches_of_one_bundle_share_a_slot_and_no_memory(pool: keras_mp.WorkerPool, tmp_path: Path) -> None:  # P6
    client = pool.client(BatchLoader(_Batches(tmp_path / "armed", 0, "")))
    for _ in range(3):
        for job in _submit(client):
            client.result(job)
    batches = [client.result(job).batch for job in _submit(client)]
    assert client.stats()["slots"] < _BATCHES
    for number, batch in enumerate(batches):
        batch[...] = -number
    assert all((batch == -number).all() for number, batch in enumerate(batches))
    del batch, batches[1:]
    for _ in range(3):
        for job in _submit(client):
            client.result(job)
    assert (batches[0] == 0).all()
    client.close()


def test_a_bundle_that_was_never_filled_does_no_harm() -> None:  # P3
    """Ctrl-C in a consumer may come between the making of a bundle and its filling."""
    loader = SharedLoader(SampleNames(BatchLoader([0])), 0.0)
    dispatcher = Dispatcher(1, None, 1)
    client = PoolClient(dispatcher, BatchLoader([np.arange(3)]), None, None)
    client.result(client.submit([Request(0, 0, [0])])[0])
    with dispatcher.lock:
        handle = next(handle for handle in dispatcher.workers.handles if handle.process.ready)
        handle.begin_bundle(Bundle(-1, loader, loader.slots.acquire()))
        try:
            handle.check_deadline(time.monotonic() + 1e6)
        finally:
            handle.bundles.pop()
    assert handle.end is None
    loader.close()
    client.close()
    dispatcher.close()


class _Slow:
    def __init__(self, slow: int) -> None:
        self.slow = slow

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == self.slow:
            time.sleep(0.6)
        return np.full(2, index)


def _reply(source: Any, batches: int) -> Reply:
    """What a worker's main loop, here, makes of a bundle."""
    pickled = [pickle.PickleBuffer(pickling.dump_user_object(BatchLoader(source), "dataset"))]
    places, size = files.place_buffers(pickled)
    set_loader = SetLoader(loader=0, version=1, pickle=places[0], small=[], large=[], order=[], sizes=(size, 0))
    small, large, slot = Segment(pickled, places, size), Segment([], [], 0), Slot(0)
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.closing(small), contextlib.closing(large), contextlib.closing(slot):
        frames.send(ours, set_loader, [small.fd, large.fd])
        requests = [Request(0, batch, [batch]) for batch in range(batches)]
        frames.send(ours, Run(7, 0, slot.number, slot.size, requests), [slot.fd])
        frames.send(ours, Forget(0))
        ours.shutdown(socket.SHUT_WR)
        main.Worker(theirs).serve()
        received = frames.receive(ours)
    assert received is not None
    reply: Reply = received[0]
    return reply


def test_a_worker_gives_back_what_would_wait_behind_a_slow_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_LONGEST_RUN_S", 0.5)  # so that a busy machine makes no difference
    reply = _reply(_Slow(2), 6)
    assert (reply.number, len(reply.batches)) == (7, 3)
    assert all(isinstance(batch, Done) for batch in reply.batches)
    assert len(_reply(_Slow(7), 6).batches) == 6


def test_a_worker_goes_on_after_a_batch_that_fails() -> None:
    reply = _reply([np.zeros(1), None, np.zeros(1)], 3)
    assert [type(batch) for batch in reply.batches] == [Done, Failed, Done]
