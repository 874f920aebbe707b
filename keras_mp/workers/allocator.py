"""The C library's allocator in a worker: large temporaries are used again, not mapped and zeroed anew for each batch.

glibc maps every block of 32 MiB and more (smaller ones at first, too) by itself and gives it back when it is freed. A
batch's temporaries then cost more to get, page by page, than to compute with. So they come from the heap here, and the
heap keeps what has been freed at its end, up to `KEPT_BYTES`. Blocks of that size and more are mapped as ever.
"""

from __future__ import annotations

import ctypes
import os

KEPT_BYTES = 256 << 20
_TOP_PAD_BYTES = 16 << 20  # the heap grows by so much at once
_OLD_MAX_BYTES = 32 << 20  # glibc before 2.36 may take no higher threshold
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # M_… in malloc.h
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> None:
    """Sets that up, unless the environment has settings of the user's for it. Does nothing without glibc."""
    if any(name in os.environ for name in _SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(_MMAP_THRESHOLD, KEPT_BYTES):
        mallopt(_MMAP_THRESHOLD, _OLD_MAX_BYTES)
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_TOP_PAD, _TOP_PAD_BYTES)
