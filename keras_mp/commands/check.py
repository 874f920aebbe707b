"""`keras-mp check`: every sample once through the workers, before a long training meets the one that is broken."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from keras_mp.commands.datasets import load_dataset
from keras_mp.commands.errors import CommandError
from keras_mp.commands.findings import Findings, in_words
from keras_mp.commands.output import rate_in_words, seconds_in_words, write_json
from keras_mp.errors import BatchTimeout, KerasMPError, WorkerCrashed
from keras_mp.loaded import LoadedDataset
from keras_mp.loading.inspection import samples_in_words

_MOST_SHOWN = 50  # problems on the screen; --json has them all
_MOST_CRASHES = 5  # batches in a row that come to nothing: then it is not them


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Checks the dataset, prints what is wrong with it, and returns the exit code: 1 if anything is.

    Raises:
        CommandError: it cannot be checked.
    """
    dataset = load_dataset(arguments.target)
    if arguments.workers is not None:
        dataset = dataset.with_workers(arguments.workers)
    if dataset.is_endless and arguments.sample is None:
        raise CommandError(f"{arguments.target} never ends; pass --sample N to check N batches of it")
    try:
        inspection = dataset.inspection(arguments.sample, arguments.timeout)
    except TypeError as error:
        raise CommandError(f"{arguments.target} cannot be checked: {error}") from error
    with inspection:
        console.print(Text(repr(dataset)))
        findings = Findings(inspection.unit)
        elapsed_s = _inspect(inspection, findings, arguments.epochs, console)
    problems = findings.problems()
    _show(findings, elapsed_s, arguments.epochs, console)
    result = {
        "target": arguments.target,
        "dataset": repr(dataset),
        "ok": not problems,
        "unit": findings.unit,
        "checked": findings.checked,
        "epochs": arguments.epochs,
        "elapsed_s": elapsed_s,
        "median_s": findings.median_s,
        "arrays": findings.leaves(),
        "problems": [dataclasses.asdict(problem) for problem in problems],
        "slowest": [dataclasses.asdict(slow) for slow in findings.slowest()],
    }
    write_json(arguments.json, result)
    return 1 if problems else 0


def _inspect(inspection: LoadedDataset, findings: Findings, epochs: int, console: Console) -> float:
    """Asks for every batch of records; how long that took, in seconds."""
    first = inspection.epoch
    with _progress(console) as progress:
        total = inspection.samples_per_epoch * epochs
        task = progress.add_task("", total=total, unit=_plural(findings), speed="", problems="")
        crashes = 0
        for epoch in range(first, first + epochs):
            inspection.set_epoch(epoch)
            for batch in range(len(inspection)):
                before = findings.checked
                try:
                    for found in inspection[batch]:
                        findings.add(found, epoch)
                    crashes = 0
                except (WorkerCrashed, BatchTimeout) as error:
                    crashes += 1
                    if crashes == _MOST_CRASHES:
                        raise CommandError(f"{crashes} batches in a row came to nothing; the last: {error}") from error
                    samples = inspection.samples_of(batch)
                    text = f"{type(error).__name__}: {error}"
                    findings.add_failure(batch, _item(samples, findings), epoch, text, len(samples))
                except KerasMPError as error:
                    raise CommandError(str(error)) from error
                _advance(progress, task, findings, findings.checked - before)
        return progress.tasks[task].elapsed or 0.0


def _item(samples: Sequence[int], findings: Findings) -> str:
    return f"[{samples[0]}]" if findings.unit == "batch" else samples_in_words(samples)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar with speed and remaining time, on a terminal; nothing of it stays there."""
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[problems]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield progress


def _advance(progress: Progress, task: TaskID, findings: Findings, count: int) -> None:
    speed = progress.tasks[task].speed
    wrong = findings.failed
    progress.update(
        task,
        advance=count,
        speed="" if speed is None else rate_in_words(speed),
        problems=f"{wrong} failed" if wrong else "",
    )


def _show(findings: Findings, elapsed_s: float, epochs: int, console: Console) -> None:
    problems = findings.problems()
    if problems:
        table = Table(title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column(findings.unit if all(p.unit == findings.unit for p in problems) else "", justify="right")
        table.add_column("item", overflow="fold")
        table.add_column("problem", overflow="fold")
        for problem in problems[:_MOST_SHOWN]:
            number = str(problem.index) if problem.unit == findings.unit else f"batch {problem.index}"
            when = f" (in epoch {', '.join(map(str, problem.epochs))})" if epochs > 1 else ""
            table.add_row(number, Text(problem.item), Text(" ".join(f"{problem.text}{when}".split())[:500]))
        console.print()
        console.print(table)
        if len(problems) > _MOST_SHOWN:
            console.print(f"... and {len(problems) - _MOST_SHOWN} more; --json FILE writes all of them")
    console.print()
    if arrays := findings.leaves():
        kinds = ", ".join(f"{a['path']} {in_words(_axes(a['shape']))} {a['dtype']}".strip() for a in arrays)
        console.print(Text(f"most {_plural(findings)}: {kinds}"))
    if slowest := findings.slowest():
        slow = slowest[0]
        others = ", ".join(f"{each.index} {seconds_in_words(each.seconds)}" for each in slowest[1:])
        console.print(
            Text(
                f"slowest {findings.unit}: {slow.index} ({slow.item}) {seconds_in_words(slow.seconds)}; then {others}"
                f"; median {seconds_in_words(findings.median_s)}"
                if others
                else f"slowest {findings.unit}: {slow.index} ({slow.item}) {seconds_in_words(slow.seconds)}"
            )
        )
    counts = [
        f"{count} {kind}"
        for kind in ("failed", "not finite", "different")
        if (count := sum(problem.kind == kind for problem in problems))
    ]
    checked = f"{findings.checked} {_plural(findings)} checked in {seconds_in_words(elapsed_s)}: "
    console.print(
        Text.assemble(checked, (", ".join(counts) or "nothing is wrong", "bold red" if counts else "bold green"))
    )


def _plural(findings: Findings) -> str:
    return {"sample": "samples", "batch": "batches"}[findings.unit]


def _axes(shape: Any) -> tuple[int | None, ...] | None:
    return None if shape is None else tuple(shape)
