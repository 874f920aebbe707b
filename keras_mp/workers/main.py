"""The worker process: receives loaders and requests, writes batches into slots, replies.

It imports NumPy, cloudpickle and the standard library, and whatever the user's code imports; never keras or tensorflow
on its own account. It lives exactly as long as its parent wants it: see `die_with_parent`. It never decides what
becomes of a batch: it answers, or it ends.

Start: `python -P -m keras_mp.workers.main SOCKET LIFELINE STDERR`, three inherited descriptors. Until it is ready its
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
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from keras_mp.loading.base import Loader
from keras_mp.loading.collate import allocating
from keras_mp.loading.timing import WRITE, SlowestSamples, StageTimes
from keras_mp.memory import frames, pickling
from keras_mp.memory.files import create_memory_file
from keras_mp.memory.segment import map_privately
from keras_mp.memory.slot_writer import SlotWriter
from keras_mp.plan.request import Request
from keras_mp.workers.allocator import keep_freed_memory
from keras_mp.workers.messages import (
    EXIT_NO_DESCRIPTOR,
    NO_DESCRIPTOR,
    Done,
    Failed,
    Forget,
    Ready,
    Refused,
    Reply,
    Run,
    SetLoader,
    Setup,
    failed_batch,
)

# Frames longer than this go through the slot: the parent reads many workers' sockets, and a pickle in shared memory
# costs it nothing until the batch is wanted.
_INLINE_BYTES = 1 << 15

_MAX_SAID_BYTES = 1 << 16

# A run that has taken longer is answered with the batches that are ready: the rest may go to another worker.
_LONGEST_RUN_S = 0.01


class Worker:
    """The main loop and what it remembers between requests."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loaders: dict[int, Loader | BaseException] = {}
        self._slots: dict[tuple[int, int], SlotWriter] = {}  # by the numbers of loader and slot
        # Loaders whose code has kept an array in a slot beyond its batch. Their arrays are made in ordinary memory from
        # then on: in a slot, what is kept would be overwritten, or written to while the training process has the batch.
        self._keeping: set[int] = set()
        self._slowest: dict[int, SlowestSamples] = {}  # by the numbers of loaders

    def serve(self) -> None:
        """Answers requests until the parent closes the socket."""
        while (received := frames.receive(self._sock)) is not None:
            message, fds = received
            if isinstance(message, SetLoader):
                _check_received(len(fds) == len(message.sizes) + message.files)
                self._loaders[message.loader] = _unpack(message, fds)
            elif isinstance(message, Forget):
                self._forget(message)
            else:
                if fds:
                    self._slots[message.loader, message.slot] = SlotWriter(fds[0])
                _check_received((message.loader, message.slot) in self._slots)
                self._reply(self._run(message, self._slots[message.loader, message.slot]))

    def _reply(self, reply: Reply) -> None:
        try:
            frame = frames.frame(reply)
        except MemoryError as error:
            # Of several, each will be asked for alone.
            failed: list[Done | Failed | Refused] = [failed_batch(error)] if len(reply.batches) == 1 else []
            frame = frames.frame(reply._replace(batches=failed))
        frames.send_bytes(self._sock, frame)

    def _forget(self, message: Forget) -> None:
        if message.slots is None:
            self._loaders.pop(message.loader, None)
            self._keeping.discard(message.loader)
            self._slowest.pop(message.loader, None)
        gone = [k for k in self._slots if k[0] == message.loader and (message.slots is None or k[1] in message.slots)]
        for key in gone:
            self._slots.pop(key).close()

    def _run(self, run: Run, slot: SlotWriter) -> Reply:
        started = time.perf_counter()
        batches: list[Done | Failed | Refused] = []
        slot_is_held = False
        try:
            slot.begin(run.slot_size)
            requests = pickle.loads(slot.read(run.requests)) if isinstance(run.requests, int) else run.requests
        except OSError as error:  # of several, the others will be asked for again
            return Reply(run.number, [_refused(error, run.slot_size)], run.slot_size)
        except BaseException as error:
            return Reply(run.number, [failed_batch(error)], run.slot_size)
        times = StageTimes(self._slowest.setdefault(run.loader, SlowestSamples()), requests[0].traced)
        for request in requests:
            begun = time.perf_counter()
            if batches and begun - started > _LONGEST_RUN_S:
                break
            batch = self._load(run.loader, request, slot, begun, times)
            if slot.is_held:
                self._keeping.add(run.loader)
                slot_is_held = True
                batch = _moved(batch, slot)
            batches.append(batch)
            slot.begin_batch(len(batches))
        return Reply(run.number, batches, slot.size, slot_is_held, times.result())

    def _load(
        self, number: int, request: Request, slot: SlotWriter, begun: float, times: StageTimes
    ) -> Done | Failed | Refused:
        def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
            if number not in self._keeping:
                # Where memory is refused, that is no fault of the code that asks: its batch will be refused it.
                try:
                    return slot.empty(shape, dtype)
                except OSError:
                    pass
            return np.empty(shape, dtype)

        try:
            loader = self._loaders[number]
            if isinstance(loader, BaseException):
                raise loader
            with allocating(allocate):
                loaded = loader.load(request, slot.begin_sample, loader.generators.seed, times)
        except BaseException as error:  # SystemExit and KeyboardInterrupt in user code are failures of user code
            return failed_batch(error, request)
        times.end_sample()
        buffers: pickling.Buffers = []
        try:
            header = pickling.dump_result(loaded.batch, buffers)
        except BaseException as error:
            return failed_batch(error, request, "result")
        try:
            places = [slot.put(buffer) for buffer in buffers]
            where = slot.put(pickle.PickleBuffer(header)) if len(header) > _INLINE_BYTES else header
            times.lap(WRITE)
            return Done(where, places, loaded.failures, time.perf_counter() - begun)
        except OSError as error:
            return _refused(error, slot.end + sum(buffer.raw().nbytes for buffer in buffers))
        except Exception as error:
            return failed_batch(error, request, "result")


def _check_received(complete: bool) -> None:
    if not complete:
        _end_without_descriptor()


def _end_without_descriptor() -> NoReturn:
    """Ends this process where the kernel had no descriptor left to give it: a fresh one will have."""
    sys.stderr.write(f"keras_mp: process {os.getpid()} has no descriptor left; does the code leave files open?\n")
    sys.exit(EXIT_NO_DESCRIPTOR)


def _unpack(message: SetLoader, fds: list[int]) -> Loader | BaseException:
    """The loader, its arrays standing on shared memory; or why it cannot be had, kept for requests.

    User code may write to them, and changes pages of its own then.
    """
    try:
        small, large = (
            map_privately(fd, size) if size else None for fd, size in zip(fds[:2], message.sizes, strict=True)
        )
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
        files, fds = fds[2:], fds[:2]
        if files:
            loader.attach(files)
        return loader
    except BaseException as error:  # SystemExit too: it would end one worker after the other
        error.add_note("While unpickling the dataset's source and functions in the worker process.")
        return error
    finally:
        for fd in fds:
            os.close(fd)


def _moved(batch: Done | Failed | Refused, slot: SlotWriter) -> Done | Failed | Refused:
    """The batch at places of its own, apart from the arrays in the slot that user code has kept."""
    if not isinstance(batch, Done):
        return batch
    try:
        return batch._replace(buffers=[slot.copy(place) for place in batch.buffers])
    except OSError as error:
        return _refused(error, slot.end + batch.nbytes)


def _refused(error: OSError, nbytes: int) -> Refused:
    if error.errno in NO_DESCRIPTOR:
        _end_without_descriptor()
    return Refused(OSError(error.errno, error.strerror), nbytes, f"process {os.getpid()}")


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


def _write_where_on_signal() -> int:
    """Has SIGUSR1 write the main thread's traceback to a memory file, also where C code holds the GIL."""
    try:
        where = create_memory_file("traceback")
    except OSError:
        return -1
    faulthandler.register(signal.SIGUSR1, file=where, all_threads=False)
    return where


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
    setup: Setup = frame[0]
    sys.path[:] = setup.path
    if setup.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = setup.python_path
    for fd in (sock_fd, lifeline):
        os.set_inheritable(fd, False)
    said = os.pread(2, _MAX_SAID_BYTES, 0)
    os.dup2(stderr, 2)
    os.close(stderr)
    if said:  # by a sitecustomize, or the interpreter
        os.write(2, said)
    faulthandler.enable()
    keep_freed_memory()
    frames.send(sock, Ready(os.getpid(), _write_where_on_signal()))
    try:
        Worker(sock).serve()
    except (ConnectionError, BrokenPipeError):
        pass  # the parent is gone


if __name__ == "__main__":
    # `-m` runs this file as `__main__`; messages must be of the classes that the parent imported.
    from keras_mp.workers.main import main as imported_main

    imported_main(sys.argv[1:])
