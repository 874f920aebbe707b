"""`load=` and `cache=`: loaded once, the same data with and without, never stale, never half a sample."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.support import python_path

_ENGINES = ["in-process", "threads", "workers"]
_STORE = "samples.sqlite"


def note(log: Path, call: object) -> None:
    log.mkdir(exist_ok=True)
    (log / f"{call}-{uuid.uuid4()}").touch()


class Load:
    """Counts its calls by files in a folder. (A file in which it did would be part of what it is known by.)"""

    def __init__(self, log: Path, scale: int = 1) -> None:
        self.log, self.scale = log, scale

    def __call__(self, item: int) -> Any:
        note(self.log, item)
        return {"x": np.full((item % 5 + 1, 3), item * self.scale, np.float32), "name": f"item {item}"}


class Crashing(Load):
    """Kills its process on one item, the first time."""

    def __call__(self, item: int) -> Any:
        if item == 13 and not (self.log / "killed").exists():
            note(self.log, "killed")
            (self.log / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item)


def _augment(sample: Any, rng: np.random.Generator) -> Any:
    sample["x"] += rng.random()  # into the sample: what is kept must not change
    return {"x": sample["x"].sum(), "global": np.random.rand(), "name": sample["name"]}


def _engine(engine: str, pool: keras_mp.WorkerPool) -> dict[str, Any]:
    engines: dict[str, dict[str, Any]] = {
        "in-process": {"workers": 0},
        "threads": {"workers": 2, "use_multiprocessing": False},
        "workers": {"pool": pool},
    }
    return engines[engine]


def _epochs(count: int, load: Any, **options: Any) -> tuple[list[Any], keras_mp.Stats]:
    options = {"batch_size": 4, "shuffle": True, "seed": 5, "transform": _augment, **options}
    with keras_mp.PoolDataset(range(32), load=load, **options) as dataset:
        batches = [batch for _ in range(count) for batch in dataset]
        return batches, dataset.stats()


def _calls(log: Path) -> Counter[str]:
    names = [file.name.partition("-")[0] for file in log.iterdir()] if log.exists() else []
    return Counter(name for name in names if name != "killed")


def _assert_same(some: list[Any], others: list[Any]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture
def expected(tmp_path: Path) -> list[Any]:
    """Three epochs without a cache."""
    return _epochs(3, Load(tmp_path / "without"), workers=0)[0]


@pytest.mark.parametrize("engine", _ENGINES)
@pytest.mark.parametrize("kind", ["ram", "folder"])
def test_each_sample_is_loaded_once(
    running_pool: keras_mp.WorkerPool, tmp_path: Path, expected: list[Any], engine: str, kind: str
) -> None:  # P2
    cache = "ram" if kind == "ram" else tmp_path / "cache"
    got, stats = _epochs(3, Load(tmp_path / "log"), cache=cache, **_engine(engine, running_pool))
    _assert_same(got, expected)
    assert _calls(tmp_path / "log") == Counter(map(str, range(32)))
    assert (stats.cache_hits, stats.cache_misses) == (64, 32)
    assert stats.cache_bytes > 0
    assert stats.stages["load"].total_s > 0
    assert stats.stages["cache"].total_s > 0


@pytest.mark.parametrize("engine", _ENGINES)
def test_a_folder_is_for_other_runs_too(
    running_pool: keras_mp.WorkerPool, tmp_path: Path, expected: list[Any], engine: str
) -> None:
    log, folder = tmp_path / "log", tmp_path / "deep" / "cache"
    with keras_mp.PoolDataset(range(32), load=Load(log), batch_size=4, collate=len, cache=folder, workers=0) as half:
        for number in range(3):
            assert half[number] == 4  # a half-filled one stays valid
    got, stats = _epochs(3, Load(log), cache=folder, **_engine(engine, running_pool))
    _assert_same(got, expected)
    assert _calls(log) == Counter(map(str, range(32)))
    assert stats.cache_misses == 20
    again, stats = _epochs(3, Load(log), cache=str(folder), **_engine(engine, running_pool))
    _assert_same(again, expected)
    assert (stats.cache_hits, stats.cache_misses) == (96, 0)


@pytest.mark.parametrize("kind", ["ram", "folder"])
def test_a_worker_that_is_killed_takes_nothing_along(
    pool: keras_mp.WorkerPool, tmp_path: Path, expected: list[Any], kind: str
) -> None:  # P2
    cache = "ram" if kind == "ram" else tmp_path / "cache"
    got, stats = _epochs(3, Crashing(tmp_path / "log"), cache=cache, pool=pool)
    _assert_same(got, expected)
    assert stats.restarts == 1
    assert set(_calls(tmp_path / "log")) == set(map(str, range(32)))
    assert max(_calls(tmp_path / "log").values()) <= 2  # what was in hand, at most


def test_only_so_much_is_kept(
    running_pool: keras_mp.WorkerPool, tmp_path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "keras_mp"):
        got, stats = _epochs(3, Load(tmp_path / "log"), cache="ram", cache_bytes=3000, pool=running_pool)
    _assert_same(got, expected)
    assert 0 < stats.cache_hits < 64
    assert stats.cache_bytes <= 3000
    (record,) = caplog.records
    assert "in memory (cache_bytes=3000) takes no more samples: it is full" in record.getMessage()


def test_a_folder_may_be_full(tmp_path: Path, expected: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    def load(item: int) -> Any:
        sample = Load(tmp_path / "log")(item)
        return {**sample, "more": np.zeros(10_000)}

    with caplog.at_level(logging.WARNING, "keras_mp"):
        got, stats = _epochs(3, load, cache=tmp_path / "cache", cache_bytes=1_000_000, workers=0)
    _assert_same(got, expected)
    assert 0 < stats.cache_hits < 64
    (record,) = caplog.records
    assert f"in {str(tmp_path / 'cache')!r} takes no more samples: it is full" in record.getMessage()


def _scaled(scale: int) -> Callable[[int], Any]:
    def load(item: int) -> Any:
        return np.float32(item * scale)

    return load


def _tripled(item: int) -> Any:
    return np.float32(item * 3)


def _squared(item: int) -> Any:
    return np.float32(item**2)


def _all(load: Any, cache: Any, source: Any = range(8), **options: Any) -> list[float]:
    with keras_mp.PoolDataset(source, load=load, cache=cache, batch_size=8, workers=0, **options) as dataset:
        (batch,) = dataset
        return list(map(float, batch))


def test_changed_code_is_not_served_what_was_kept(tmp_path: Path) -> None:
    for load, factor in [(_scaled(1), 1), (_scaled(2), 2), (_tripled, 3), (_scaled(1), 1)]:
        assert _all(load, tmp_path) == [factor * item for item in range(8)]
    assert _all(_squared, tmp_path) == [item**2 for item in range(8)]
    with sqlite3.connect(tmp_path / _STORE) as store:
        assert store.execute("SELECT count(*) FROM samples").fetchone() == (32,)
    store.close()


_offset = 0


def _with_offset(item: int) -> Any:
    return np.float32(item + _offset)


def test_changed_globals_are_not_served_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _all(_with_offset, tmp_path) == list(range(8))
    monkeypatch.setitem(globals(), "_offset", 10)
    assert _all(_with_offset, tmp_path) == list(range(10, 18))


def test_changed_files_are_not_served_what_was_kept(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(8)]
    for number, path in enumerate(paths):
        np.save(path, number)
    for source in paths, [{"file": str(path)} for path in paths]:
        load = (lambda item: np.load(item["file"])) if source is not paths else np.load
        assert _all(load, tmp_path / "cache", source) == list(range(8))
    np.save(paths[3], 30.0)
    os.utime(paths[3], ns=(1, 1))
    assert _all(np.load, tmp_path / "cache", paths) == [0, 1, 2, 30, 4, 5, 6, 7]


def test_the_version_is_part_of_what_a_sample_is_known_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(item: int) -> Any:
        return np.float32(item + float(os.environ["KERAS_MP_TEST"]))

    monkeypatch.setenv("KERAS_MP_TEST", "1")
    assert _all(load, tmp_path / "cache", cache_version=1)[0] == 1
    monkeypatch.setenv("KERAS_MP_TEST", "2")
    assert _all(load, tmp_path / "cache", cache_version=1)[0] == 1  # which a fingerprint cannot know
    assert _all(load, tmp_path / "cache", cache_version=2)[0] == 2
    assert _all(load, tmp_path / "cache", cache_version="two")[0] == 2


def test_a_source_that_changes_between_epochs_is_read_again(running_pool: keras_mp.WorkerPool) -> None:  # P2
    source = list(range(8))
    with keras_mp.PoolDataset(source, load=_tripled, batch_size=8, cache="ram", pool=running_pool) as dataset:
        assert next(iter(dataset)).tolist() == [3 * item for item in source]
        source[0] = 100
        dataset.set_epoch(1)
        assert next(iter(dataset)).tolist() == [3 * item for item in source]


class Source:
    """Counts what is read from it."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        note(self.log, index)
        return np.full(3, index)


@pytest.mark.parametrize("kind", ["ram", "folder"])
def test_without_load_the_source_is_kept(running_pool: keras_mp.WorkerPool, tmp_path: Path, kind: str) -> None:
    cache = "ram" if kind == "ram" else tmp_path / "cache"
    source = Source(tmp_path / "log")
    with keras_mp.PoolDataset(source, batch_size=4, cache=cache, pool=running_pool) as dataset:
        epochs = [[batch.tolist() for batch in dataset] for _ in range(2)]
    assert epochs[0] == epochs[1] == [[[index] * 3 for index in range(first, first + 4)] for first in (0, 4, 8)]
    assert _calls(tmp_path / "log") == Counter(map(str, range(12)))


def test_shards_have_one_cache(tmp_path: Path) -> None:
    with keras_mp.PoolDataset(range(8), load=Load(tmp_path / "log"), collate=len, cache="ram", workers=0) as dataset:
        shard = dataset.shard(2, 0)
        assert next(iter(dataset)) == 8
        assert next(iter(shard)) == 4
        assert sum(_calls(tmp_path / "log").values()) == 8
        dataset.close()
        assert next(iter(shard)) == 4  # the memory is there until the last of them is closed
        assert sum(_calls(tmp_path / "log").values()) == 8
        shard.close()


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_failures_are_of_the_stage_load_and_are_not_kept(tmp_path: Path, policy: Any) -> None:  # P5
    flag = tmp_path / "flag"

    def load(item: int) -> Any:
        if item == 5 and not flag.exists():
            flag.touch()
            raise OSError("five is locked")
        return np.float32(item)

    options: dict[str, Any] = {"batch_size": 8, "cache": "ram", "workers": 0, "on_error": policy}
    with keras_mp.PoolDataset(range(8), load=load, **options) as dataset:
        if policy == "raise":
            with pytest.raises(OSError, match=r"load failed on sample 5 \(5\), batch 0 of epoch 0"):
                next(iter(dataset))
            dataset.set_epoch(0)
        else:
            with pytest.warns(RuntimeWarning, match="1 of 8 samples failed"):
                assert len(next(iter(dataset))) == 7
                dataset.set_epoch(1)
        assert [failure.stage for failure in dataset.failures] == ["load"]
        assert len(next(iter(dataset))) == 8


def test_retries_load_again(tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    def load(item: int) -> Any:
        if not flag.exists():
            flag.touch()
            raise OSError("locked")
        return np.float32(item)

    assert _all(load, "ram", retries=1) == list(range(8))


def test_what_the_transform_fails_on_is_named_also_when_it_was_kept(tmp_path: Path) -> None:
    def transform(sample: Any) -> Any:
        if sample[0] == 3 and (tmp_path / "flag").exists():
            raise ValueError("three")
        return sample

    with keras_mp.PoolDataset(Source(tmp_path / "log"), transform, batch_size=4, cache="ram", workers=0) as dataset:
        dataset[0]
        (tmp_path / "flag").touch()
        with pytest.raises(ValueError, match=r"transform failed on sample 3 \(array of shape \(3,\)"):
            dataset[0]


def test_a_load_that_returns_nothing() -> None:
    with keras_mp.PoolDataset(range(8), load=lambda item: None, workers=0) as dataset:
        with pytest.raises(TypeError, match="load returned None"):
            next(iter(dataset))


def test_what_cannot_be_pickled_cannot_be_kept() -> None:
    def load(item: int) -> Any:
        return (part for part in range(item))

    with keras_mp.PoolDataset(range(8), next, load=load, cache="ram", workers=0) as dataset:
        with pytest.raises(TypeError, match=r"cache failed on sample 0.*leave out cache="):
            next(iter(dataset))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"load": 3}, "load must be callable or None, got 3"),
        ({"load": lambda item, rng: item}, "takes rng.*draw random numbers in `transform`"),
        ({"cache": 3}, "cache must be None, 'ram' or the path of a folder, got 3"),
        ({"cache": ""}, "cache must be None, 'ram' or the path of a folder"),
        ({"cache": b"folder"}, "cache must be None, 'ram' or the path of a folder"),
        ({"cache": "ram", "cache_bytes": 0}, "cache_bytes must be at least 1, got 0"),
        ({"cache": "ram", "cache_bytes": "1 GB"}, "cache_bytes must be an int, got '1 GB'"),
        ({"cache_bytes": 10}, "cache_bytes=10 bounds a cache, but cache=None"),
        ({"cache": "ram", "cache_version": 1.5}, "cache_version must be an int, a str or None, got 1.5"),
        ({"cache": "ram", "pool": "keras"}, "those of pool='keras' cannot"),
    ],
)
def test_bad_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        keras_mp.PoolDataset(range(8), **options)


def test_an_executor_of_processes_cannot_share_memory(tmp_path: Path) -> None:
    with concurrent.futures.ProcessPoolExecutor(1) as executor:
        with pytest.raises(ValueError, match="pass a folder"):
            keras_mp.PoolDataset(range(8), cache="ram", pool=executor)


def _fill(folder: Path) -> None:
    assert _all(_tripled, folder) == [3 * item for item in range(8)]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(keras_mp.KerasMPError, match=r"cannot be made a folder.*Pass a folder"):
        keras_mp.PoolDataset(range(8), cache=tmp_path / "file")


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_cache(tmp_path: Path, content: bytes) -> None:
    (tmp_path / _STORE).write_bytes(content)
    with pytest.raises(keras_mp.KerasMPError, match="Delete its file"):
        keras_mp.PoolDataset(range(8), cache=tmp_path)


@pytest.mark.parametrize("pragma", ["user_version=2", "application_id=1"])
def test_a_cache_of_another_version(tmp_path: Path, pragma: str) -> None:
    _fill(tmp_path)
    store = sqlite3.connect(tmp_path / _STORE)
    store.execute(f"PRAGMA {pragma}")
    store.close()
    with pytest.raises(keras_mp.KerasMPError, match=r"no cache of this version of keras_mp.*Delete it"):
        keras_mp.PoolDataset(range(8), cache=tmp_path)


@pytest.mark.parametrize("harm", ["data", "sum", "null"])
def test_a_damaged_sample_is_loaded_again(tmp_path: Path, harm: str) -> None:
    _fill(tmp_path)
    change = {
        "data": "data = substr(data, 1, length(data) - 1) || x'77'",
        "sum": "sum = x'00'",
        "null": "data = NULL",
    }[harm]
    store = sqlite3.connect(tmp_path / _STORE, isolation_level=None)
    store.execute(f"UPDATE samples SET {change}")
    store.close()
    with keras_mp.PoolDataset(range(8), load=_tripled, cache=tmp_path, batch_size=8, workers=0) as dataset:
        for _ in range(2):
            assert next(iter(dataset)).tolist() == [3 * item for item in range(8)]
            dataset.set_epoch(dataset.epoch + 1)
        assert (dataset.stats().cache_misses, dataset.stats().cache_hits) == (8, 8)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_gives_the_right_data_or_an_error(
    tmp_path: Path, running_pool: keras_mp.WorkerPool, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes anywhere, or the end of the file missing: never a wrong sample, never the end of a worker."""

    def load(item: int) -> Any:
        return np.full(3000, item)

    with keras_mp.PoolDataset(range(32), load=load, cache=tmp_path, pool=running_pool) as dataset:
        next(iter(dataset))
    rng = np.random.default_rng(seed)
    content = bytearray((tmp_path / _STORE).read_bytes())
    for place in rng.integers(200, len(content) - 64, 30):
        content[place : place + 64] = rng.bytes(64)
    (tmp_path / _STORE).write_bytes(content[: len(content) // 2] if seed == 0 else content)
    try:
        dataset = keras_mp.PoolDataset(range(32), load=load, cache=tmp_path, pool=running_pool)
    except keras_mp.KerasMPError as error:
        assert "Delete" in str(error)
        return
    with dataset:
        (batch,) = dataset
        np.testing.assert_array_equal(batch, np.arange(32)[:, None].repeat(3000, 1))
        assert dataset.stats().restarts == 0


def test_a_folder_that_is_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is there is used, the rest is loaded; where there is nothing, that is an error."""
    script = textwrap.dedent(
        """
        import logging, os, sqlite3, sys
        import numpy as np
        import keras_mp, keras_mp.dataset  # all of it now: who we become may not read it

        logging.basicConfig(format="%(message)s", stream=sys.stdout, force=True)  # absl may have set it up
        if os.getuid() == 0:
            os.setgroups([]), os.setgid(65534), os.setuid(65534)

        def load(item):
            return np.float32(item)

        folder, count = sys.argv[1], int(sys.argv[2])
        try:
            with keras_mp.PoolDataset(range(count), load=load, cache=folder, batch_size=16, workers=0) as dataset:
                (batch,) = dataset
                print(batch.sum(), dataset.stats().cache_hits)
        except keras_mp.KerasMPError as error:
            print(error)
        """
    )
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in [tmp_path, *tmp_path.parents]:
        if os.stat(parent).st_uid == os.getuid() and str(parent).startswith("/tmp/pytest"):
            parent.chmod(0o755)

    def run(count: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, folder, str(count)],
            env={**os.environ, "PYTHONPATH": python_path()},
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout

    assert run(8) == "28.0 0\n"
    folder.chmod(0o555)
    (folder / _STORE).chmod(0o444)
    said, numbers = run(16).splitlines()
    assert "takes no more samples: it is read-only" in said
    assert numbers == "120.0 8"
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.unlink()
    folder.chmod(0o555)
    assert "pass another folder that this process may write to" in run(8)
    folder.chmod(0o755)
