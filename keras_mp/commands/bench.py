"""`keras-mp bench`: how fast a dataset is, and where its time goes."""

from __future__ import annotations

import argparse
import dataclasses

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from keras_mp.commands.datasets import load_dataset
from keras_mp.commands.errors import CommandError
from keras_mp.commands.output import seconds_in_words, write_json
from keras_mp.commands.throughput import Throughput, measure
from keras_mp.errors import KerasMPError
from keras_mp.loaded import LoadedDataset


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measures the dataset, prints the numbers, and returns the exit code.

    Raises:
        CommandError: it cannot be measured.
    """
    dataset = load_dataset(arguments.target)
    if arguments.workers is not None:
        dataset = dataset.with_workers(arguments.workers)
    seconds, epochs = arguments.seconds, arguments.epochs
    if seconds is None and epochs is None:
        seconds, epochs = (10.0, None) if dataset.is_endless else (None, 1)
    if dataset.is_endless and seconds is None:
        raise CommandError(f"{arguments.target} never ends; pass --seconds S")
    if dataset.is_endless:
        epochs = 1
    with dataset:
        console.print(Text(repr(dataset)))
        measured = _measure(dataset, epochs, seconds, console)
        _show(dataset, measured, console)
        stats = dataset.stats()
        result = {
            "target": arguments.target,
            "dataset": repr(dataset),
            **dataclasses.asdict(measured),
            "batches_per_s": measured.batches_per_s,
            "samples_per_s": measured.samples_per_s,
            "bytes_per_s": measured.bytes_per_s,
            "worker_busy_fraction": stats.worker_busy_fraction,
            "stats": dataclasses.asdict(stats),
        }
    write_json(arguments.json, result)
    return 0


def _measure(dataset: LoadedDataset, epochs: int | None, seconds: float | None, console: Console) -> Throughput:
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.completed} batches"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)
        try:
            return measure(
                dataset, epochs=epochs, seconds=seconds, report=lambda taken: progress.update(task, completed=taken)
            )
        except KerasMPError as error:
            raise CommandError(f"a batch cannot be made: {error}") from error


def _show(dataset: LoadedDataset, measured: Throughput, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("first batch after", seconds_in_words(measured.first_batch_s))
    table.add_row("then", f"{measured.batches} batches in {seconds_in_words(measured.elapsed_s)}")
    if measured.batches:
        table.add_row("", f"{measured.batches_per_s:.4g} batches/s")
        table.add_row("", f"{measured.samples_per_s:.4g} samples/s")
        table.add_row("", f"{measured.bytes_per_s / 1e6:.4g} MB/s")
    console.print(table)
    console.print(dataset.report())
