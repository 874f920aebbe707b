"""The results as a Markdown table and a JSON file."""

import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.loaders import LOADERS
from benchmarks.summary import Spread, Summary
from benchmarks.targets import TARGETS
from benchmarks.workloads import WORKLOADS

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("keras", "tensorflow", "torch", "spdl", "grain", "datasets", "webdataset", "numpy")


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare with another machine."""
    model = platform.processor()
    if _CPUINFO.exists():  # Linux leaves `platform.processor()` empty
        lines = _CPUINFO.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "-"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": platform.platform(), "python": sys.version.split()[0], **packages}


def to_json(summary: Summary, about: dict[str, Any]) -> str:
    runs = [dataclasses.asdict(run) for run in summary.runs]
    targets = [
        {
            "target": target.text,
            "bound": target.bound,
            "measured": dataclasses.asdict(spread) if (spread := target.measured(summary)) else None,
            "verdict": target.verdict(summary),
        }
        for target in TARGETS
    ]
    return json.dumps({**about, "targets": targets, "runs": runs}, indent=1)


def to_markdown(summary: Summary, about: dict[str, Any]) -> str:
    facts = about["machine"]
    lines = [
        "# Results",
        "",
        f"`{about['command']}`, {about['date']}, {about['workers']} workers (scale rows: their own number), "
        f"{about['rounds']} rounds in {about['minutes']} minutes. Median and least to greatest over rounds; "
        "ratios are taken within each round.",
        "",
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        "",
    ]
    for name in summary.workloads():
        lines += _section(summary, name)
    return "\n".join([*lines, *targets_table(summary), ""])


def _section(summary: Summary, name: str) -> list[str]:
    workload = WORKLOADS[name]
    metric = workload.metric
    lines = [
        f"## {name}: {workload.title}",
        "",
        f"| {metric.title}, {metric.unit} | median | spread | of the limit | over ours-export | over ours-fit | note |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for loader in summary.loaders(name):
        spread = summary.spread(name, loader, metric.key)
        here = (name, loader)
        share, *times = [
            summary.ratio(*pair, metric.key) if metric.comparable else None
            for pair in (((name, "limit"), here), (here, (name, "ours-export")), (here, (name, "ours-fit")))
        ]
        cells = [
            LOADERS[loader].title,
            _number(spread.median * metric.scale) if spread else "-",
            f"{_number(spread.low * metric.scale)} - {_number(spread.high * metric.scale)}" if spread else "-",
            _ratio(share, ""),
            *(_ratio(ratio, "x") for ratio in times),
            summary.trouble(name, loader),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def targets_table(summary: Summary) -> list[str]:
    """One row for each target that this run could measure."""
    lines = ["## Targets", "", "| target | measured | verdict |", "|---|---:|---|"]
    for target in TARGETS:
        if spread := target.measured(summary):
            measured = f"{_number(spread.median)} ({_number(spread.low)} - {_number(spread.high)})"
            lines.append(f"| {target.text} | {measured} | {target.verdict(summary)} |")
    return lines


def _ratio(spread: Spread | None, suffix: str) -> str:
    return f"{_number(spread.median)}{suffix}" if spread else ""


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(folder: Path, stem: str, summary: Summary, about: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.json").write_text(to_json(summary, about))
    (folder / f"{stem}.md").write_text(to_markdown(summary, about))
