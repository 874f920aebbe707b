"""The command `keras-mp`: arguments, and how it ends.

Exit codes: 0, all is well; 1, `check` has found something wrong; 2, it could not do what was asked, which one line on
standard error says; 130, Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import keras_mp
from keras_mp.checks import check_workers
from keras_mp.commands.errors import CommandError
from keras_mp.commands.target import import_target

_PLAIN_WIDTH = 160  # of what goes to no terminal

_TARGET = "package.module:name of a dataset, or of a function that returns one; the current folder is on the path"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        arguments: those of the command line; None: this process's own.

    Raises:
        SystemExit: after --help and --version, and where the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    errors = Console(stderr=True)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's greetings are none of the output
    try:
        import_target(options.target)
        command = importlib.import_module(f"keras_mp.commands.{options.command}")  # only now, as it imports Keras
        return int(command.run(options, _console()))
    except CommandError as error:
        if options.traceback and error.__cause__ is not None:
            errors.out("".join(traceback.format_exception(error.__cause__)), highlight=False)
        line = " ".join(str(error).partition("\n\nTraceback")[0].split())
        errors.out(f"keras-mp: {line}", highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.out("keras-mp: interrupted", highlight=False)
        return 130


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keras-mp", description="Looks at a dataset of keras_mp or Keras.")
    parser.add_argument("--version", action="version", version=f"keras_mp {keras_mp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    check = _command(commands, "check", "load every sample once and name those that are broken; exit code 1 if any are")
    check.add_argument("--epochs", type=_count, default=1, metavar="N", help="go through it N times (default: 1)")
    check.add_argument("--sample", type=_count, metavar="N", help="look at N samples, drawn by chance")
    check.add_argument("--timeout", type=_seconds, metavar="S", help="seconds that a batch may take in a worker")
    check.add_argument("--workers", type=_workers, metavar="N", help="worker processes, instead of the dataset's own")

    bench = _command(commands, "bench", "measure throughput, time to the first batch, and where the time goes")
    bench.add_argument("--epochs", type=_count, metavar="N", help="go through it N times (default: 1)")
    bench.add_argument("--seconds", type=_seconds, metavar="S", help="stop after S seconds")
    bench.add_argument("--workers", type=_workers, metavar="N", help="worker processes, instead of the dataset's own")

    tune = _command(commands, "tune", "measure several numbers of workers and name the one to use")
    tune.add_argument("--workers", type=_counts, metavar="N,N,...", help="which (default: 1, 2, 4, ... to the cores)")
    tune.add_argument("--seconds", type=_seconds, default=3.0, metavar="S", help="of each measurement (default: 3)")
    tune.add_argument("--rounds", type=_count, default=3, metavar="N", help="measurements of each number (default: 3)")
    tune.add_argument("--plot", type=_file, metavar="FILE", help="draw throughput against workers (.png, .svg, .pdf)")
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("target", help=_TARGET)
    command.add_argument("--json", type=_file, metavar="FILE", help="write what was found to FILE")
    command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return command


def _count(text: str) -> int:
    return _whole_number(text, 1)


def _workers(text: str) -> int:
    try:
        return check_workers(_whole_number(text, 0))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(_workers(part) for part in text.split(",")))


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return seconds


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # now, and not after an hour
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path
