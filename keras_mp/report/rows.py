"""The lines of a report's tables, as text; on a terminal and in HTML they are the same."""

from __future__ import annotations

from keras_mp.report.footprint import Footprint
from keras_mp.report.load import Load
from keras_mp.report.words import count, listed, seconds, share, size
from keras_mp.stats import Stats, Training

MOST_WORKERS = 16  # with a line each
_SLOWEST = 3


def facts(
    stats: Stats, training: Training | None, cores: int, footprint: Footprint | None = None
) -> list[tuple[str, str]]:
    """What was loaded, who waited, what is known of a step: names and values."""
    load = Load.of(stats, training, cores)
    rows = [("batches are loaded by", _engine(stats)), ("cores", str(cores))]
    if stats.loaded_batches:
        rows += [
            (
                "loaded",
                f"{count(stats.loaded_batches, 'batch', 'batches')}, {stats.samples:,} samples, {size(stats.bytes)}",
            ),
            ("making a batch", f"{seconds(load.service_s)}, {seconds(load.cpu_s)} of it processor time"),
        ]
    who = "fit" if load.of_fit else "the training"
    if load.step_s is not None:
        rows += [
            ("a step, its batch being there", seconds(load.step_s)),
            (f"{who} waited", f"{share(load.waited)} of the time, {seconds(load.wait_s)} a batch"),
        ]
    elif stats.batches:
        rows.append(("the training waited", "not known: see PipelineMonitor"))
    if load.workers and stats.loaded_batches:
        rows.append(("workers were busy", f"{share(load.busy)} of the time"))
    if stats.slots:
        rows.append(("shared memory", f"{size(stats.slot_bytes)} in {count(stats.slots, 'slot')}"))
    if footprint is not None:
        names = f", {' and '.join(footprint.frameworks)} included" if footprint.frameworks else ""
        rows.append(("a worker's own memory", f"{size(footprint.own_bytes)}{names}"))
    named = (
        ("failed samples", stats.failures),
        ("second tries of samples", stats.retries),
        ("replaced workers", stats.restarts),
        ("of these, after timeout=", stats.timeouts),
    )
    return rows + [(name, f"{value:,}") for name, value in named if value]


def stage_rows(stats: Stats) -> list[tuple[str, str, str, str, str]]:
    """Of each stage that took time: name, total, per batch, share of the work, slowest samples."""
    rows = [
        (
            name,
            seconds(stage.total_s),
            seconds(stage.mean_s),
            share(stage.total_s / stats.work_s) if stats.work_s else "",
            listed(stage.slowest[:_SLOWEST]),
        )
        for name, stage in stats.stages.items()
        if stage.total_s > 0
    ]
    rest = other_s(stats)
    if rows and rest > 0:
        a_batch = seconds(rest / max(1, stats.loaded_batches))
        rows.append(("other", seconds(rest), a_batch, share(rest / stats.work_s), ""))
    return rows


def other_s(stats: Stats) -> float:
    """Seconds of the work that belong to no stage."""
    return max(0.0, stats.work_s - sum(stage.total_s for stage in stats.stages.values()))


def worker_shares(stats: Stats, training: Training | None) -> list[tuple[str, float]]:
    """Name and busy share, from 0 to 1, of each worker; of more than a few, the least and the most busy ones."""
    numbers = training.stats if training is not None and training.stats.pids else stats
    shares = [
        (f"process {pid}", min(1.0, busy / ready) if ready > 0 else 0.0)
        for pid, busy, ready in zip(numbers.pids, numbers.busy_s, numbers.ready_s, strict=True)
    ]
    if len(shares) <= MOST_WORKERS:
        return shares
    shares.sort(key=lambda row: row[1], reverse=True)
    half = MOST_WORKERS // 2
    return [*shares[:half], *shares[-half:]]


def _engine(stats: Stats) -> str:
    return f"{stats.engine}, {count(stats.workers, 'worker')}" if stats.workers else stats.engine
