"""`python -m benchmarks [--quick] [--workloads a,b] [--loaders x,y] [--rounds N] [--workers N] [--name NAME]`."""

import argparse
import datetime
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.loaders import LOADERS
from benchmarks.plot import draw
from benchmarks.runner import Run, configurations, run_all
from benchmarks.summary import Summary
from benchmarks.workloads import WORKLOADS, select

_RESULTS = Path(__file__).parent / "results"
_FULL_ROUNDS, _QUICK_ROUNDS = 3, 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure every loader side by side.")
    parser.add_argument("--quick", action="store_true", help="short epochs and two rounds: a look, not a result")
    parser.add_argument("--workloads", help=f"comma-separated, of {', '.join(WORKLOADS)}; scale means all of scale-*")
    parser.add_argument("--loaders", help=f"comma-separated, of {', '.join(LOADERS)}")
    parser.add_argument("--rounds", type=int, help=f"default {_FULL_ROUNDS}, quick {_QUICK_ROUNDS}")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of every loader, default 2")
    parser.add_argument("--name", help="of the files with the results; by default one that says what was left out")
    args = parser.parse_args()
    try:
        args.chosen = select(args.workloads.split(",")) if args.workloads else list(WORKLOADS.values())
    except KeyError as error:
        parser.error(error.args[0])
    args.loaders = args.loaders.split(",") if args.loaders else None
    if unknown := set(args.loaders or ()) - set(LOADERS):
        parser.error(f"no loader {', '.join(sorted(unknown))}; there are {', '.join(LOADERS)}")
    args.rounds = args.rounds or (_QUICK_ROUNDS if args.quick else _FULL_ROUNDS)
    return args


def main() -> None:
    args = _arguments()
    pairs = configurations(args.chosen, args.loaders)
    about = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rounds": args.rounds,
        "workers": args.workers,
        "machine": report.machine(),
    }
    # A part of the workloads or loaders must not overwrite the results of them all.
    stem = args.name or ("quick" if args.quick else "full") + ("-part" if args.workloads or args.loaders else "")
    finished: list[Run] = []
    began = time.monotonic()

    def tell(run: Run) -> None:
        finished.append(run)
        key = next(workload for workload in args.chosen if workload.name == run.workload).metric.key
        value = f"{run.numbers[key]:.4g}" if key in run.numbers else f"{run.status} {run.error}"
        print(f"[{len(finished)}/{len(pairs) * args.rounds}] {run.workload} {run.loader}: {value}", flush=True)
        about["minutes"] = round((time.monotonic() - began) / 60)
        report.write(_RESULTS, stem, Summary(finished), about)  # an interrupted run keeps what it has

    summary = Summary(run_all(pairs, args.rounds, args.workers, args.quick, tell))
    draw(summary, _RESULTS / f"{stem}.png")
    print("\n" + "\n".join(report.targets_table(summary)))
    print(f"\n{_RESULTS / stem}.md, .json, .png")


if __name__ == "__main__":
    main()
