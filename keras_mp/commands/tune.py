"""`keras-mp tune`: how many workers a dataset needs on this machine, by measuring."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from keras_mp.checks import usable_cores
from keras_mp.commands.datasets import load_dataset
from keras_mp.commands.errors import CommandError
from keras_mp.commands.output import write_json
from keras_mp.commands.throughput import Throughput, measure
from keras_mp.errors import KerasMPError
from keras_mp.loaded import LoadedDataset

_CLOSE_ENOUGH = 0.95  # of the best throughput: more workers than that takes cost memory and gain little


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measures numbers of workers, prints them and the line to paste, and returns the exit code.

    Raises:
        CommandError: the dataset cannot be measured, or there is nothing to draw with.
    """
    figure = None if arguments.plot is None else _new_figure()
    dataset = load_dataset(arguments.target)
    cores = usable_cores()
    counts = arguments.workers or default_counts(cores)
    console.print(Text(repr(dataset)))
    rounds = _measure(dataset, counts, arguments.rounds, arguments.seconds, console)
    speeds = {count: statistics.median(each.batches_per_s for each in measured) for count, measured in rounds.items()}
    chosen = fewest_within(speeds)
    _show(rounds, speeds, chosen, cores, console)
    if figure is not None:
        _plot(figure, rounds, chosen, cores, arguments.plot)
    result = {
        "target": arguments.target,
        "dataset": repr(dataset),
        "usable_cores": cores,
        "workers": chosen,
        "measured": [
            {
                "workers": count,
                "batches_per_s": speeds[count],
                "samples_per_s": statistics.median(each.samples_per_s for each in measured),
                "rounds_batches_per_s": [each.batches_per_s for each in measured],
            }
            for count, measured in rounds.items()
        ],
    }
    write_json(arguments.json, result)
    return 0


def default_counts(cores: int) -> list[int]:
    """Powers of two up to the number of cores, and that number."""
    powers = [1 << power for power in range(cores.bit_length()) if 1 << power <= cores]
    return sorted({*powers, cores})


def fewest_within(speeds: Mapping[int, float], share: float = _CLOSE_ENOUGH) -> int:
    """The least number of workers with at least `share` of the best speed.

    Args:
        speeds: batches a second, by number of workers; not empty.
        share: from 0 to 1.
    """
    best = max(speeds.values())
    return min(count for count, speed in speeds.items() if speed >= share * best)


def _measure(
    dataset: LoadedDataset, counts: list[int], rounds: int, seconds: float, console: Console
) -> dict[int, list[Throughput]]:
    """Measures each number of workers once a round, on a fresh dataset with fresh workers."""
    measured: dict[int, list[Throughput]] = {count: [] for count in counts}
    with Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=rounds * len(counts))
        for number in range(rounds):
            # There and back, so that a machine that grows slower or faster favours none.
            for count in counts if number % 2 == 0 else reversed(counts):
                progress.update(task, description=f"round {number + 1} of {rounds}, workers={count}")
                try:
                    with dataset.with_workers(count) as copied:
                        epochs = 1 if copied.is_endless else None
                        measured[count].append(measure(copied, epochs=epochs, seconds=seconds, warm_up=True))
                except KerasMPError as error:
                    raise CommandError(f"a batch cannot be made: {error}") from error
                progress.advance(task)
    return measured


def _show(
    rounds: Mapping[int, list[Throughput]], speeds: Mapping[int, float], chosen: int, cores: int, console: Console
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("workers", "batches/s", "samples/s", "of the best", "first batch"):
        table.add_column(name, justify="right")
    best = max(speeds.values())
    for count, measured in rounds.items():
        samples = statistics.median(each.samples_per_s for each in measured)
        first = statistics.median(each.first_batch_s for each in measured)
        share = f"{speeds[count] / best:.0%}" if best else ""
        row = (str(count), f"{speeds[count]:.4g}", f"{samples:.4g}", share, f"{first:.2g} s")
        table.add_row(*row, style="bold" if count == chosen else "")
    console.print(table)
    console.print()
    note = "the fewest workers within 5% of the best" if len(rounds) > 1 else "the only number measured"
    console.print(f"[bold]workers={chosen}[/bold]  # {note}; {cores} usable cores", highlight=False)


def _new_figure() -> Any:
    """A figure of matplotlib's.

    Raises:
        CommandError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError("--plot needs matplotlib; install it with: pip install 'keras-mp[plot]'") from error
    return Figure(figsize=(6.4, 4.0), layout="constrained")


def _plot(figure: Any, rounds: Mapping[int, list[Throughput]], chosen: int, cores: int, path: Path) -> None:
    """Draws throughput against workers, with the number of usable cores.

    Raises:
        CommandError: the file cannot be written.
    """
    axes = figure.subplots()
    counts = sorted(rounds)
    speeds = [statistics.median(each.samples_per_s for each in rounds[count]) for count in counts]
    for count in counts:
        each = [measured.samples_per_s for measured in rounds[count]]
        axes.plot([count] * len(each), each, ".", color="tab:blue", alpha=0.4)
    axes.plot(counts, speeds, "-", color="tab:blue", label="median")
    axes.plot([chosen], [speeds[counts.index(chosen)]], "o", color="tab:orange", label=f"workers={chosen}")
    axes.axvline(cores, color="grey", linestyle="--", label=f"{cores} usable cores")
    axes.set(xlabel="workers", ylabel="samples a second", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that it does not know
        raise CommandError(f"{path} cannot be written: {error}") from error
