"""Takes from an interpreter what macOS lacks. On PYTHONPATH, Python loads it before all else, in workers as well."""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

# `waitid` came to macOS with Python 3.13, `preadv` with macOS 11.
_LACKING: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (os, ("MFD_CLOEXEC", "O_TMPFILE", "memfd_create", "pidfd_open", "preadv", "sched_getaffinity", "waitid")),
    (fcntl, ("F_SETSIG",)),
    (socket, ("MSG_CMSG_CLOEXEC", "MSG_NOSIGNAL")),
)


def _without_linux_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for which /proc and /sys are not there when keras_mp calls it; a test may look there."""

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if str(path).startswith(("/proc/", "/sys/")) and caller.startswith("keras_mp"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return function(path, *arguments, **options)

    return call


for _module, _names in _LACKING:
    for _name in _names:
        if hasattr(_module, _name):
            delattr(_module, _name)
builtins.open = _without_linux_files(open)
os.open = _without_linux_files(os.open)
os.stat = _without_linux_files(os.stat)
