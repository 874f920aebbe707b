"""What a test may leave behind: nothing. Counts processes, threads, descriptors and shared memory before and after.

Keras, TensorFlow and the interpreter open things of their own at first use, so only the kinds that keras_mp uses count.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

# Every process that a test starts inherits this, so its orphans are found too, whoever adopted them.
_MARK = "KERAS_MP_TEST_RUN"
os.environ.setdefault(_MARK, uuid.uuid4().hex)
if not os.environ[_MARK].endswith(_own := os.environ.get("PYTEST_XDIST_WORKER", "")):
    os.environ[_MARK] += _own  # tests that run side by side are none of each other's

_DESCRIPTOR_KINDS = ("socket:", "pipe:", "/memfd:keras_mp", "anon_inode:[eventpoll]")
_DEADLINE_S = 10.0
_INTERVAL_S = 0.02

Census = dict[str, str]
_strangers: set[str] = set()  # processes that are none of ours


def eventually(condition: Callable[[], bool], deadline_s: float = _DEADLINE_S) -> bool:
    """Polls `condition`; whether it came true before the deadline. For what no event tells, such as a process's end."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return condition()
        time.sleep(_INTERVAL_S)
    return True


def take_census(known: Census | None = None) -> Census:
    """All that is there now and might be a leak: identity -> description. What is in `known` is not looked at again."""
    found: Census = {}
    for find in (_processes, _threads, _descriptors, _named_memory):
        find(found, known or {})
    return found


def leftovers(before: Census, ours_only: bool = False) -> list[str]:
    """Descriptions of what is there now and was not in `before`; `ours_only`: of what bears the name of keras_mp."""
    left = [text for identity, text in take_census(before).items() if identity not in before]
    return [text for text in left if not ours_only or "keras_mp" in text]


def wait_until_nothing_is_left(before: Census, deadline_s: float = _DEADLINE_S, ours_only: bool = False) -> list[str]:
    """Waits until nothing new is left, since pools shut down on a thread of their own; returns what stayed."""
    left = leftovers(before, ours_only)
    if not left:
        return left

    def clean() -> bool:
        gc.collect()  # slow with TensorFlow loaded, so only where something is left
        left[:] = leftovers(before, ours_only)
        return not left

    eventually(clean, deadline_s)
    return left


def worker_pids() -> list[int]:
    """The keras_mp workers of this process that are alive."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "keras_mp.workers.main" in child.cmdline():
                found.append(child.pid)
        except psutil.Error:  # gone, or a zombie
            continue
    return found


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has, though whoever adopted it may not reap it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _processes(found: Census, known: Census) -> None:
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        identity = f"process {process.pid} since {_started(process)}"
        if identity in _strangers or process.pid == os.getpid():
            continue
        if identity in known:
            found[identity] = known[identity]
        elif process.pid in children or _has_mark(process):
            found[identity] = _describe(process)
        else:
            _strangers.add(identity)


def _started(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.Error:
        return 0.0


def _has_mark(process: psutil.Process) -> bool:
    try:
        return bool(process.environ().get(_MARK) == os.environ[_MARK])
    except psutil.Error:  # somebody else's, or gone
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({process.status()}): {' '.join(process.cmdline())[:200]}"
    except psutil.Error as error:
        return f"process {process.pid}: {error}"


def _threads(found: Census, known: Census) -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("keras_mp"):
            found[f"thread {thread.native_id} {thread.name}"] = f"thread {thread.name}"


def _descriptors(found: Census, known: Census) -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            inode = os.stat(int(name)).st_ino
        except OSError:  # the descriptor of the listing itself
            continue
        if target.startswith(_DESCRIPTOR_KINDS):
            # Numbers are reused at once, and all memory files have the same name: the inode tells them apart.
            found[f"descriptor {name} {target} {inode}"] = f"descriptor {name}: {target}"


def _named_memory(found: Census, known: Census) -> None:
    for path in Path("/dev/shm").glob("*keras_mp*"):
        found[f"file {path}"] = f"shared memory {path}"
