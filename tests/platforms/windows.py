"""Takes from this interpreter what Windows lacks, as far as what is imported already survives that."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from typing import Any

_LACKING: tuple[tuple[Any, str], ...] = (
    (faulthandler, "register unregister"),
    (
        os,
        "EX_TEMPFAIL MFD_CLOEXEC O_CLOEXEC O_TMPFILE WNOHANG fork getpgid getpgrp getuid killpg memfd_create mkfifo "
        "pread preadv pwrite pwritev register_at_fork sched_getaffinity setsid sysconf waitid",
    ),
    (signal, "SIGCHLD SIGCONT SIGKILL SIGPIPE SIGSTOP SIGTTOU SIGUSR1 pthread_sigmask setitimer"),
    (socket, "AF_UNIX MSG_CMSG_CLOEXEC MSG_NOSIGNAL SCM_RIGHTS recv_fds send_fds"),
)
_NO_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")


def become_windows() -> None:
    """Takes these away. Not `os.name`, which `pathlib` goes by."""
    for module in _NO_MODULES:
        sys.modules[module] = None  # type: ignore[assignment]
    for owner, names in _LACKING:
        for name in names.split():
            if hasattr(owner, name):
                delattr(owner, name)
    sys.platform = "win32"
