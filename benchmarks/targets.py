"""What keras_mp promises of its speed on a 2-core machine with 2 workers: one table, checked against every run."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.summary import Spread, Summary


@dataclass(frozen=True)
class Target:
    """With `versus`, its number divided by ours must be at least `bound`; without, our own must be at most `bound`."""

    workload: str
    loader: str
    bound: float
    versus: tuple[str, str] | None = None  # (workload, loader)
    key: str = "epoch_s"
    unit: str = ""

    def measured(self, summary: Summary) -> Spread | None:
        if self.versus is None:
            return summary.spread(self.workload, self.loader, self.key)
        return summary.ratio(self.versus, (self.workload, self.loader), self.key)

    def verdict(self, summary: Summary) -> Literal["met", "missed", "not measured"]:
        spread = self.measured(summary)
        if spread is None:
            return "not measured"
        met = spread.median <= self.bound if self.versus is None else spread.median >= self.bound
        return "met" if met else "missed"

    @property
    def text(self) -> str:
        name = f"{self.workload}, {self.loader}: "
        if self.versus is None:
            return f"{name}{self.key} at most {self.bound:g}{self.unit}"
        workload, loader = self.versus
        if loader == "limit":
            return f"{name}{self.bound:g} of the limit"
        other = loader if workload == self.workload else f"{workload}, {loader}"
        return f"{name}{self.bound:g}x {other}" + (f" ({self.key})" if self.key != "epoch_s" else "")


def _faster(workload: str, loader: str, key: str = "epoch_s", **than: float) -> list[Target]:
    return [Target(workload, loader, bound, (workload, peer.replace("_", "-")), key) for peer, bound in than.items()]


_BOTH = ("ours-export", "ours-fit")

TARGETS: list[Target] = [
    *_faster("big", "ours-export", torch=3, limit=0.5),
    *_faster("big", "ours-fit", torch=2),
    *_faster("big", "ours-export-empty", keras_pool=25, torch=4, grain=15, hf=80, limit=0.8),
    *_faster("big", "ours-fit-empty", keras_pool=15, torch=2),
    *(target for name in ("python", "satellite") for loader in _BOTH for target in _faster(name, loader, limit=0.95)),
    *_faster("small", "ours-export", torch=2.5, grain=4),
    Target("small", "ours-export", 150, key="batch_us", unit=" us"),
    *_faster("small", "ours-fit", keras_pool=1),
    *(target for loader in _BOTH for target in _faster("ragged", loader, limit=0.9)),
    *(target for loader in _BOTH for target in _faster("first", loader, "first_s", keras_spawn=8, hf=8)),
    Target("turnaround", "ours-export", 2, key="gap_intervals", unit=" batch intervals"),
    *_faster("turnaround", "ours-fit", "gap_s", keras_pool=1),
    # 1 GiB once, and a quarter on top for the workers, the slots in flight and the framework's own growth.
    *(Target("memory", loader, 1280, key="added_mb", unit=" MB") for loader in _BOTH),
    *(Target("memory", loader, 45, key="worker_mb", unit=" MB") for loader in _BOTH),
    *(Target("train", loader, 0.03, key="wait_share") for loader in _BOTH),
    # Flat: a batch costs the parent no more than 1.5 times as much with 128 workers as with 8.
    *(Target("scale-128", loader, 0.67, ("scale-8", loader), "cpu_us") for loader in _BOTH),
    *(Target("python", loader, 0.85, ("python", "ours-fit")) for loader in ("ours-dask", "ours-ray")),
    Target("big", "ours-dask", 0.25, ("big", "ours-fit")),
    *(Target("placed", loader, 10, unit=" s") for loader in ("ours-dask", "ours-ray")),
]
