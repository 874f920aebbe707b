"""Whether to go on starting workers, going by how the starts before went. Starts none itself."""

from __future__ import annotations

import time

from keras_mp.workers.faults import WorkerEnd

_TRIES = 3
_PATIENCE_S = 30.0  # for starts that somebody's SIGKILL ends, say the system's, short of memory
_PAUSE_S = 10.0  # before another try, while the workers that there are do the work


class StartRecord:
    """How a pool's starts went."""

    def __init__(self) -> None:
        self._failed = 0
        self._failing_since = 0.0
        self._pause_until = 0.0

    @property
    def is_pausing(self) -> bool:
        """Whether it is too early for another try."""
        return time.monotonic() < self._pause_until

    def pause(self) -> None:
        """It was of no use; the next try is for later."""
        self._pause_until = time.monotonic() + _PAUSE_S

    def add_success(self) -> None:
        """A worker is ready."""
        self._failed = 0

    def add_failure(self, end: WorkerEnd) -> bool:
        """A worker ended before it was ready; whether that shows that none can start.

        One exit of its own does, or three faults. A kill from outside says little, unless they go on for a while.
        """
        now = time.monotonic()
        if not self._failed:
            self._failing_since = now
        self._failed += 1
        timed_out = end.cause == "late" and not end.was_stopped
        if end.is_from_outside:
            hopeless = now - self._failing_since > _PATIENCE_S
        else:
            # 0 is all that is known of an end where the program has the system reap its children (SIGCHLD ignored).
            hopeless = (end.exit_code or 0) > 0 or timed_out or self._failed >= _TRIES
        if hopeless:
            self._failed = 0
            self.pause()
        return hopeless
