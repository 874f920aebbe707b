"""A lane's next batch, on its way from the engine that loads it.

All of it happens under the lock of `LaneEngine`, but for the waiting.
"""

from __future__ import annotations

import threading
from typing import Any

from keras_mp.engines.base import Engine
from keras_mp.loading.base import Loaded
from keras_mp.plan.pieces import Report
from keras_mp.plan.request import Request


class Turn:
    """A batch that has been asked for, or will be.

    Attributes:
        lane: whose turn it is; None: it is made of what is left over in several.
        request: what is asked for.
        is_asked: whether it is, or was; not as long as the lane's turn before has not come.
        is_seen: whether the walk knows that it has come.
        loaded, error: what has come, one of the two.
    """

    def __init__(self, lane: int | None, request: Request) -> None:
        self.lane = lane
        self.request = request
        self.is_asked = self.is_seen = False
        self.loaded: Loaded | None = None
        self.error: BaseException | None = None
        self._job: Any = None
        self._waits = threading.Lock()  # held by whoever takes the job's result

    @property
    def has_come(self) -> bool:
        """Whether it needs no waiting."""
        return self.loaded is not None or self.error is not None

    @property
    def report(self) -> Report | None:
        """What reading came to."""
        return self.loaded.batch.report if self.loaded is not None else None

    @property
    def is_batch(self) -> bool:
        """Whether it is one: the lane had enough samples."""
        report, reading = self.report, self.request.reading
        return report is None or reading is None or self.lane is None or report.found == reading.pieces[0].size

    def ask(self, engine: Engine) -> None:
        """Asks for it."""
        self.loaded, self.is_asked, self.is_seen = None, True, False
        (self._job,) = engine.submit([self.request])

    def poll(self, engine: Engine) -> None:
        """Takes it if it has come."""
        if not self.has_come and self.is_asked and self._waits.acquire(blocking=False):
            try:
                if not self.has_come and engine.is_ready(self._job):
                    self._take(engine)
            finally:
                self._waits.release()

    def wait(self, engine: Engine) -> None:
        """Waits until it has come."""
        with self._waits:
            if not self.has_come:
                self._take(engine)

    def cancel(self, engine: Engine) -> None:
        """Nobody wants it, and nobody waits for it."""
        if self.is_asked and not self.has_come:
            engine.cancel(self._job)

    def _take(self, engine: Engine) -> None:
        try:
            self.loaded = engine.result(self._job)
        except Exception as error:
            self.error = error
        self._job = None
