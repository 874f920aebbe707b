"""One configuration in one fresh process; the last line it prints is JSON.

python -m benchmarks.measure WORKLOAD LOADER WORKERS True|False
"""

import importlib
import json
import multiprocessing
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

from benchmarks import memory
from benchmarks.consume import Fitter, Recorder, loop
from benchmarks.loaders import LOADERS, Loader
from benchmarks.tars import Tars
from benchmarks.work import Samples, Work, stamp, touch
from benchmarks.workloads import MEMORY, WORKLOADS, Workload


def run(workload: Workload, loader: Loader, workers: int, quick: bool) -> dict[str, Any]:
    """Build the work, construct the loader, consume a warm-up epoch and the timed ones.

    Returns:
        The run's numbers, by the keys that `Metric` and the targets name; seconds unless the key says otherwise.
    """
    batches, timed = workload.size(quick)
    epochs = timed + 1
    if loader.start_method:
        multiprocessing.set_start_method(loader.start_method)
    fitted = loader.consume == "fit" or (workload.step_share > 0 and loader.consume != "nobody")
    opener = loader.load()
    step_s = workload.step_share * _batch_s(workload.make(3)) / workers if workload.step_share else 0.0
    fitter = Fitter(workload.make(1)[0], step_s) if fitted else None
    unhindered_s = fitter.epoch_from_memory_s(batches) if fitter and step_s else 0.0
    before = memory.measure() if workload.metric is MEMORY else None
    work = workload.make(batches)
    expected = _expected_sum(work)
    # Reading the page tables takes tens of milliseconds, so only where memory is the question.
    recorder = Recorder(batches, batches * timed + batches // 2 if workload.metric is MEMORY else None)

    begin = time.perf_counter()
    feed = opener(work, workers, epochs)
    del work  # whether the source lives on, and where, is the loader's business
    if loader.consume == "nobody":
        result: dict[str, Any] = {"epoch_s": statistics.median(list(feed.data)[1:])}
        feed.close()
        return result
    if fitter:
        fitter.fit(feed, epochs, recorder)
    else:
        loop(feed, epochs, recorder)
    result = numbers(recorder, epochs, begin)
    if recorder.usage and before:
        added = recorder.usage.total_mb - before.total_mb
        result |= {"added_mb": added, "worker_mb": recorder.usage.workers_own_mb / max(recorder.usage.children, 1)}
    if unhindered_s:
        result |= {"step_s": step_s, "wait_share": (result["epoch_s"] - unhindered_s) / unhindered_s}
    if expected is not None and any(total != expected for total in recorder.sums):
        raise ValueError(f"wrong data: epochs sum to {recorder.sums}, should be {expected}")
    feed.close()
    return result


def numbers(recorder: Recorder, epochs: int, begin: float) -> dict[str, Any]:
    """Medians over the timed epochs; an epoch lasts from the last batch of the one before to its own last batch.

    Raises:
        ValueError: the consumer saw another number of batches than it should have.
    """
    n, times = recorder.batches, recorder.times
    if len(times) != n * epochs:
        raise ValueError(f"wrong data: {len(times)} batches in {epochs} epochs of {n}")
    ends = times[n - 1 :: n]
    starts = times[::n]
    gaps = [start - end for start, end in zip(starts[1:], ends, strict=False)]
    intervals = [(end - start) / (n - 1) for start, end in zip(starts, ends, strict=True)][1:]
    epoch_s = statistics.median(b - a for a, b in pairwise(ends))
    gap_s = statistics.median(gaps)
    return {
        "epoch_s": epoch_s,
        "batch_us": epoch_s / n * 1e6,
        "first_s": times[0] - begin,
        "gap_s": gap_s,
        "gap_intervals": statistics.median(gap / step for gap, step in zip(gaps, intervals, strict=True)),
        "cpu_us": statistics.median(b - a for a, b in pairwise(recorder.cpu)) / n * 1e6,
    }


def _batch_s(work: Work) -> float:
    """Seconds of one batch in one process, the shortest of three."""

    def once(index: int) -> float:
        begin = time.perf_counter()
        touch(work[index])
        return time.perf_counter() - begin

    return min(once(index) for index in range(min(3, len(work))))


def _expected_sum(work: Work) -> float | None:
    """The sum every epoch must show, or None where the batches are not stamped."""
    if isinstance(work, Samples | Tars):
        return None
    leaves = getattr(work, "leaves", 1)
    return float(sum(stamp(index) for index in range(len(work))) * leaves)


def main() -> None:
    workload, loader, workers, quick = sys.argv[1:]
    sys.argv = sys.argv[:1]
    # Spawned workers of other loaders look the work's classes up by module, never in __main__.
    importlib.import_module("benchmarks.work")
    result = run(WORKLOADS[workload], LOADERS[loader], int(workers), quick == "True")
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
