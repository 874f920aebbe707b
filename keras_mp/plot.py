"""`plot_timeline`: what `trace()` has recorded, as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from keras_mp.errors import short_repr
from keras_mp.loading.recording import Event
from keras_mp.loading.timing import STAGES
from keras_mp.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By Okabe and Ito, told apart by those who see few colours, too.
_COLOURS = dict(zip(STAGES, ("#56B4E9", "#0072B2", "#999999", "#009E73", "#F0E442", "#CC79A7", "#E69F00"), strict=True))
_BATCH, _WAIT, _START, _LOST = "#E4E7EB", "#E58A5B", "#B8C0CC", "#5A2A27"
_MARKS = {
    "worker died": ("X", "#B00020"),
    "worker timed out": ("P", "#B00020"),
    "worker let go": ("v", "#5B6770"),
    "worker restarted": ("^", "#1B7F3B"),
    "worker started": ("^", "#5B6770"),
}
_BAR, _INNER = 0.78, 0.5  # heights of a batch and of the stages within, where lanes are 1 apart
_MOST_LABELS = 60  # batches that are numbered


class Traced(Protocol):
    """A dataset."""

    @property
    def timeline(self) -> Trace | None: ...


def plot_timeline(dataset: Traced, *, start_s: float = 0.0, end_s: float | None = None) -> Figure:
    """Draws what `dataset.trace()` has recorded: who did what when, and who waited.

    There is a lane for whoever takes the batches and one for each worker; in these a bar for each batch, and in that
    its stages in colours. It needs matplotlib: `pip install 'keras-mp[plot]'`.

    Args:
        dataset: one whose `trace()` has been called; it may be closed.
        start_s: where the part to draw begins, in seconds since `trace()` was called.
        end_s: where it ends; None: at the end.

    Returns:
        A `matplotlib.figure.Figure`: `plot_timeline(train).savefig("timeline.png")`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `dataset` is none of keras_mp's.
        ValueError: nothing has been recorded, or nothing in that part.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_timeline() needs matplotlib; install it with: pip install 'keras-mp[plot]'") from error
    if not hasattr(dataset, "timeline"):
        raise TypeError(f"dataset must be a PoolDataset or what parallelize() gives, got {short_repr(dataset, 80)}")
    if dataset.timeline is None:
        raise ValueError(
            "dataset has recorded nothing; call dataset.trace('trace.json'), or dataset.trace() for the picture alone, "
            "before it is used"
        )
    trace = dataset.timeline
    lanes = _within(trace.lanes(), trace.begun, start_s, end_s)
    if not lanes:
        until = "the end" if end_s is None else f"{end_s} s"
        raise ValueError(
            f"dataset has recorded nothing from start_s={start_s} s to {until} after trace() was called; train on it, "
            "or choose another part"
        )
    figure = Figure(figsize=(12, 1.6 + 0.62 * len(lanes)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    seen: dict[str, Any] = {}
    labels = sum(event.kind == "batch" for _, events in lanes for event in events) <= _MOST_LABELS
    for row, (_, events) in enumerate(lanes):
        _draw_bars(axes, row, events, seen)
        if labels:
            _number_batches(axes, row, events)
        _draw_marks(axes, row, events, seen)
    axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    last = max(event.begun + (event.seconds or 0.0) for _, events in lanes for event in events)
    axes.set_xlim(start_s, last + 0.01 * (last - start_s) if end_s is None else end_s)
    axes.set_xlabel("seconds since the recording began")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#D9DDE3", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(seen.values(), seen.keys(), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure


def _within(
    lanes: Iterable[tuple[str, list[Event]]], begun: float, start_s: float, end_s: float | None
) -> list[tuple[str, list[Event]]]:
    """The lanes with what lies, be it in part, between the two; times count from `begun` then."""
    found = []
    for name, events in lanes:
        moved = [event._replace(begun=event.begun - begun) for event in events]
        part = [
            event
            for event in moved
            if event.begun + (event.seconds or 0.0) >= start_s and (end_s is None or event.begun <= end_s)
        ]
        if part:
            found.append((name, part))
    return found


def _draw_bars(axes: Axes, row: int, events: list[Event], seen: dict[str, Any]) -> None:
    bars: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.seconds is not None:
            bars.setdefault(_bar_of(event), []).append((event.begun, event.seconds))
    # The stages lie on the batches.
    for name in sorted(bars, key=lambda each: each in STAGES):
        height = _INNER if name in STAGES else _BAR
        colour = _COLOURS.get(name) or {"batch": _BATCH, "wait": _WAIT, "start": _START, "lost": _LOST}[name]
        edges = {"edgecolor": "#9AA5B1", "linewidth": 0.6} if name == "batch" else {"linewidth": 0}
        drawn = axes.broken_barh(bars[name], (row - height / 2, height), facecolor=colour, **edges)
        seen.setdefault(_LEGEND.get(name, name), drawn)


_LEGEND = {"wait": "consumer waits", "start": "worker starts", "lost": "lost with its worker"}


def _bar_of(event: Event) -> str:
    if event.kind == "worker":
        return "start" if event.name == "start" else "lost"
    return {"batch": "batch", "consumer": "wait"}.get(event.kind, event.name)


def _number_batches(axes: Axes, row: int, events: list[Event]) -> None:
    for event in events:
        if event.kind == "batch" and event.seconds is not None:
            axes.text(
                event.begun + event.seconds / 2,
                row - (_INNER + _BAR) / 4,
                str(event.batch),
                ha="center",
                va="center",
                fontsize=6,
                color="#3E4C59",
                clip_on=True,
            )


def _draw_marks(axes: Axes, row: int, events: list[Event], seen: dict[str, Any]) -> None:
    for name, (marker, colour) in _MARKS.items():
        if times := [event.begun for event in events if event.name == name]:
            (drawn,) = axes.plot(
                times, [row] * len(times), marker, color=colour, markersize=9, markeredgecolor="white", zorder=5
            )
            seen.setdefault(name, drawn)
    if times := [event.begun for event in events if event.kind == "consumer" and event.seconds is None]:
        lines = axes.vlines(times, row - _BAR / 2, row + _BAR / 2, color="#323F4B", linewidth=0.8)
        seen.setdefault("batch handed out", lines)
