"""The parent's side: a fresh process for each configuration, a deadline for each process, rounds interleaved.

Every round runs every configuration once, in an order shuffled anew, so that a machine that drifts slows all alike.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loaders import LOADERS
from benchmarks.workloads import Workload

# A configuration that hangs or fails this often is left out of the remaining rounds: its deadline costs minutes.
_GIVE_UP_AFTER = 2

_ENVIRONMENT = {
    "KERAS_BACKEND": os.environ.get("KERAS_BACKEND", "tensorflow"),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Run:
    """What came of one process: `status` is "ok", "hang" (killed at its deadline) or "failed"; `numbers` if ok."""

    workload: str
    loader: str
    round: int
    status: str
    numbers: dict[str, float]
    error: str = ""


def configurations(workloads: list[Workload], loaders: list[str] | None) -> list[tuple[Workload, str]]:
    """Every pair that is measured: of each workload's own list what `loaders` names; extras only where named."""
    return [
        (workload, name)
        for workload in workloads
        for name, loader in LOADERS.items()
        if (name in workload.loaders or loader.extra) and (not loader.extra if loaders is None else name in loaders)
    ]


def run_all(
    pairs: list[tuple[Workload, str]], rounds: int, workers: int, quick: bool, finished: Callable[[Run], None]
) -> list[Run]:
    """Measure all rounds; `finished` hears of each run as it ends."""
    runs: list[Run] = []
    for number in range(rounds):
        order = pairs.copy()
        random.Random(number).shuffle(order)
        for workload, loader in order:
            mine = [run for run in runs if (run.workload, run.loader) == (workload.name, loader)]
            if sum(run.status != "ok" for run in mine) >= _GIVE_UP_AFTER:
                continue
            runs.append(_run_one(workload, loader, number, workload.workers or workers, quick))
            finished(runs[-1])
    return runs


def _run_one(workload: Workload, loader: str, number: int, workers: int, quick: bool) -> Run:
    command = [sys.executable, "-m", "benchmarks.measure", workload.name, loader, str(workers), str(quick)]
    # Files and not pipes: a worker that outlives its parent would hold a pipe open, and reading it would never end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | _ENVIRONMENT,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,
        )
        status = "ok"
        try:
            process.wait(workload.timeout_s[quick])
        except subprocess.TimeoutExpired:
            status = "hang"
        finally:
            with suppress(ProcessLookupError):  # also what a loader left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        numbers: dict[str, Any] = {}
        error = ""
        if status == "ok":
            out.seek(0)
            lines = out.read().splitlines()
            if process.returncode == 0 and lines and lines[-1].startswith("{"):
                numbers = json.loads(lines[-1])
            else:
                err.seek(0)
                status, error = "failed", f"exit {process.returncode}: {_last_line(err.read())}"
    return Run(workload.name, loader, number, status, numbers, error)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    # An exception's message, where there is one, rather than what the interpreter's shutdown prints after it.
    errors = [
        line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Exit", "Crashed", "Timeout"))
    ]
    return (errors or lines or ["no message"])[-1][:300]
