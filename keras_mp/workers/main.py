"""The worker process: receives loaders and requests, writes batches into slots, replies.

It imports NumPy, cloudpickle and the standard library, and whatever the user's code imports; never keras or tensorflow
on its own account. It lives exactly as long as its parent wants it: see `die_with_parent`.

Start: `python -P -m keras_mp.workers.main SOCKET LIFELINE STDERR`, three inherited descriptors. Until it says hello its
stderr is a memory file, so that a start that fails can be reported with its cause; from then on it is the parent's own.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import pickle
import signal
import socket
import sys
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mp.loading.collate import allocating
from keras_mp.loading.loader import Loaded, Loader, ignore_position
from keras_mp.memory import frames, pickling
from keras_mp.memory.segment import map_privately
from keras_mp.memory.slot_writer import SlotWriter
from keras_mp.plan.request import Request
from keras_mp.workers.messages import EXIT_NO_DESCRIPTOR, Done, Failed, Forget, Hello, Load, Reply, Run, failed_batch

# Frames longer than this go through the slot: the parent reads many workers' sockets, and a pickle in shared memory
# costs it nothing until the batch is wanted.
_INLINE_BYTES = 1 << 15

_MAX_SAID_BYTES = 1 << 16

# A run that has taken longer is answered with the batches that are ready: the rest may go to another worker.
_LONGEST_RUN_S = 0.01


class _Memory:
    """Where this batch's arrays go: the slot while it can grow, ordinary memory once that is refused.

    Ordinary memory too for code that keeps its batches: what it keeps would be overwritten, or would be written to when
    the batch is in the training process.
    """

    def __init__(self, slot: SlotWriter | None, batches_are_kept: bool = False) -> None:
        self.slot = slot
        self.refused = ""
        self.batches_are_kept = batches_are_kept

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if self.slot is not None and not self.refused and not self.batches_are_kept:
            try:
                return self.slot.empty(shape, dtype)
            except OSError as error:
                self.refused = str(error)
        return np.empty(shape, dtype)


class Worker:
    """The main loop and what it remembers between requests."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loaders: dict[int, Loader | BaseException] = {}
        self._slots: dict[tuple[int, int], SlotWriter] = {}
        self._keeping: set[int] = set()  # tasks whose code has kept an array in a slot beyond its batch

    def serve(self) -> None:
        """Answers requests until the parent closes the socket."""
        while (received := frames.receive(self._sock)) is not None:
            message, fds = received
            if isinstance(message, Load):
                _check_received(len(fds) == len(message.sizes))
                self._loaders[message.task] = _unpack(message, fds)
            elif isinstance(message, Forget):
                self._forget(message)
            else:
                if fds:
                    self._slots[message.task, message.slot] = SlotWriter(fds[0])
                _check_received(message.slot_size is None or (message.task, message.slot) in self._slots)
                self._reply(self._run(message))

    def _reply(self, reply: Reply) -> None:
        try:
            frame = frames.frame(reply)
        except MemoryError as error:
            # Of several, each will be asked for alone.
            failed: list[Done | Failed] = [failed_batch(error)] if len(reply.batches) == 1 else []
            frame = frames.frame(Reply(reply.number, failed, reply.slot_size))
        frames.send_bytes(self._sock, frame)

    def _forget(self, message: Forget) -> None:
        if message.slots is None:
            self._loaders.pop(message.task, None)
            self._keeping.discard(message.task)
        gone = [k for k in self._slots if k[0] == message.task and (message.slots is None or k[1] in message.slots)]
        for key in gone:
            self._slots.pop(key).close()

    def _run(self, run: Run) -> Reply:
        slot = None if run.slot_size is None else self._slots[run.task, run.slot]
        started = time.perf_counter()
        batches: list[Done | Failed] = []
        slot_is_held = False
        try:
            memory, requests = _begin(run, slot, run.task in self._keeping)
        except BaseException as error:
            return Reply(run.number, [failed_batch(error)], None)
        for request in requests:
            begun = time.perf_counter()
            if batches and begun - started > _LONGEST_RUN_S:
                break
            batch = self._load(run.task, request, memory, begun)
            if memory.slot is not None and memory.slot.is_held:
                self._keeping.add(run.task)
                memory.batches_are_kept = slot_is_held = True
                batch = _moved(batch, memory.slot)
            batches.append(batch)
            if slot is not None:
                slot.begin_batch(len(batches))
        return Reply(run.number, batches, None if memory.slot is None else memory.slot.size, slot_is_held)

    def _load(self, task: int, request: Request, memory: _Memory, begun: float) -> Done | Failed:
        try:
            loader = self._loaders[task]
            if isinstance(loader, BaseException):
                raise loader
            note = memory.slot.begin_sample if memory.slot else ignore_position
            with allocating(memory.allocate):
                loaded = loader.load(request, note, loader.generators.seed)
        except BaseException as error:  # SystemExit and KeyboardInterrupt in user code are failures of user code
            return failed_batch(error, request)
        try:
            return _encode(loaded, memory, begun)
        except BaseException as error:
            return failed_batch(error, request, "result")


def _begin(run: Run, slot: SlotWriter | None, batches_are_kept: bool) -> tuple[_Memory, list[Request]]:
    requests = run.requests
    if isinstance(requests, int):
        if slot is None:
            raise RuntimeError("requests in a slot came without the slot")
        requests = pickle.loads(slot.read(requests))
    memory = _Memory(slot, batches_are_kept)
    if slot is not None and run.slot_size is not None:
        try:
            slot.begin(run.slot_size)
        except OSError as error:
            memory.slot, memory.refused = None, str(error)
    return memory, requests


def _check_received(complete: bool) -> None:
    """Ends this process where the kernel had no descriptor left to give it: a fresh one will have."""
    if not complete:
        sys.stderr.write(f"keras_mp: process {os.getpid()} has no descriptor left; does the code leave files open?\n")
        sys.exit(EXIT_NO_DESCRIPTOR)


def _unpack(message: Load, fds: list[int]) -> Loader | BaseException:
    """The loader, its arrays standing on shared memory; or why it cannot be had, kept for requests.

    User code may write to them, and changes pages of its own then.
    """
    try:
        small, large = (map_privately(fd, size) if size else None for fd, size in zip(fds, message.sizes, strict=True))
        places = {False: iter(message.small), True: iter(message.large)}
        buffers = []
        for is_large in message.order:
            offset, size = next(places[is_large])
            memory = large if is_large else small
            buffers.append(memory[offset : offset + size] if memory is not None else b"")
        if small is None:
            raise RuntimeError("the loader came without its pickle")
        offset, size = message.pickle
        loader: Loader = pickle.loads(small[offset : offset + size].data, buffers=buffers)
        return loader
    except BaseException as error:  # SystemExit too: it would end one worker after the other
        error.add_note("While unpickling the dataset's source and functions in the worker process.")
        return error
    finally:
        for fd in fds:
            os.close(fd)


def _encode(loaded: Loaded, memory: _Memory, begun: float) -> Done:
    buffers: pickling.Buffers = []
    header = pickling.dump_result(loaded.batch, buffers)
    slot = memory.slot
    if slot is not None:
        try:
            places = [slot.put(buffer) for buffer in buffers]
            place = slot.put(pickle.PickleBuffer(header)) if len(header) > _INLINE_BYTES else header
            return Done(place, places, loaded.failures, time.perf_counter() - begun)
        except OSError as error:
            memory.refused = memory.refused or str(error)
    payload = [buffer.raw().tobytes() for buffer in buffers]
    return Done(header, payload, loaded.failures, time.perf_counter() - begun, memory.refused or "no slot")


def _moved(batch: Done | Failed, slot: SlotWriter) -> Done | Failed:
    """The batch at places of its own, apart from the arrays in the slot that user code has kept."""
    if isinstance(batch, Failed):
        return batch
    places = [place for place in batch.buffers if isinstance(place, tuple)]
    try:
        return batch._replace(buffers=[slot.copy(place) for place in places]) if places else batch
    except OSError as error:
        header = batch.header if isinstance(batch.header, bytes) else slot.bytes_at(batch.header)
        return batch._replace(header=header, buffers=[slot.bytes_at(place) for place in places], refused=str(error))


def die_with_parent(lifeline: int) -> None:
    """Ends this process and its children when the parent's end of the pipe `lifeline` closes, whatever they are doing.

    On Linux the kernel is asked to send SIGKILL for it to the process group, which this process leads. That reaches a
    process that is stopped, or that holds the GIL in C code. (Not PR_SET_PDEATHSIG: that fires when the *thread* that
    started the process ends.) Elsewhere a thread watches.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
        try:
            if os.read(lifeline, 1) == b"":  # the parent died before the kernel was told
                os._exit(1)
        except BlockingIOError:
            pass
        return

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="keras_mp-lifeline").start()


def main(arguments: list[str]) -> None:
    """Runs the worker; `arguments` are the descriptors of socket, lifeline and the parent's stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # stty tostop: it would stop who writes from the background
    sock_fd, lifeline, stderr = map(int, arguments)
    die_with_parent(lifeline)
    sock = socket.socket(fileno=sock_fd)
    frame = frames.receive(sock)
    if frame is None:
        return
    hello: Hello = frame[0]
    sys.path[:] = hello.path
    if hello.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = hello.python_path
    for fd in (sock_fd, lifeline):
        os.set_inheritable(fd, False)
    said = os.pread(2, _MAX_SAID_BYTES, 0)
    os.dup2(stderr, 2)
    os.close(stderr)
    if said:  # by a sitecustomize, or the interpreter
        os.write(2, said)
    faulthandler.enable()
    frames.send(sock, os.getpid())
    try:
        Worker(sock).serve()
    except (ConnectionError, BrokenPipeError):
        pass  # the parent is gone


if __name__ == "__main__":
    # `-m` runs this file as `__main__`; messages must be of the classes that the parent imported.
    from keras_mp.workers.main import main as imported_main

    imported_main(sys.argv[1:])
