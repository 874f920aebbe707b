"""A timeline of a dataset's batches as a file: `train.trace("trace.json")`, in Chrome's Trace Event format.

The file opens in https://ui.perfetto.dev (which works in the browser, and uploads nothing) and in chrome://tracing. The
format: "Trace Event Format", by the Chromium project; complete events ("X"), instants ("i") and metadata ("M").
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from keras_mp import checks
from keras_mp.errors import short_repr, warn_user
from keras_mp.loading.recording import CONSUMER, Event, Lane, Recorder, Recording

MAX_EVENTS = 200_000  # about 50 MB in memory, and 30 MB in the file


class Trace:
    """A recording that is under way, until `stop()`, the end of the `with` block, or the next `trace()`.

    Args:
        recorder: of the dataset.
        path: of the file; None: none is written.
        title: what the dataset is, in words.
        max_events: how many events are kept, the last ones.

    Attributes:
        path: of the file.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        OSError: there can be no such file.
    """

    def __init__(
        self, recorder: Recorder, path: str | os.PathLike[str] | None, title: str, max_events: int = MAX_EVENTS
    ) -> None:
        self.path = None if path is None else _checked_path(path)
        self._title = title
        self._process = os.getpid()
        self._started = time.time()
        self._recorder = recorder
        self._recording = Recording(checks.check_count(max_events, "max_events"))
        recorder.recording = self._recording

    @property
    def is_recording(self) -> bool:
        """Whether it goes on."""
        return self._recorder.recording is self._recording

    def save(self) -> None:
        """Writes the file as of now, in place of what was there; nothing if there is no path.

        Raises:
            OSError: it could not be written; what was there is still there.
        """
        if self.path is None:
            return
        temporary = _temporary(self.path)
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(self._text())
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def update(self) -> None:
        """Writes the file if the recording goes on; that it cannot be written is a warning, and no error."""
        if self.is_recording and self._process == os.getpid():
            try:
                self.save()
            except OSError as error:
                warn_user(f"keras_mp: the trace could not be written to {self.path}: {error}")

    def stop(self) -> None:
        """Ends the recording and writes the file. May be called twice.

        Raises:
            OSError: as `save`.
        """
        if self.is_recording:
            self._recorder.recording = None
            self.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, {'recording' if self.is_recording else 'stopped'})"

    @property
    def begun(self) -> float:
        """When the recording began, in seconds of `time.monotonic`."""
        return self._recording.begun

    def lanes(self) -> list[tuple[str, list[Event]]]:
        """What has been recorded: the name of each lane, and its events; that of the consumer comes first."""
        return lanes_of(self._recording.events()[0])

    def _text(self) -> Iterator[str]:
        events, dropped = self._recording.events()
        about = {
            "dataset": self._title,
            "recorder": "keras_mp",
            "clock": "microseconds of time.monotonic since trace() was called",
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "max_events": self._recording.max_events,
            "events_dropped": dropped,
            "note": f"the oldest {dropped} events were dropped, to bound memory" if dropped else "complete",
        }
        yield f'{{"displayTimeUnit": "ms",\n"otherData": {json.dumps(about)},\n"traceEvents": ['
        separator = "\n"
        for event in _chrome_events(lanes_of(events), self._recording.begun, self._process, self._title):
            yield separator + json.dumps(event)
            separator = ",\n"
        yield "\n]}\n"


def lanes_of(events: Iterable[Event]) -> list[tuple[str, list[Event]]]:
    """Events by lane, the consumer's first, then those of the workers in the order in which they came.

    Several threads may wait for batches at a time: then the consumer has a lane for each, so that waits on one lane
    never overlap.
    """
    by_lane: dict[Lane, list[Event]] = {}
    for event in events:
        by_lane.setdefault(event.lane, []).append(event)
    consumers: list[list[Event]] = []
    ends: list[float] = []
    for event in sorted(by_lane.pop(CONSUMER, []), key=lambda each: (each.begun, each.seconds is None)):
        free = next((number for number, end in enumerate(ends) if end <= event.begun), len(ends))
        if event.seconds is None:  # a moment may lie on any, best on that where the wait for it has just ended
            free = next((number for number, end in enumerate(ends) if abs(end - event.begun) < 1e-6), 0)
        if free == len(ends):
            consumers.append([])
            ends.append(0.0)
        consumers[free].append(event)
        ends[free] = max(ends[free], event.begun + (event.seconds or 0.0))
    named = [("consumer" if not number else f"consumer {number + 1}", lane) for number, lane in enumerate(consumers)]
    threads: dict[int, int] = {}
    for (pid, thread), lane in by_lane.items():
        if pid == os.getpid():
            threads[pid] = threads.get(pid, 0) + 1
            name = f"thread {threads[pid]} of this process (pid {pid})"
        else:
            name = f"worker (pid {pid})" if thread == 0 else f"worker (pid {pid}, thread {thread})"
        # Of two that begin together the one that holds the other comes first.
        named.append((name, sorted(lane, key=lambda each: (each.begun, -(each.seconds or 0.0)))))
    return named


def _chrome_events(
    lanes: list[tuple[str, list[Event]]], begun: float, pid: int, title: str
) -> Iterator[dict[str, Any]]:
    """The same as dictionaries for JSON: times are whole microseconds since `begun`."""
    yield {"ph": "M", "name": "process_name", "ts": 0, "pid": pid, "tid": 0, "args": {"name": f"keras_mp: {title}"}}
    for tid, (name, events) in enumerate(lanes, 1):
        yield {"ph": "M", "name": "thread_name", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "ts": 0, "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        for event in events:
            start = _microseconds(event.begun - begun)
            entry: dict[str, Any] = {"name": event.name, "cat": event.kind, "ts": start, "pid": pid, "tid": tid}
            if event.seconds is None:
                entry |= {"ph": "i", "s": "t"}
            else:  # both ends are rounded, so that what lies within another event still does
                entry |= {"ph": "X", "dur": _microseconds(event.begun + event.seconds - begun) - start}
            yield entry | {"args": _arguments(event)}


def _microseconds(seconds: float) -> int:
    return max(0, int(round(seconds * 1e6, 3)))  # clocks count nanoseconds; what is beyond is of the sums


def _arguments(event: Event) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if event.batch >= 0:
        arguments |= {"epoch": event.epoch, "batch": event.batch}
    if event.number >= 0:
        arguments["samples" if event.kind == "batch" else "index"] = event.number
    if event.text:
        arguments["text"] = event.text
    return arguments


def _checked_path(path: Any) -> pathlib.Path:
    """An absolute path at which a file can be written, tried by writing one beside it."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, say 'trace.json', or None, got {short_repr(path, 80)}")
    target = pathlib.Path(path).absolute()
    if target.is_dir() or not target.name:
        raise IsADirectoryError(f"path must name a file, but {str(target)!r} is a folder; add a name, say 'trace.json'")
    temporary = _temporary(target)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise type(error)(
            f"path={str(target)!r} cannot be written: {error.strerror}; name a file in a folder that exists and is "
            "yours to write to"
        ) from error
    return target


def _temporary(target: pathlib.Path) -> pathlib.Path:
    """A name in the same folder, for this thread: what is written there takes the target's place at once."""
    return target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
