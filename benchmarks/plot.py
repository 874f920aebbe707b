"""One panel per workload: a bar per loader with its spread, and the limit as a line across."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.summary import Summary
from benchmarks.workloads import WORKLOADS

_COLUMNS = 3
_OURS, _THEIRS, _LIMIT = "#1b7f5c", "#9aa5b1", "#b3261e"


def draw(summary: Summary, path: Path) -> None:
    names = summary.workloads()
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        metric = WORKLOADS[name].metric
        loaders = [loader for loader in summary.loaders(name) if loader != "limit"]
        spreads = [summary.spread(name, loader, metric.key) for loader in loaders]
        for position, (loader, spread) in enumerate(zip(loaders, spreads, strict=True)):
            if spread is None:
                axis.text(0, position, f" {summary.trouble(name, loader)}", va="center", fontsize=7)
                continue
            colour = _OURS if loader.startswith("ours") else _THEIRS
            axis.barh(position, spread.median * metric.scale, color=colour)
            ends = [[spread.median - spread.low], [spread.high - spread.median]]
            error = [[side[0] * metric.scale] for side in ends]
            axis.errorbar(spread.median * metric.scale, position, xerr=error, color="black", linewidth=0.8)
        axis.set_yticks(range(len(loaders)), loaders, fontsize=7)
        axis.invert_yaxis()
        medians = [spread.median for spread in spreads if spread and spread.median > 0]
        if medians and max(medians) > 20 * min(medians):
            axis.set_xscale("log")
        limit = summary.spread(name, "limit", metric.key)
        if limit:
            axis.axvline(limit.median * metric.scale, color=_LIMIT, linewidth=1.2, label="limit")
            axis.legend(fontsize=7)
        axis.set_title(f"{name}: {WORKLOADS[name].title}", fontsize=8)
        axis.set_xlabel(f"{metric.title}, {metric.unit}", fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
