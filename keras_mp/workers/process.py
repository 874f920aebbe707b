"""Starting one worker process, and ending it: descriptors, environment, exit status. Knows nothing of batches.

A worker leads a process group of its own, so that the processes which the user's code starts in it end with it (P4):
whoever kills a worker, parent or kernel, kills its group. A child that was put in a session or group of its own is out
of reach.

NOTE (process ids): a group is killed before its leader is reaped. Until then its number cannot become anyone else's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from keras_mp.memory import frames
from keras_mp.memory.files import create_memory_file
from keras_mp.workers.messages import EXIT_NO_DESCRIPTOR, Setup

KILL_GRACE_S = 3.0  # what a killed process gets to be gone: giving back much memory takes a while
_STDERR_TAIL_BYTES = 8192
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def worker_environment(extra: Mapping[str, str] | None, threads: int) -> dict[str, str]:
    """The environment of a worker: the parent's, numeric libraries held to `threads`, no GPU, then `extra`.

    It must be complete before the process starts: BLAS and OpenMP read theirs when they are loaded.
    """
    package = str(pathlib.Path(__file__).resolve().parents[2])
    path = (extra or os.environ).get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    return {
        **os.environ,
        **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
        **dict.fromkeys(_DEVICE_VARIABLES, ""),
        **(extra or {}),
        "PYTHONPATH": package if not path else package + os.pathsep + path,
    }


class Process:
    """One worker process: its socket, its lifeline, and until it is ready its captured stderr."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        python_path = environment["PYTHONPATH"].partition(os.pathsep)[2] or None  # without this package's own place
        extra_path = [] if python_path is None else python_path.split(os.pathsep)
        setup = Setup([*(p for p in extra_path if p not in sys.path), *sys.path], python_path)
        self.ready = False
        self._where_fd = -1
        self._is_stopped = False
        self.started = self.ready_at = time.monotonic()
        self.killed_at: float | None = None
        self._stderr_file = self._lifeline = -1
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
            self.sock, theirs = socket.socketpair()
            undo.callback(self.abandon)
            given.callback(theirs.close)
            self._stderr_file = create_memory_file()
            lifeline, self._lifeline = os.pipe()
            given.callback(os.close, lifeline)
            stderr = _duplicate_stderr()
            given.callback(os.close, stderr)
            inherited = (theirs.fileno(), lifeline, stderr)
            # exec, not fork: a copy of a process whose TensorFlow threads hold locks may never get them.
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "keras_mp.workers.main", *map(str, inherited)],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stderr=self._stderr_file,
                env=dict(environment),
                process_group=0,
            )
            self.pid = self._popen.pid
            undo.callback(self.end)
            with contextlib.suppress(OSError):  # it is dead already, and the end of its socket will tell
                frames.send(self.sock, setup)
            self.sock.setblocking(False)
            undo.pop_all()

    def set_ready(self, where_fd: int) -> None:
        """The worker has set itself up: from now on its stderr is ours.

        Args:
            where_fd: its own descriptor of the memory file in which it says where it stands; -1: it does not.
        """
        self._where_fd = where_fd
        self.ready, self.ready_at = True, time.monotonic()
        self._close_stderr_file()

    def captured_stderr(self) -> str:
        """What a worker that did not get ready wrote to its stderr."""
        if self._stderr_file < 0:
            return ""
        size = os.fstat(self._stderr_file).st_size
        start = max(0, size - _STDERR_TAIL_BYTES)
        return os.pread(self._stderr_file, size - start, start).decode(errors="replace").strip()

    def ask_where(self) -> None:
        """Has the worker write down where in its code it stands, whatever it is doing; `where` reads that later."""
        if self._where_fd >= 0 and self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)

    def where(self) -> str:
        """Its traceback, as it was when asked; empty if that cannot be had."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/fd/{self._where_fd}") as file:
            return file.read()[-_STDERR_TAIL_BYTES:]
        return ""

    def is_stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP), which no socket ever tells."""
        if not hasattr(os, "waitid"):
            self._follow()
            return self._is_stopped
        try:
            status = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return status is not None and status.si_code == os.CLD_STOPPED

    def has_ended(self) -> bool:
        """Whether the process has ended. Its socket may stay open without it, or close while it lives."""
        if self._popen.returncode is not None:
            return True
        if not hasattr(os, "waitid"):
            self._follow()
            return self._popen.poll() is not None
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the program has its children reaped by the system (SIGCHLD is ignored)
            return True

    def _follow(self) -> None:
        """Takes what the system tells of the process, each change once (macOS before Python 3.13)."""
        while self._popen.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if not pid:
                return
            self._is_stopped = os.WIFSTOPPED(status)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                self._popen.returncode = os.waitstatus_to_exitcode(status)

    def ends_by(self, deadline: float) -> bool:
        """Waits until the process has ended; whether it has by `deadline`, a time of `time.monotonic`."""
        pause_s = 0.0005
        while not self.has_ended():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause_s, left))
            pause_s = min(2 * pause_s, 0.05)
        return True

    def kill(self) -> None:
        """SIGKILL for the process and its children; the socket's end is what tells the pool."""
        if self.killed_at is None:
            self.killed_at = time.monotonic()
        if self._popen.returncode is None:
            self._kill_group()

    def hang_up(self) -> None:
        """Closes the socket: an idle worker ends by itself."""
        self.sock.close()

    def settle(self) -> str:
        """Lets go of a process that has ended, and of what it left running; returns how it ended.

        One that even SIGKILL does not end, say as it waits for a file system that hangs, is left to itself.
        """
        ended = self.has_ended()
        if ended:
            self._kill_group()
            self._popen.wait()
        else:
            with contextlib.suppress(RuntimeError):  # no thread is to be had: it will stay as a zombie
                threading.Thread(target=self._popen.wait, daemon=True, name="keras_mp-unkillable").start()
        self.abandon()
        return f"ended with {describe_exit(self._popen.returncode)}" if ended else "did not end"

    def end(self) -> None:
        """Kills the process, and waits for its end as long as that makes sense."""
        self.kill()
        self.ends_by(time.monotonic() + KILL_GRACE_S)
        self.settle()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none of them lives (macOS: all are zombies)
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._popen.returncode

    def abandon(self) -> None:
        """Closes this process's descriptors, and nothing else: all that a forked copy of the parent may do."""
        self.sock.close()
        self._close_stderr_file()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _close_stderr_file(self) -> None:
        if self._stderr_file >= 0:
            os.close(self._stderr_file)
            self._stderr_file = -1


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return os.open(os.devnull, os.O_WRONLY)  # the parent closed its stderr


def describe_exit(code: int) -> str:
    """An exit code in words: "signal SIGKILL" or "exit code 3"."""
    if code == EXIT_NO_DESCRIPTOR:
        return f"exit code {code} (it had no file descriptor left)"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
