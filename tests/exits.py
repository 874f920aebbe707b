"""Ends processes in many ways while a dataset is in use, many times: `python -m tests.exits --runs 100`.

Each run is a fork of this process, which has imported Keras and started nothing; a run leaves `main` and ends as a
script of the user's would. One that uses no more processor time and still does not end counts as a hang.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.scripts import ends

_IDLE_S = 20.0
_IDLE_CPU_S = 0.1
_LOOK_S = 0.02
_AGAIN_S = 40.0  # Ctrl-C again, where one was lost in a finaliser, as happens in Python; a hang shows before that


class _Run:
    """A process that ends, and what it says."""

    def __init__(self, scenario: str) -> None:
        self.scenario = scenario
        self.said = tempfile.TemporaryFile("w+")
        self.outcome: int | str | None = None
        self._interrupted_at, self._cpu_s = 0.0, 0.0
        self._busy_at = self._looked_at = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self.said.fileno(), 1)
            os.dup2(self.said.fileno(), 2)

    def look(self) -> None:
        """Finds out whether it has ended, or hangs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.outcome = os.waitstatus_to_exitcode(status)
            return
        now = time.monotonic()
        if self.scenario.endswith("ctrl-c") and now - self._interrupted_at > _AGAIN_S and "in use\n" in self.text():
            time.sleep(random.random() * 0.05)
            self._interrupted_at = now
            os.kill(self.pid, signal.SIGINT)
        if now - self._looked_at < _IDLE_S / 10:
            return
        self._looked_at = now
        cpu_s = _cpu_s(self.pid)
        if abs(cpu_s - self._cpu_s) > _IDLE_CPU_S:
            self._cpu_s, self._busy_at = cpu_s, now
        elif now - self._busy_at > _IDLE_S:
            self.outcome = "hang"

    def text(self) -> str:
        """What it has said so far."""
        return os.pread(self.said.fileno(), 1 << 20, 0).decode(errors="replace")

    def kill(self) -> None:
        """Ends it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _cpu_s(pid: int) -> float:
    """Processor time of a process and of its workers."""
    process, total = psutil.Process(pid), 0.0
    for one in [process, *process.children()]:
        with contextlib.suppress(psutil.Error):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def _stack(pid: int, path: Path) -> None:
    with path.open("w") as file:
        subprocess.run(["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt 40"], stdout=file, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=list(ends.EXIT_CODES), help="default: all of them")
    parser.add_argument("--runs", type=int, default=20, help="of each scenario")
    parser.add_argument("--jobs", type=int, default=2, help="at a time")
    parser.add_argument("--stacks", type=Path, help="folder for native stacks of those that hang, taken by gdb")
    options = parser.parse_args()
    bad = 0
    for scenario in options.scenarios:
        started, outcomes, running, left = (
            time.monotonic(),
            collections.Counter[int | str](),
            list[_Run](),
            options.runs,
        )
        while running or left:
            while left and len(running) < options.jobs:
                left -= 1
                running.append(_Run(scenario))
                if running[-1].pid == 0:
                    ends.end(scenario)
                    return
            time.sleep(_LOOK_S)
            for run in list(running):
                run.look()
                if run.outcome is None:
                    continue
                running.remove(run)
                outcomes[run.outcome] += 1
                if run.outcome == "hang":
                    if options.stacks:
                        _stack(run.pid, options.stacks / f"{scenario}-{run.pid}")
                    run.kill()
                elif run.outcome not in ends.EXIT_CODES[scenario]:
                    sys.stdout.write(run.text()[-2000:])
        bad += sum(count for outcome, count in outcomes.items() if outcome not in ends.EXIT_CODES[scenario])
        took_s = time.monotonic() - started
        sys.stdout.write(
            f"{scenario:20} {outcomes['hang']:4} of {options.runs} hang, {took_s:5.0f} s, exit codes {dict(outcomes)}\n"
        )
        sys.stdout.flush()
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
