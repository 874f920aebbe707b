"""What each worker opens for itself: once, in each, and closed in the end (P4). And locks, which travel unlocked."""

from __future__ import annotations

import concurrent.futures
import gc
import sqlite3
import threading
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import keras_mp
from tests.census import eventually

_KINDS: dict[str, dict[str, Any]] = {
    "in-process": {"workers": 0},
    "threads": {"workers": 2, "use_multiprocessing": False},
    "processes": {"workers": 2},
}


class Opened:
    """An open file of numbers, which notes in a folder when it is opened and closed, and by whom."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()  # nor can it be pickled
        self._mark = f"{threading.get_native_id()} {id(self)}"
        (folder / f"open {self._mark}").touch()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return np.array([index, threading.get_native_id()])

    def close(self) -> None:
        (self.folder / f"close {self._mark}").touch()

    def end(self) -> None:
        (self.folder / f"end {self._mark}").touch()


def _marks(folder: Path, kind: str) -> list[str]:
    return sorted(path.name.partition(" ")[2] for path in folder.iterdir() if path.name.startswith(kind))


@pytest.mark.parametrize("kind", _KINDS)
def test_it_is_opened_once_by_each_worker_and_closed_with_the_dataset(kind: str, tmp_path: Path) -> None:
    source = keras_mp.PerWorker(Opened, tmp_path)
    with keras_mp.PoolDataset(source, batch_size=2, **_KINDS[kind]) as dataset:
        rows = np.concatenate([*dataset, *dataset])
        opened = _marks(tmp_path, "open")
    assert sorted(rows[:, 0].tolist()) == sorted([*range(16), *range(16)])
    at_work = set(rows[:, 1].tolist())
    assert len([mark for mark in opened if int(mark.split()[0]) in at_work]) - len(at_work) in (0, 1)  # one for len()
    assert len(opened) == len(at_work) + 1
    del source, dataset
    assert eventually(lambda: _marks(tmp_path, "close") == opened)


def test_the_way_to_close_it_may_be_another(tmp_path: Path) -> None:
    with keras_mp.PoolDataset(keras_mp.PerWorker(Opened, tmp_path, close=Opened.end), workers=1) as dataset:
        assert len(list(dataset)) == 1
    assert eventually(lambda: _marks(tmp_path, "end") == _marks(tmp_path, "open"))
    assert not _marks(tmp_path, "close")


def test_a_database_is_opened_by_the_workers_that_read_it(tmp_path: Path) -> None:
    path = tmp_path / "squares.db"
    with sqlite3.connect(path) as database:
        database.execute("create table squares (number integer primary key, square integer)")
        database.executemany("insert into squares values (?, ?)", [(number, number**2) for number in range(20)])
    database.close()
    squares = keras_mp.PerWorker(sqlite3.connect, str(path))

    def square(number: int) -> int:
        (found,) = squares().execute("select square from squares where number = ?", (number,)).fetchone()
        return int(found)

    with keras_mp.PoolDataset(range(20), square, batch_size=5, workers=2) as dataset:
        assert np.concatenate(list(dataset)).tolist() == [number**2 for number in range(20)]


class OfThread:
    """What only the thread may close that has opened it."""

    opened: ClassVar[list[OfThread]] = []

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.is_closed = False
        self.opened.append(self)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> int:
        return range(16)[index]

    def close(self) -> None:
        if threading.current_thread() is not self.thread:
            raise RuntimeError("not this thread's")
        self.is_closed = True


def test_each_thread_closes_its_own_when_it_ends() -> None:
    OfThread.opened.clear()
    source = keras_mp.PerWorker(OfThread)
    with keras_mp.PoolDataset(source, batch_size=2, workers=2, use_multiprocessing=False) as dataset:
        assert len(list(dataset)) == 8
        assert len({each.thread for each in OfThread.opened}) > 1
    assert eventually(lambda: all(each.is_closed for each in OfThread.opened))
    assert source[3] == 3  # this thread's, which lives on
    del source, dataset
    assert eventually(lambda: all(each.is_closed for each in OfThread.opened))


def test_what_only_a_thread_may_close_that_lives_on_is_let_go() -> None:
    OfThread.opened.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with keras_mp.PoolDataset(keras_mp.PerWorker(OfThread), batch_size=2, pool=threads) as dataset:
            assert len(list(dataset)) == 8
        held = [weakref.ref(each) for each in OfThread.opened if each.thread is not threading.current_thread()]
        assert held
        OfThread.opened.clear()
        del dataset
        assert eventually(lambda: gc.collect() >= 0 and not any(each() for each in held))  # and nobody is told of it


def test_its_length_may_be_that_of_its_first_axis() -> None:
    class Rows:
        shape = (6, 2)

        def __getitem__(self, index: int) -> Any:
            return np.full(2, index)

    assert len(keras_mp.PerWorker(Rows)) == 6


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [((3,), {}, "open_object must be a function"), ((open, "x"), {"close": "close"}, "close must be callable")],
)
def test_what_opens_and_closes_must_be_callable(arguments: Any, options: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        keras_mp.PerWorker(*arguments, **options)


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_a_lock_travels_as_a_new_one_that_nobody_holds(make: Any) -> None:
    lock = make()

    def locked(x: int) -> int:
        if not lock.acquire(timeout=30):
            raise TimeoutError
        lock.release()
        return x

    with lock, keras_mp.PoolDataset(range(4), locked, batch_size=4, workers=1) as dataset:
        assert [batch.tolist() for batch in dataset] == [[0, 1, 2, 3]]
