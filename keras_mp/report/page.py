"""A report as HTML: a piece for a notebook, and a file of its own that refers to nothing outside it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from keras_mp.report import charts, rows
from keras_mp.report.load import Load
from keras_mp.stats import Stats, Training

# Names are under one class, so that a notebook's own look stays what it is.
_STYLE = """
.keras-mp { font: 14px/1.45 system-ui, sans-serif; max-width: 860px; padding: 4px 16px 16px }
.keras-mp { color: #1d2733; background: #fff }
.keras-mp h2 { font-size: 15px; margin: 22px 0 8px }
.keras-mp .name { font: 12px/1.5 ui-monospace, monospace; color: #5a6675; overflow-wrap: anywhere }
.keras-mp ul.advice { margin: 10px 0; padding: 10px 14px 10px 30px }
.keras-mp ul.advice { background: #fff6e0; border-left: 4px solid #e8a200 }
.keras-mp ul.advice li { color: #1d2733; margin: 3px 0; overflow-wrap: anywhere }
.keras-mp table { border-collapse: collapse; margin: 0; color: inherit; font-size: 13px }
.keras-mp th, .keras-mp td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; background: none }
.keras-mp th, .keras-mp td { border-bottom: 1px solid #e3e7ec; overflow-wrap: anywhere }
.keras-mp th { font-weight: 600 }
.keras-mp td:first-child { overflow-wrap: normal }
.keras-mp td.number, .keras-mp th.number { text-align: right; white-space: nowrap }
.keras-mp svg { width: 100%; max-width: 640px; height: auto; display: block; overflow: visible }
.keras-mp svg text { font-size: 12px; fill: #1d2733 }
.keras-mp svg .tick { text-anchor: middle; fill: #5a6675 } .keras-mp svg .end { text-anchor: end; fill: #5a6675 }
.keras-mp svg .axis { stroke: #9aa5b1 } .keras-mp svg .empty { fill: #e9edf1 }
.keras-mp svg polyline { fill: none; stroke-width: 2.5 }
.keras-mp svg .supply { stroke: #2f6fb7 } .keras-mp svg .demand { stroke: #c2410c; stroke-dasharray: 6 4 }
.keras-mp svg .supply.key { fill: #2f6fb7; stroke: none } .keras-mp svg .demand.key { fill: #c2410c; stroke: none }
.keras-mp svg .now { fill: #5a6675 } .keras-mp svg .advised { fill: #15803d }
.keras-mp svg .c0 { fill: #2f6fb7 } .keras-mp svg .c1 { fill: #e8a200 } .keras-mp svg .c2 { fill: #15803d }
.keras-mp svg .c3 { fill: #9333a8 } .keras-mp svg .c4 { fill: #0e8a98 } .keras-mp svg .c5 { fill: #c2410c }
.keras-mp svg .c6 { fill: #7a8594 } .keras-mp svg .c7 { fill: #c9d0d8 }
"""


def fragment(
    name: str,
    advice: Sequence[str],
    facts: Sequence[tuple[str, str]],
    stats: Stats,
    training: Training | None,
    cores: int,
) -> str:
    """The report as one `<div>` with its style.

    Args:
        name: the dataset, in words.
        advice: sentences.
        facts: names and values.
        stats, training, cores: what the plots are made of.
    """
    load = Load.of(stats, training, cores)
    parts = [f'<div class="name">{html.escape(name)}</div>']
    if advice:
        parts.append(f'<ul class="advice">{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in advice)}</ul>')
    if load.step_s is not None and load.cycle_s > 0:
        step = max(0.0, load.cycle_s - load.wait_s)
        who = "fit" if load.of_fit else "the training"
        parts += _section(
            f"What {who} does with its time, per batch",
            charts.stacked([("steps", step), ("waiting for data", load.wait_s)]),
        )
    if load.step_s and load.service_s:
        picture = charts.throughput(load.service_s, load.step_s, load.workers, load.useful)
        parts += _section("How many workers would do", picture)
    if stats.work_s:
        batches = max(1, stats.loaded_batches)
        work = [(stage, each.total_s / batches) for stage, each in stats.stages.items() if each.total_s > 0]
        parts += _section(
            "What making a batch takes", charts.stacked([*work, ("other", rows.other_s(stats) / batches)])
        )
        table = _table(
            ["stage", "total", "a batch", "share", "slowest samples"], rows.stage_rows(stats), numbers=(1, 2, 3)
        )
        parts.append(table)
    workers = rows.worker_shares(stats, training)
    if workers:
        parts += _section("How busy each worker was", charts.shares(workers))
    parts += _section("Numbers", _table([], facts))
    return f'<div class="keras-mp"><style>{_STYLE}</style>{"".join(parts)}</div>'


def document(name: str, body: str) -> str:
    """A whole page around a fragment."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>keras_mp: {html.escape(name)}</title></head>\n<body>{body}</body></html>\n"
    )


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{html.escape(title)}</h2>", content] if content else []


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cells(tag: str, line: Sequence[str]) -> str:
        kinds = [' class="number"' if place in numbers else "" for place in range(len(line))]
        filled = zip(kinds, line, strict=True)
        return f"<tr>{''.join(f'<{tag}{kind}>{html.escape(text)}</{tag}>' for kind, text in filled)}</tr>"

    head = f"<thead>{cells('th', columns)}</thead>" if columns else ""
    return f"<table>{head}<tbody>{''.join(cells('td', line) for line in lines)}</tbody></table>"
