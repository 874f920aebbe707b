"""From runs to numbers: median and spread over rounds, and ratios paired round by round."""

import statistics
from dataclasses import dataclass

from benchmarks.loaders import LOADERS
from benchmarks.runner import Run
from benchmarks.workloads import WORKLOADS


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest over `rounds` runs."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


class Summary:
    """All runs, asked by workload, loader and key."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs

    def values(self, workload: str, loader: str, key: str) -> dict[int, float]:
        """One value a round, for the rounds that went well."""
        return {
            run.round: run.numbers[key]
            for run in self.runs
            if (run.workload, run.loader) == (workload, loader) and key in run.numbers
        }

    def spread(self, workload: str, loader: str, key: str) -> Spread | None:
        values = list(self.values(workload, loader, key).values())
        return Spread.of(values) if values else None

    def ratio(self, above: tuple[str, str], below: tuple[str, str], key: str) -> Spread | None:
        """`above` / `below`, each a (workload, loader), divided within each round and then taken together."""
        tops, bottoms = self.values(*above, key), self.values(*below, key)
        ratios = [tops[k] / bottoms[k] for k in tops if bottoms.get(k)]
        return Spread.of(ratios) if ratios else None

    def trouble(self, workload: str, loader: str) -> str:
        """Why there is no number, or what else happened beside it; empty if every run went well."""
        bad = [r for r in self.runs if (r.workload, r.loader) == (workload, loader) and r.status != "ok"]
        kinds = sorted({run.status for run in bad})
        return ", ".join(f"{kind} {sum(run.status == kind for run in bad)}x" for kind in kinds)

    def workloads(self) -> list[str]:
        return [name for name in WORKLOADS if any(run.workload == name for run in self.runs)]

    def loaders(self, workload: str) -> list[str]:
        return [name for name in LOADERS if any((run.workload, run.loader) == (workload, name) for run in self.runs)]
