"""Whether the system has what worker processes stand on: files in memory, sockets that carry them, process groups.

Linux and macOS do. Windows does not: there batches are loaded by threads, or by the processes of an executor.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import sys

_NEEDED = (
    (os, ("pread", "pwrite", "killpg")),
    (socket, ("AF_UNIX", "SCM_RIGHTS", "recv_fds")),
)


@functools.cache
def missing_for_workers() -> str:
    """What worker processes need and this system lacks, in words; empty where they can be had."""
    missing = [f"{module.__name__}.{name}" for module, names in _NEEDED for name in names if not hasattr(module, name)]
    if importlib.util.find_spec("fcntl") is None:
        missing.append("fcntl")
    return f"this system ({sys.platform}) lacks {', '.join(missing)}" if missing else ""
