"""What a source of 400 MB costs with two workers: `python -m benchmarks.sources [--megabytes N] [--only a,b]`.

Each source is made in a fresh process. Of it are read, twice, 100 batches of 32 rows from all over it. Printed are
seconds of processor time, which hardly depend on what else the machine does: from the dataset's making to its first
batch, of this process and of each worker; and to the first batch of the second epoch, of this process. And the memory
that each worker then has of its own: neither shared memory nor mapped files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import keras_mp
from benchmarks import memory

_COLUMNS = 50
_WORKERS = 2
_TEXT_BYTES = 100  # what a string of some 50 letters takes in Python


class Rows:
    """The rows of a pandas or polars table, read one at a time."""

    def __init__(self, table: Any, read: Callable[[Any, int], Any]) -> None:
        self.table = table
        self.read = read

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.table, index)


def _numbers(megabytes: int) -> Any:
    return np.random.default_rng(0).random((megabytes * 10**6 // 8 // _COLUMNS, _COLUMNS))


def _texts(megabytes: int) -> list[str]:
    return [f"{number:050d}" for number in range(megabytes * 10**6 // _TEXT_BYTES)]


def _named(numbers: Any) -> dict[str, Any]:
    return {f"c{number}": numbers[:, number].copy() for number in range(_COLUMNS)}


def _nothing(megabytes: int) -> Any:
    return range(100_000)


def _array(megabytes: int) -> Any:
    return _numbers(megabytes)


def _list_of_texts(megabytes: int) -> Any:
    return _texts(megabytes)


def _hf_in_memory(megabytes: int) -> Any:
    import datasets
    import pyarrow

    return datasets.Dataset(pyarrow.table(_named(_numbers(megabytes))))


def _hf_on_disk(megabytes: int) -> Any:
    import datasets

    folder = tempfile.mkdtemp()
    _hf_in_memory(megabytes).save_to_disk(folder)
    return datasets.load_from_disk(folder)


def _hf_texts_in_memory(megabytes: int) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"text": _texts(megabytes)})


def _pandas_numbers(megabytes: int) -> Any:
    import pandas as pd

    return Rows(pd.DataFrame(_numbers(megabytes)), lambda table, index: table.iloc[index].to_numpy())


def _pandas_records(megabytes: int) -> Any:
    import pandas as pd

    return pd.DataFrame(_named(_numbers(megabytes))).to_records(index=False)


def _pandas_objects(megabytes: int) -> Any:
    import pandas as pd

    frame = pd.DataFrame({"text": np.array(_texts(megabytes), dtype=object)}, dtype=object)
    return Rows(frame, lambda table, index: table["text"].iloc[index])


def _pandas_strings(megabytes: int) -> Any:
    import pandas as pd

    frame = pd.DataFrame({"text": pd.array(_texts(megabytes), dtype="string[pyarrow]")})
    return Rows(frame, lambda table, index: table["text"].iloc[index])


def _polars_numbers(megabytes: int) -> Any:
    import polars as pl

    return Rows(pl.DataFrame(_named(_numbers(megabytes))), lambda table, index: np.array(table.row(index)))


def _polars_texts(megabytes: int) -> Any:
    import polars as pl

    return Rows(pl.DataFrame({"text": _texts(megabytes)}), lambda table, index: table.row(index)[0])


def _torch_tensors(megabytes: int) -> Any:
    import torch

    return torch.utils.data.TensorDataset(torch.from_numpy(_numbers(megabytes)))


def _zarr_on_disk(megabytes: int) -> Any:
    import zarr

    numbers = _numbers(megabytes)
    folder = tempfile.mkdtemp() + "/numbers.zarr"
    zarr.open_array(folder, mode="w", shape=numbers.shape, chunks=(1000, _COLUMNS), dtype="f8")[:] = numbers
    return zarr.open_array(folder, mode="r")


_SOURCES: dict[str, Callable[[int], Any]] = {
    "nothing: range": _nothing,
    "NumPy array": _array,
    "list of strings": _list_of_texts,
    "HF, in memory": _hf_in_memory,
    "HF, in memory, strings": _hf_texts_in_memory,
    "HF, load_from_disk": _hf_on_disk,
    "pandas, numbers": _pandas_numbers,
    "pandas, to_records": _pandas_records,
    "pandas, object strings": _pandas_objects,
    "pandas, Arrow strings": _pandas_strings,
    "polars, numbers": _polars_numbers,
    "polars, strings": _polars_texts,
    "torch TensorDataset": _torch_tensors,
    "Zarr, on disk": _zarr_on_disk,
}


def _measure(name: str, megabytes: int) -> dict[str, float]:
    source = _SOURCES[name](megabytes)
    count = len(source) if hasattr(source, "__len__") else source.shape[0]

    def order(epoch: int, rng: np.random.Generator) -> Any:
        return rng.integers(0, count, 3200)

    figures: dict[str, float] = {}
    with keras_mp.PoolDataset(range(64), workers=_WORKERS) as running:  # so that the workers' start does not count
        list(running)
        workers = psutil.Process().children(recursive=True)
        worker_s = _processor_seconds(workers)
        begun = time.process_time()
        with keras_mp.PoolDataset(source, order=order, batch_size=32, workers=_WORKERS, seed=0) as dataset:
            for epoch in ("first", "second"):
                batches = iter(dataset)
                next(batches)
                figures[epoch] = time.process_time() - begun
                figures.setdefault("worker", (_processor_seconds(workers) - worker_s) / _WORKERS)
                for _ in batches:
                    pass
                begun = time.process_time()
            figures["own"] = memory.measure().workers_anonymous_mb / _WORKERS
    return figures


def _processor_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Measures each source in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sources")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--only", help="comma-separated parts of names, such as HF,polars")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(_measure(args.measure, args.megabytes)))
        return
    print("| source | first batch | in each worker | second epoch | own memory of each worker |")
    print("|---|---:|---:|---:|---:|")
    for name in _SOURCES:
        if args.only and not any(part in name for part in args.only.split(",")):
            continue
        command = [sys.executable, "-m", "benchmarks.sources", "--megabytes", str(args.megabytes), "--measure", name]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {name} | {done.stderr.strip().splitlines()[-1][:150]} | | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = " | ".join(f"{found[key]:.1f} s" for key in ("first", "worker", "second"))
        print(f"| {name} | {seconds} | {found['own']:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
