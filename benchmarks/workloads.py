"""Each workload in one entry: how to make it, how long an epoch is, who takes part, which number counts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.work import Array, Fill, Samples, Sleep, Spin, Work

_GIB = 2**30
_SPIN_45_MS = 560_000  # loops of `spin` on the 2-core machine the targets are for

STREAMING = (
    "limit",
    "in-process",
    "keras-threads",
    "keras-pool",
    "from-generator",
    "tf-map",
    "recipe",
    "torch",
    "spdl",
    "grain",
    "hf",
    "ours-fit",
    "ours-export",
)
_POOLS = ("keras-pool", "torch", "spdl", "grain", "hf", "ours-fit", "ours-export")
_IN_SLOT = ("ours-fit-empty", "ours-export-empty")
_POOLS_AND_LIMIT = ("limit", *_POOLS)
_FOLDER = ("limit", "keras-dir", "torch", "torch-batch", "ours-fit", "ours-export")
_STREAMS = ("tf-interleave", "torch-iterable", "webdataset", "grain-interleave", "ours-fit", "ours-export")
_TRAINING = ("limit", "in-process", "keras-pool", "tf-map", "recipe", "torch", "ours-fit", "ours-export")


@dataclass(frozen=True)
class Metric:
    """One number of a run; `unit` is what the table prints, `scale` turns the JSON's value into it."""

    key: str
    title: str
    unit: str
    scale: float = 1.0
    comparable: bool = True  # whether one loader's number over another's means anything; not so near zero


EPOCH = Metric("epoch_s", "seconds per epoch", "s")
FIRST = Metric("first_s", "construction to first batch", "s")
GAP = Metric("gap_intervals", "last batch of an epoch to first of the next", "batch intervals", comparable=False)
MEMORY = Metric("added_mb", "memory added, all processes", "MB")
WAIT = Metric("wait_share", "share of the step spent waiting for data", "%", 100, comparable=False)
CPU = Metric("cpu_us", "parent's processor time per batch", "us")


@dataclass(frozen=True)
class Workload:
    """`make(batches)` builds the work; `batches` and `epochs` (after one warm-up epoch) are (full, quick)."""

    name: str
    title: str
    make: Callable[[int], Work]
    batches: tuple[int, int]
    epochs: tuple[int, int] = (2, 2)
    loaders: tuple[str, ...] = STREAMING
    metric: Metric = EPOCH
    workers: int | None = None
    step_share: float = 0.0  # a `fit` step this many times as long as the workers need for a batch; 0: no step
    timeout_s: tuple[float, float] = (300.0, 120.0)

    def size(self, quick: bool) -> tuple[int, int]:
        """(batches per epoch, timed epochs)."""
        return self.batches[quick], self.epochs[quick]


def _centre(image: Array) -> Array:
    crop: Array = image[64:192, 64:192] - image.mean()
    return crop


def _memory_source(batches: int) -> Samples:
    # 32 samples of 256 kB make a batch of 8 MiB; 128 batches make 1 GiB.
    source = np.empty((batches * 32, 256, 256), np.float32)
    source[:] = np.arange(len(source), dtype=np.float32)[:, None, None]
    return Samples(source, _centre, 32)


def _first_values(row: Array) -> Array:
    values: Array = row[:100]
    return values


def _placed_source(batches: int) -> Samples:
    # 8 samples of 800 kB make a batch of 6.4 MB; 25 batches make 160 MB.
    source = np.empty((batches * 8, 200_000), np.float32)
    source[:] = (np.arange(len(source), dtype=np.float32) // 8 % 128)[:, None]
    return Samples(source, _first_values, 8)


def _satellite(batches: int) -> Samples:
    from benchmarks.satellite import tiles

    return tiles(batches)


def _photographs(batches: int) -> Samples:
    from benchmarks.folders import photographs

    return photographs(batches)


def _augmented_photographs(batches: int) -> Samples:
    from benchmarks.folders import augment, photographs

    return photographs(batches, augment)


def _tars(batches: int) -> Work:
    from benchmarks.tars import tars

    return tars(batches)


def _scale(workers: int) -> Workload:
    # Sleep grows with the number of workers, so 500 batches a second arrive whatever their number.
    return Workload(
        f"scale-{workers}",
        f"{workers} sleeping workers, 500 batches/s",
        lambda batches: Sleep(batches, workers / 500),
        (1200, 600),
        (1, 1),
        ("torch", "ours-fit", "ours-export"),
        CPU,
        workers,
    )


_ALL = (
    Workload("satellite", "Sentinel-2 tiles, real files", _satellite, (64, 8), (1, 1), (*_TRAINING, "torch-batch")),
    Workload("folder", "JPEGs of 500x375 to 256x256", _photographs, (24, 8), (2, 1), _FOLDER),
    Workload("folder-python", "the same, 5 ms of Python an image", _augmented_photographs, (12, 6), (2, 1), _FOLDER),
    Workload("tars", "the same JPEGs in tar files", _tars, (64, 16), (1, 1), _STREAMS),
    Workload("python", "about 45 ms of pure Python a batch", lambda n: Spin(n, _SPIN_45_MS), (240, 24), (1, 2)),
    Workload(
        "big",
        "64x224x224x3 float32, 38.5 MB",
        lambda n: Fill(n, (64, 224, 224, 3)),
        (32, 16),
        loaders=(*STREAMING, *_IN_SLOT),
    ),
    Workload(
        "uint8",
        "64x224x224x3 uint8, 9.6 MB",
        lambda n: Fill(n, (64, 224, 224, 3), "uint8"),
        (64, 32),
        loaders=(*_POOLS_AND_LIMIT, *_IN_SLOT),
    ),
    Workload("small", "32x128 float32, no work", lambda n: Fill(n, (32, 128)), (2000, 600)),
    Workload(
        "ragged",
        "one batch in ten 20 times slower",
        lambda n: Spin(n, 100_000, 10, 20),
        (200, 60),
        (1, 2),
        _POOLS_AND_LIMIT,
    ),
    Workload(
        "dict",
        "12 leaves of 32x64 float32",
        lambda n: Fill(n, (32, 64), leaves=12),
        (500, 300),
        loaders=_POOLS_AND_LIMIT,
    ),
    Workload(
        "first",
        "first batch from a cold start, NumPy only",
        lambda n: Fill(n, (32, 128)),
        (40, 40),
        (1, 1),
        ("keras-pool", "keras-spawn", "torch", "grain", "hf", "ours-fit", "ours-export"),
        FIRST,
    ),
    Workload(
        "turnaround",
        "about 10 ms of pure Python a batch, many epochs",
        lambda n: Spin(n, _SPIN_45_MS * 10 // 45),
        (40, 40),
        (5, 3),
        _POOLS,
        GAP,
    ),
    Workload(
        "memory",
        "1 GiB source in memory",
        _memory_source,
        (_GIB // (32 * 256 * 1024), _GIB // (32 * 256 * 1024)),
        (1, 1),
        ("in-process", *_POOLS),
        MEMORY,
    ),
    Workload(
        "train",
        "fit whose step takes 1.2 times as long as loading",
        lambda n: Spin(n, _SPIN_45_MS),
        (80, 24),
        (1, 1),
        ("in-process", "keras-threads", "keras-pool", "tf-map", "torch", "ours-fit", "ours-export"),
        WAIT,
        step_share=1.2,
    ),
    Workload(
        "placed",
        "160 MB source in memory, 25 batches",
        _placed_source,
        (25, 25),
        (1, 1),
        ("ours-fit",),
    ),
    *(_scale(workers) for workers in (8, 32, 128)),
)

WORKLOADS = {workload.name: workload for workload in _ALL}


def select(names: list[str]) -> list[Workload]:
    """Workloads by name; `scale` stands for all of that group.

    Raises:
        KeyError: a name that is neither a workload nor a group.
    """
    chosen: list[Workload] = []
    for name in names:
        group = [w for w in _ALL if w.name == name or w.name.startswith(f"{name}-")]
        if not group:
            raise KeyError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
        chosen += group
    return chosen
