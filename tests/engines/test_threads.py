"""Threads of this process, ours and executors': the same data as anywhere else, and an end that comes (P2, P3)."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pickle
import random
import signal
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests import transforms
from tests.census import eventually
from tests.support import run_script

_DEADLINE_S = 60.0
_PLACES: dict[str, Any] = {"in-process": {"workers": 0}, "threads": {"workers": 4, "use_multiprocessing": False}}


class _Threads(concurrent.futures.Executor):
    """Each task on a thread of its own; some executors pickle their tasks wherever they run them."""

    def __init__(self, pickles: bool = False, on_thread: bool = True) -> None:
        self._pickles = pickles
        self._on_thread = on_thread
        self._threads: list[threading.Thread] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if self._pickles:
            fn, args, kwargs = pickle.loads(pickle.dumps((fn, args, kwargs)))

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        if self._on_thread:
            self._threads.append(threading.Thread(target=run))
            self._threads[-1].start()
        else:
            run()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for thread in self._threads:
            thread.join()


def _globals() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(keys).tobytes(), rest


def _drawn(epochs: int = 2, **options: Any) -> list[list[Any]]:
    with keras_mp.PoolDataset(
        range(40), transforms.globally_random, batch_size=4, shuffle=True, seed=5, **options
    ) as data:
        batches = [batch for _ in range(epochs) for batch in data]
    return [[part.tolist() for part in batch.values()] for batch in batches]


@pytest.mark.parametrize(
    "options", [{}, {"pickles": True}, {"on_thread": False}], ids=["threads", "pickling threads", "the caller's"]
)
def test_any_executor_gives_the_same_numbers(options: dict[str, bool]) -> None:  # P2
    expected = _drawn(workers=0)
    before = _globals()
    with _Threads(**options) as executor:
        assert _drawn(pool=executor) == expected
    assert _globals() == before


def test_an_executor_in_this_process_need_not_pickle() -> None:
    lock = threading.Lock()

    def locked(x: int) -> int:
        with lock:
            return x + 1

    with _Threads() as executor, keras_mp.PoolDataset(range(4), locked, batch_size=2, pool=executor) as data:
        assert [batch.tolist() for batch in data] == [[1, 2], [3, 4]]


# -- ends ------------------------------------------------------------------------------------------------------------


class _Hanging:
    """A transform that hangs on one sample until it is let go."""

    def __init__(self, sample: int = 4) -> None:
        self.sample = sample
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, x: int) -> int:
        if x == self.sample:
            self.reached.set()
            assert self.go_on.wait(_DEADLINE_S)
        return x


def _on_a_thread(take: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `take`; the result waits for its outcome."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(take())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> Any:
        thread.join(_DEADLINE_S)
        assert not thread.is_alive(), "still waiting"
        return outcome[0]

    return join


def _threads() -> int:
    return sum(thread.name.startswith("keras_mp") for thread in threading.enumerate())


def test_close_leaves_a_thread_that_hangs() -> None:  # P3
    transform = _Hanging()
    data = keras_mp.PoolDataset(range(32), transform, batch_size=2, workers=2, use_multiprocessing=False)
    assert data[0].tolist() == [0, 1]
    running = _on_a_thread(lambda: data[2])
    assert transform.reached.wait(_DEADLINE_S)
    closing = _on_a_thread(data.close)
    outcome = running()  # comes at once, though the thread cannot be ended
    assert isinstance(outcome, keras_mp.PoolClosed)
    assert "closed while batch 2 of epoch 0 was being loaded" in str(outcome)
    with pytest.warns(RuntimeWarning, match=r"batch 2 of epoch 0.*cannot be ended.*use_multiprocessing=True") as caught:
        closing()
        data.close()
    assert len(caught) == 1
    with pytest.raises(keras_mp.PoolClosed):
        data[0]
    transform.go_on.set()
    assert eventually(lambda: _threads() == 0)


def test_who_waits_for_a_batch_in_the_queue_is_told_of_the_close() -> None:
    transform = _Hanging(0)
    data = keras_mp.PoolDataset(range(32), transform, batch_size=2, workers=1, use_multiprocessing=False)
    first = _on_a_thread(lambda: data[0])
    assert transform.reached.wait(_DEADLINE_S)
    second = _on_a_thread(lambda: data[5])
    closing = _on_a_thread(data.close)
    assert isinstance(first(), keras_mp.PoolClosed)
    assert isinstance(second(), keras_mp.PoolClosed)
    transform.go_on.set()
    closing()


def test_a_dataset_that_is_dropped_leaves_no_thread() -> None:  # P4
    data = keras_mp.PoolDataset(range(32), batch_size=2, workers=3, use_multiprocessing=False)
    assert data[0].tolist() == [0, 1]
    assert _threads() == 3
    del data
    assert eventually(lambda: _threads() == 0)


def test_a_batch_that_hangs_holds_up_no_other() -> None:
    """Those not either that came while the first batch was loaded, which is loaded alone."""
    for _ in range(20):
        transform = _Hanging()
        with keras_mp.PoolDataset(
            range(32), transform, batch_size=2, workers=2, max_queue_size=4, use_multiprocessing=False
        ) as data:
            taken = _on_a_thread(lambda data=data: list(itertools.islice(data, 2)))  # type: ignore[misc]
            assert [batch.tolist() for batch in taken()] == [[0, 1], [2, 3]]
            assert transform.reached.wait(_DEADLINE_S)
            transform.go_on.set()


@pytest.mark.parametrize("sample", [0, 4])
@pytest.mark.parametrize("place", ["threads", "executor"])
def test_a_thread_that_was_left_behind_holds_up_no_other_dataset(sample: int, place: str) -> None:  # P3
    transform = _Hanging(sample)
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        options: dict[str, Any] = {"pool": executor} if place == "executor" else _PLACES["threads"]
        data = keras_mp.PoolDataset(range(32), transform, batch_size=2, **options)
        hung = _on_a_thread(lambda: list(data))
        assert transform.reached.wait(_DEADLINE_S)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            data.close()
        assert isinstance(hung(), keras_mp.PoolClosed)
        assert _on_a_thread(lambda: _drawn(**options))() == _drawn(workers=0)
        transform.go_on.set()
    assert eventually(lambda: _threads() == 0)


@pytest.mark.parametrize("end", ["", "data.close()", "raise SystemExit(0)", "del data, taker"])
def test_a_script_whose_transform_hangs_in_a_thread_ends(end: str, tmp_path: Path) -> None:  # P3
    output = run_script(
        tmp_path / "train.py",
        textwrap.dedent(
            f"""
            import threading
            import warnings
            import keras_mp

            warnings.simplefilter("ignore")
            reached = threading.Event()

            def hang(x):
                if x == 4:
                    reached.set()
                    threading.Event().wait()
                return x

            data = keras_mp.PoolDataset(range(32), hang, batch_size=2, workers=2, use_multiprocessing=False)
            print(data[0].tolist())
            taker = iter(data)
            print(next(taker).tolist(), next(taker).tolist())
            reached.wait()
            {end}
            """
        ),
        KERAS_BACKEND="numpy",
    )
    assert output.splitlines() == ["[0, 1]", "[0, 1] [2, 3]"]


def test_a_fork_can_neither_use_the_threads_nor_hang() -> None:  # P3
    with keras_mp.PoolDataset(range(32), batch_size=2, workers=2, use_multiprocessing=False) as data:
        assert data[0].tolist() == [0, 1]
        child = os.fork()
        if child == 0:
            try:
                data[15]
            except keras_mp.PoolClosed as error:
                os._exit(0 if "forked" in str(error) else 2)
            finally:
                os._exit(1)
        ended: list[tuple[int, int]] = []

        def has_ended() -> bool:
            ended.append(os.waitpid(child, os.WNOHANG))
            return ended[-1][0] == child

        if not eventually(has_ended, _DEADLINE_S):
            os.kill(child, signal.SIGKILL)
            ended.append(os.waitpid(child, 0))
        assert os.waitstatus_to_exitcode(ended[-1][1]) == 0
        assert data[1].tolist() == [2, 3]


# -- executors that end ----------------------------------------------------------------------------------------------


def test_closing_the_dataset_ends_the_wait_for_an_executor() -> None:
    transform = _Hanging()
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        data = keras_mp.PoolDataset(range(32), transform, batch_size=2, pool=executor)
        running = _on_a_thread(lambda: data[2])
        assert transform.reached.wait(_DEADLINE_S)
        data.close()
        outcome = running()
        assert isinstance(outcome, keras_mp.PoolClosed)
        assert "closed while batch 2 of epoch 0 was being loaded" in str(outcome)
        transform.go_on.set()


def test_an_executor_that_has_been_shut_down_is_named() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        data = keras_mp.PoolDataset(range(32), batch_size=2, pool=executor)
        assert data[0].tolist() == [0, 1]
    with data, pytest.raises(keras_mp.PoolClosed, match=r"ThreadPoolExecutor.* has been shut down"):
        for _ in data:
            pass


class _Counting(concurrent.futures.ThreadPoolExecutor):
    submitted = 0

    def submit(self, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        future = super().submit(*arguments, **options)
        self.submitted += 1
        return future


def test_an_executor_that_is_shut_down_cancels_no_wait_silently() -> None:
    transform = _Hanging(0)
    executor = _Counting(1)
    with keras_mp.PoolDataset(range(32), transform, batch_size=2, pool=executor) as data:
        first = _on_a_thread(lambda: data[0])
        assert transform.reached.wait(_DEADLINE_S)
        second = _on_a_thread(lambda: list(data))
        assert eventually(lambda: executor.submitted > 2)
        executor.shutdown(wait=False, cancel_futures=True)
        transform.go_on.set()
        assert isinstance(first(), np.ndarray)
        outcome = second()
        assert isinstance(outcome, keras_mp.PoolClosed)
        assert "_Counting that was given as pool= has been shut down" in str(outcome)


# -- what user code keeps --------------------------------------------------------------------------------------------


class _Buffered:
    """Gives whole batches in memory that it uses again."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind = kind
        self.buffer = np.zeros((4, size))
        self.memory = bytearray(8 * size)
        self.nest: dict[str, Any] = {"x": np.zeros(size), "y": (np.zeros(size), None)}
        self.pair = (np.zeros(size), np.zeros(size))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if self.kind == "buffer":
            self.buffer[...] = index
            return self.buffer
        if self.kind == "view":
            self.buffer[...] = index
            return self.buffer[1:3].T[::2], np.full(3, index)
        if self.kind == "bytes":
            view = np.frombuffer(self.memory)
            view[...] = index
            return view
        if self.kind == "nest":
            self.nest["x"][...] = index
            self.nest["y"][0][...] = index
            return self.nest
        for part in self.pair:
            part[...] = index
        return self.pair


def _flat(batch: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(batch, np.ndarray):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch
    return [leaf for part in parts if part is not None for leaf in _flat(part)]


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("size", [4, 1 << 16])
@pytest.mark.parametrize("kind", ["buffer", "view", "bytes", "nest", "pair"])
def test_a_buffer_that_is_used_again_is_copied(kind: str, size: int, place: str) -> None:  # P6
    source = _Buffered(kind, size)
    with keras_mp.parallelize(source, seed=1, **_PLACES[place]) as data:
        for _ in range(2):
            batches = list(data)
            for index, batch in enumerate(batches):
                assert all((leaf == index).all() for leaf in _flat(batch)), (index, batch)


@pytest.mark.parametrize("place", _PLACES)
def test_a_batch_that_a_batch_transform_keeps_is_not_the_consumers(place: str) -> None:  # P6
    kept: list[Any] = []

    def keep(batch: Any) -> Any:
        kept.append(batch)
        return batch

    with keras_mp.PoolDataset(range(8), batch_transform=keep, batch_size=2, **_PLACES[place]) as data:
        for batch in data:
            batch += 100
    assert sorted(batch.tolist() for batch in kept) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("place", _PLACES)
def test_a_batch_that_nobody_keeps_is_not_copied(place: str) -> None:
    made: list[int] = []

    class Fresh:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            x = np.full((8, 64), index, np.float32)
            y = np.arange(8.0).reshape(2, 4)[:, 1:]
            made.extend((x.ctypes.data, y.ctypes.data))
            return {"x": x[..., None], "y": [y, index]}

    with keras_mp.parallelize(Fresh(), **_PLACES[place]) as data:
        served = [part.ctypes.data for batch in data for part in (batch["x"], batch["y"][0])]
    assert set(served) <= set(made)
