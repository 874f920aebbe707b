"""Plots of a report as inline SVG: no library to draw them, none to show them, and sharp at every size.

Each takes numbers and returns one `<svg>`; colours are those of the page's style (`page`), text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from keras_mp import sizing
from keras_mp.report.words import count, seconds, share

WIDTH = 640
_BAR, _LINE = 22, 30  # heights


def stacked(parts: Sequence[tuple[str, float]]) -> str:
    """One bar of parts that make up a whole, with their names, times and shares below.

    Args:
        parts: name and seconds of each.
    """
    total = sum(value for _, value in parts)
    if total <= 0:
        return ""
    shapes, x = [], 0.0
    columns = 2
    for number, (name, value) in enumerate(parts):
        width = value / total * WIDTH
        label = html.escape(f"{name}: {seconds(value)}, {share(value / total)}")
        shapes.append(
            f'<rect class="c{number % 8}" x="{x:.1f}" y="0" width="{width:.1f}" height="{_BAR}">'
            f"<title>{label}</title></rect>"
        )
        x += width
        left, top = (number % columns) * WIDTH // columns, _BAR + 12 + (number // columns) * 20
        shapes.append(f'<rect class="c{number % 8}" x="{left}" y="{top}" width="12" height="12"></rect>')
        shapes.append(f'<text x="{left + 18}" y="{top + 11}">{label}</text>')
    rows = -(-len(parts) // columns)
    return _svg(_BAR + 12 + rows * 20, shapes, ", ".join(name for name, _ in parts))


def shares(rows: Sequence[tuple[str, float]]) -> str:
    """A bar for each name, of a share from 0 to 1."""
    left, right = 130, 50
    shapes = []
    for number, (name, value) in enumerate(rows):
        y, full = number * _LINE, WIDTH - left - right
        shapes += [
            f'<text x="0" y="{y + 16}">{html.escape(name)}</text>',
            f'<rect class="empty" x="{left}" y="{y}" width="{full}" height="{_BAR}"></rect>',
            f'<rect class="c0" x="{left}" y="{y}" width="{value * full:.1f}" height="{_BAR}"></rect>',
            f'<text x="{left + full + 8}" y="{y + 16}">{share(value)}</text>',
        ]
    return _svg(len(rows) * _LINE, shapes, "busy share of each worker")


def throughput(service_s: float, step_s: float, workers: int, useful: int | None) -> str:
    """Batches a second against the number of workers, as the model of `sizing` has it.

    Args:
        service_s: seconds of one worker for one batch.
        step_s: seconds of a step whose batch is there.
        workers: how many there were; 0: not known.
        useful: as many as the cores can keep at work; None: cores are no limit.
    """
    needed = sizing.workers_to_keep_up(service_s, step_s)
    best = min(needed, useful or needed)
    most = max(4, workers, best) + 2
    if service_s <= 0 or step_s <= 0 or most > 1000:
        return ""
    left, top, height = 60, 24, 150
    full, demand = WIDTH - left - 20, 1 / step_s
    rates = [min(number, useful or number) / service_s for number in range(most + 1)]
    highest = max(min(max(rates), 1.6 * demand), demand) * 1.15

    def place(number: float, rate: float) -> str:
        return f"{left + number / most * full:.1f},{top + height - min(rate / highest, 1) * height:.1f}"

    def dot(number: int, name: str, kind: str) -> list[str]:
        x, y = place(number, min(rates[number], demand)).split(",")
        return [
            f'<circle class="{kind}" cx="{x}" cy="{y}" r="6"><title>{name}: {number}</title></circle>',
        ]

    supply = " ".join(place(number, min(rate, highest)) for number, rate in enumerate(rates))
    bottom = top + height
    every = max(1, -(-most // 12))
    shapes = [
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{left + full}" y2="{bottom}"></line>',
        f'<line class="axis" x1="{left}" y1="{top}" x2="{left}" y2="{bottom}"></line>',
        *(
            f'<text class="tick" x="{place(number, 0).split(",")[0]}" y="{bottom + 16}">{number}</text>'
            for number in range(0, most + 1, every)
        ),
        f'<text class="tick" x="{left + full / 2}" y="{bottom + 34}">workers</text>',
        f'<text x="0" y="{top - 10}">batches a second</text>',
        f'<polyline class="demand" points="{place(0, demand)} {place(most, demand)}"></polyline>',
        f'<text class="end" x="{left - 6}" y="{float(place(0, demand).split(",")[1]) + 4:.1f}">{demand:.3g}</text>',
        f'<polyline class="supply" points="{supply}"></polyline>',
    ]
    legend = [("supply", "what workers give"), ("demand", f"what the training takes ({seconds(step_s)} a step)")]
    if 0 < workers <= most:
        shapes += dot(workers, "now", "now")
        legend.append(("now", f"now: {count(workers, 'worker')}"))
    shapes += dot(best, "advised", "advised")
    legend.append(
        ("advised", f"{count(best, 'worker')} would keep up" if best >= needed else f"{best}: the cores' limit")
    )
    for number, (kind, name) in enumerate(legend):
        x, y = left + (number % 2) * full / 2, bottom + 48 + (number // 2) * 20
        shapes.append(f'<rect class="{kind} key" x="{x}" y="{y}" width="12" height="12"></rect>')
        shapes.append(f'<text x="{x + 18}" y="{y + 11}">{html.escape(name)}</text>')
    return _svg(bottom + 48 + 20 * -(-len(legend) // 2), shapes, "batches a second against workers")


def _svg(height: float, shapes: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label)}">{"".join(shapes)}</svg>'
    )
