"""Memory of this process and all below it, from Linux's `smaps_rollup`, where the processes split a shared page."""

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Usage:
    """Megabytes. `total_mb` is the PSS of all processes; `workers_own_mb` leaves out the children's shared memory, and
    `workers_anonymous_mb` also the files that they have mapped."""

    total_mb: float
    workers_own_mb: float
    workers_anonymous_mb: float
    children: int


def _rollup_mb(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {key.rstrip(":"): int(value) / 1024 for key, value, *_ in map(str.split, lines)}


def measure() -> Usage:
    """Read every process of the tree; one that has just ended counts as nothing."""
    me = psutil.Process()
    total, own, anonymous, children = _rollup_mb(me.pid)["Pss"], 0.0, 0.0, 0
    for child in me.children(recursive=True):
        try:
            pages = _rollup_mb(child.pid)
        except OSError:
            continue
        total += pages["Pss"]
        own += pages["Pss_Anon"] + pages["Pss_File"]
        anonymous += pages["Pss_Anon"]
        children += 1
    return Usage(total, own, anonymous, children)
