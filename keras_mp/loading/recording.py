"""What happened when, for a timeline: events, and where they are kept while somebody has them recorded.

Worker processes send the events of a batch along with it; whoever sees a worker start or end, or waits for a batch,
adds what it sees. All times are of `time.monotonic`, which the processes of one machine share.

NOTE (no lock): events come from the dispatcher's thread and from consumers, and a recording is read by finalisers too.
All that is done to it is one call into C, which the GIL makes atomic.
"""

from __future__ import annotations

import collections
import itertools
import os
import threading
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

Lane = tuple[int, int]  # process id, and the thread in it; 0: its main thread

CONSUMER: Lane = (0, 0)  # whoever takes the batches


class Event(NamedTuple):
    """Something that took a while, or happened, on a lane of the timeline.

    Attributes:
        lane: whose.
        kind: "batch": making one; "stage": a part of that; "consumer": whoever takes batches; "worker": its life.
        name: what it was, in a word or two; of a stage, one of `timing.STAGES`.
        begun: when, in seconds of `time.monotonic`.
        seconds: how long it took; None: it is a moment.
        epoch, batch: which batch it belongs to; -1: none.
        number: of a batch: how many samples; of a stage: the sample's index in the source, or -1 for all of them.
        text: more about it.
    """

    lane: Lane
    kind: Literal["batch", "stage", "consumer", "worker"]
    name: str
    begun: float
    seconds: float | None
    epoch: int = -1
    batch: int = -1
    number: int = -1
    text: str = ""


def own_lane() -> Lane:
    """The lane of this thread."""
    thread = threading.get_ident()
    return os.getpid(), 0 if thread == threading.main_thread().ident else thread


class Recording:
    """The last events since some moment: at most `max_events` of them, so that memory is bounded.

    Attributes:
        max_events: how many are kept.
        begun: that moment, in seconds of `time.monotonic`.
    """

    def __init__(self, max_events: int) -> None:
        self.max_events = max_events
        self.begun = time.monotonic()
        self._numbers = itertools.count()
        self._events: collections.deque[tuple[Event, int]] = collections.deque(maxlen=max_events)

    def add(self, events: Sequence[Event]) -> None:
        """Adds events; a batch stands before its stages, and the batches of a lane in order."""
        self._events.extend(zip(events, self._numbers, strict=False))

    def events(self) -> tuple[list[Event], int]:
        """Those that are kept, and how many older ones are not. A stage whose batch is not kept is left out."""
        numbered = list(self._events)
        complete: set[Lane] = set()
        events = []
        for event, _ in numbered:
            if event.kind == "batch":
                complete.add(event.lane)
            if event.kind != "stage" or event.lane in complete:
                events.append(event)
        added = numbered[-1][1] + 1 if numbered else 0
        return events, added - len(events)


class Recorder:
    """One dataset's switch: nothing is recorded, and nothing costs anything, until there is a recording.

    Attributes:
        recording: where events go; None: nowhere.
    """

    def __init__(self) -> None:
        self.recording: Recording | None = None

    def add(self, events: Sequence[Event]) -> None:
        """Adds events, if anybody wants them."""
        if (recording := self.recording) is not None and events:
            recording.add(events)

    def add_wait(self, epoch: int, batch: int, begun: float, error: str = "") -> None:
        """Whoever takes the batches has waited for one from `begun` until now, and has it, or the error."""
        if self.recording is None:
            return
        now = time.monotonic()
        wait = Event(CONSUMER, "consumer", f"wait for batch {batch}", begun, now - begun, epoch, batch, text=error)
        what = "failed" if error else "handed out"
        self.add([wait, Event(CONSUMER, "consumer", f"batch {batch} {what}", now, None, epoch, batch, text=error)])
