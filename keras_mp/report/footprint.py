"""What memory the workers have of their own, and which frameworks their code has imported, as the system tells it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

_LIBRARIES = {"libtensorflow_framework": "TensorFlow", "libtorch_cpu": "PyTorch", "/jaxlib/": "JAX"}


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Of the worker that has most.

    Attributes:
        own_bytes: memory that it shares with no other process.
        frameworks: names of those it has imported.
    """

    own_bytes: int
    frameworks: tuple[str, ...]

    @classmethod
    def of(cls, pids: Sequence[int]) -> Footprint | None:
        """That of processes; None where it cannot be had: they have ended, or the system is not Linux."""
        found = [footprint for pid in pids if (footprint := _of_process(pid)) is not None]
        return max(found, key=lambda footprint: footprint.own_bytes, default=None)


def _of_process(pid: int) -> Footprint | None:
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            own = sum(int(line.split()[1]) for line in file if line.startswith("Private_"))
        with open(f"/proc/{pid}/maps") as file:
            maps = file.read()
        if own:
            return Footprint(own << 10, tuple(name for library, name in _LIBRARIES.items() if library in maps))
    return None
