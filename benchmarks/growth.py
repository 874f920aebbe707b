"""What grows with what: cost and memory against workers, bytes of a batch, length of a source, epochs, datasets.

python -m benchmarks.growth            # one table; writes benchmarks/results/growth.md; about six minutes
python -m benchmarks.growth epochs     # one part of it, printed

Each line is measured in a fresh process, in a plain loop over the dataset: no framework is in the way.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras  # noqa: F401 - keras_mp imports it on first use, which is not to be measured here
import numpy as np
import psutil

import keras_mp
from benchmarks.memory import measure

_RESULT = Path(__file__).parent / "results" / "growth.md"
_TAKEN = 2000  # batches that are timed
_GIB = 1 << 30


class Range:
    """The numbers below `count`, as a source that has nothing in memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return np.float32(index)


class Filled:
    """Batches of so many bytes."""

    def __init__(self, nbytes: int, count: int) -> None:
        self.nbytes, self.count = nbytes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return np.full(self.nbytes, index % 128, np.uint8)


def _sleep(value: Any) -> Any:
    time.sleep(0.02)
    return value


def _here() -> dict[str, float]:
    usage, me = measure(), psutil.Process()
    return {
        "parent, MB": me.memory_full_info().uss / 1e6,
        "a worker's own, MB": usage.workers_own_mb / max(1, usage.children),
        "descriptors": me.num_fds(),
        "threads": threading.active_count(),
    }


def _cost(batches: Iterator[Any], count: int) -> dict[str, float]:
    """Time and the parent's processor time for a batch, in microseconds: the median of five stretches."""
    times, cpu = [], []
    for _ in range(5):
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in range(count // 5):
            next(batches)
        times.append((time.perf_counter() - began) / (count // 5))
        cpu.append((time.process_time() - cpu_began) / (count // 5))
    return {"a batch, us": statistics.median(times) * 1e6, "parent's processor, us": statistics.median(cpu) * 1e6}


def workers(count: int) -> dict[str, float]:
    """Workers that sleep, so that the cores are left to the parent."""
    with keras_mp.PoolDataset(Range(10**9), _sleep, batch_size=1, workers=count) as dataset:
        batches = iter(dataset)
        for _ in range(4 * count):
            next(batches)
        return {**_cost(batches, max(300, 8 * count)), **_here()}


def batch_bytes(nbytes: int) -> dict[str, float]:
    """Batches that are filled and nothing else, by two workers."""
    count = max(15, min(_TAKEN, 8 * _GIB // nbytes))
    with keras_mp.parallelize(Filled(nbytes, 3 * count), workers=2) as dataset:
        batches = iter(dataset)
        for _ in range(count):
            next(batches)
        cost = _cost(batches, count)
        held = dataset.stats().slot_bytes / 1e6
        return {**cost, "us per MB": cost["a batch, us"] / nbytes * 1e6, "slots, MB": held, **_here()}


def source_length(count: int) -> dict[str, float]:
    """A shuffled source of so many samples, 32 in a batch."""
    begin = time.perf_counter()
    with keras_mp.PoolDataset(Range(count), batch_size=32, shuffle=True, seed=0, workers=2) as dataset:
        batches = (batch for _ in range(10**4) for batch in dataset)
        next(batches)
        first = time.perf_counter() - begin
        for _ in range(100):
            next(batches)
        return {"first batch, s": first, **_cost(batches, _TAKEN), **_here()}


def epochs(count: int) -> dict[str, float]:
    """After so many epochs of 20 batches; the cost is that of the last ones."""
    with keras_mp.PoolDataset(Range(640), batch_size=32, shuffle=True, seed=0, workers=2) as dataset:
        batches = (batch for _ in range(count + _TAKEN) for batch in dataset)
        for _ in range(20 * count):
            next(batches)
        return {**_cost(batches, _TAKEN), **_here()}


def datasets(count: int) -> dict[str, float]:
    """So many datasets on one pool of two workers, a batch of each in turn."""
    with keras_mp.WorkerPool(2) as pool:
        made = [keras_mp.PoolDataset(Range(10**6), batch_size=32, seed=0, pool=pool) for _ in range(count)]
        iterators = [iter(dataset) for dataset in made]
        batches = (next(iterators[number % count]) for number in range(10**9))
        for _ in range(4 * count):
            next(batches)
        result = {**_cost(batches, max(_TAKEN, 4 * count)), **_here()}
        batches.close()
        del iterators
        for dataset in made:
            dataset.close()
        return result


_PARTS: dict[str, tuple[Callable[[int], dict[str, float]], list[int]]] = {
    "workers": (workers, [1, 2, 8, 32, 128]),
    "batch_bytes": (batch_bytes, [1 << 10, 1 << 16, 1 << 20, 1 << 26, 1 << 30]),
    "source_length": (source_length, [10**3, 10**5, 10**7, 10**9]),
    "epochs": (epochs, [1, 10, 100, 500]),
    "datasets": (datasets, [1, 5, 20, 50]),
}


def _table(name: str) -> str:
    function, sizes = _PARTS[name]
    rows = []
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.growth", "--line", name, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{name} of {size} failed:\n{done.stderr[-3000:]}")
        rows.append({name.replace("_", " "): f"{size:,}", **json.loads(done.stdout.splitlines()[-1])})
    text = [f"## {name.replace('_', ' ').capitalize()}", "", function.__doc__ or "", ""]
    text += ["| " + " | ".join(rows[0]) + " |", "|" + "---:|" * len(rows[0])]
    text += ["| " + " | ".join(v if isinstance(v, str) else f"{v:,.3g}" for v in row.values()) + " |" for row in rows]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[[], *_PARTS])
    parser.add_argument("--line", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.line:
        name, size = arguments.line
        print(json.dumps(_PARTS[name][0](int(size))))
        return
    tables = [_table(name) for name in arguments.part or _PARTS]
    print("\n\n".join(tables))
    if not arguments.part:
        head = f"# Growth\n\n`python -m benchmarks.growth`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores.\n\n"
        _RESULT.write_text(head + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
