"""However it ends, nothing is left and nobody waits: parent killed, interrupted, forked, collected, closed (P3, P4)."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import keras_mp
from keras_mp.workers import handle
from tests.census import eventually, is_gone, worker_pids
from tests.faults import scripts
from tests.faults.common import digest, digests, harmed, undisturbed
from tests.faults.harm import ALWAYS, Harm

_GONE_S = 5.0


class _Taker:
    """Takes a batch on a thread; keeps the outcome."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self._take = take
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._take()
        except BaseException as error:
            self.outcome = error

    def result(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive(), "still waiting"
        return self.outcome


# -- the parent is killed --------------------------------------------------------------------------------------------

_WORKER_STATES = {
    "hangs": "Harm('hang', here, 2)",
    "stands stopped": "Harm('SIGSTOP', here, 2)",
    "holds the GIL": "HoldsGil(here)",
}


@pytest.mark.parametrize(
    ("number", "state"), [*((signal.SIGKILL, state) for state in _WORKER_STATES), (signal.SIGTERM, "hangs")]
)
def test_workers_end_with_their_parent(state: str, number: signal.Signals, tmp_path: Path) -> None:
    code = f"""
    import ctypes
    class HoldsGil:
        def __init__(self, folder): self.folder = folder
        def strike(self):
            (self.folder / f"struck-{{os.getpid()}}").touch()
            ctypes.PyDLL(None).sleep(1000)  # C code that keeps the GIL
    class Transform:
        def __call__(self, row):
            harm.strike()
            return row
    harm = {_WORKER_STATES[state]}
    dataset = keras_mp.PoolDataset(Source(), Transform(), batch_size=4, workers=2)
    dataset[0]
    """
    process = scripts.start(code, tmp_path)
    assert eventually(lambda: len(list(tmp_path.glob("struck-*"))) == 2, 60), scripts.finish(process, 0)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(number)
    assert scripts.finish(process)[0] == -number
    assert eventually(lambda: not any(worker.is_running() for worker in workers), _GONE_S)


def test_workers_end_while_the_parents_fork_lives(tmp_path: Path) -> None:
    code = """
    dataset = harmed("load", Harm("hang", here), workers=2)
    threading.Thread(target=lambda: dataset[3], daemon=True).start()
    while not list(here.glob("struck-*")):
        time.sleep(0.01)
    if os.fork() == 0:
        (here / f"fork-{os.getpid()}").touch()
        os.close(1), os.close(2)
        signal.pause()
    signal.pause()
    """
    process = scripts.start(code, tmp_path)
    assert eventually(lambda: bool(list(tmp_path.glob("fork-*"))), 60), scripts.finish(process, 0)
    fork = psutil.Process(int(next(tmp_path.glob("fork-*")).name.split("-")[1]))
    workers = [child for child in psutil.Process(process.pid).children() if child.pid != fork.pid]
    assert workers
    process.kill()
    scripts.finish(process)
    try:
        assert eventually(lambda: not any(worker.is_running() for worker in workers), _GONE_S)
        assert fork.is_running()
    finally:
        fork.kill()


# -- exit ------------------------------------------------------------------------------------------------------------

_EXITS = {
    "end of script": "",
    "sys.exit": "sys.exit(0)",
    "os._exit": "sys.stdout.flush(); os._exit(0)",
    "held in a global": "held = [dataset[0], iter(dataset)]; next(held[1])",
    "held in a cycle": "cycle = [dataset[0]]; cycle.append(cycle); del cycle, dataset",
    "from a thread": "threading.Thread(target=lambda: [None for _ in dataset]).start()",
}


@pytest.mark.parametrize("how", _EXITS)
def test_exit_without_close(how: str, tmp_path: Path) -> None:
    code = f"""
    dataset = harmed("load", None, workers=2)
    dataset[0]
    print(*dataset.stats()["pids"])
    {_EXITS[how]}
    """
    said = scripts.run(code, tmp_path)
    lines = said.splitlines()
    assert len(lines) == 1, said  # no warning, no "Exception ignored in"
    pids = [int(pid) for pid in lines[0].split()]
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), _GONE_S)


def test_ctrl_c_ends_the_program_as_usual(tmp_path: Path) -> None:
    code = """
    dataset = harmed("load", Harm("hang", here), workers=2)
    print(*dataset[len(dataset) - 1].shape, flush=True)
    for batch in dataset:
        pass
    """
    process = scripts.start(code, tmp_path)
    assert eventually((tmp_path / "struck-0").exists, 60), scripts.finish(process, 0)
    workers = psutil.Process(process.pid).children()
    for worker in workers:  # a terminal sends it to the whole group
        worker.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code_, said = scripts.finish(process)
    assert code_ == -signal.SIGINT, said
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert said.count("Traceback") == 1
    assert eventually(lambda: not any(worker.is_running() for worker in workers), _GONE_S)


# One that hits a finaliser is lost, as everywhere in Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_moment_leaves_the_pool_usable(pool: keras_mp.WorkerPool) -> None:
    """Interrupts from a timer hit every line of the main thread's part, over and over; batches stay right."""
    expected = undisturbed()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    rng = np.random.default_rng(5)
    hits = 0
    try:
        with harmed("load", None, pool=pool) as dataset:
            for _ in range(150):
                dataset.set_epoch(0)
                got: list[str] = []
                try:
                    signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-5, 6e-3)))
                    got.extend(digest(batch) for batch in dataset)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    hits += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert got == expected[: len(got)]
            dataset.set_epoch(0)
            assert digests(dataset) == expected
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits


# -- close -----------------------------------------------------------------------------------------------------------


def test_close_from_another_thread_ends_the_wait(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    """Also of a batch whose code never returns, while the pool lives on; its worker is freed for others."""
    harm = Harm("hang", tmp_path, ALWAYS)
    with harmed("load", None, pool=pool) as other:
        dataset = harmed("load", harm, pool=pool)
        taker = _Taker(lambda: dataset[3])
        assert eventually(lambda: harm.struck == 1)
        dataset.close()
        error = taker.result()
        assert isinstance(error, keras_mp.PoolClosed)
        assert "batch 3 of epoch 0" in str(error)
        dataset.close()
        with pytest.raises(keras_mp.PoolClosed):
            dataset[0]
        assert digests(other) == undisturbed()
        assert eventually(lambda: harm.victims[0] not in worker_pids())


def test_close_while_batches_wait_their_turn(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harm = Harm("hang", tmp_path, ALWAYS)
    dataset = harmed("load", harm, pool=pool, max_queue_size=1)
    dataset[0]
    takers = [_Taker(lambda: dataset[3]) for _ in range(6)]
    assert eventually(lambda: harm.struck == 2)
    dataset.close()
    for taker in takers:
        assert isinstance(taker.result(), keras_mp.PoolClosed)


def test_a_batch_whose_worker_dies_after_close_keeps_nobody_waiting(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    harm = Harm("SIGSTOP", tmp_path, ALWAYS)
    with harmed("load", None, pool=pool) as keeps_the_pool:
        dataset = harmed("load", harm, pool=pool)
        taker = _Taker(lambda: dataset[3])
        assert eventually(lambda: harm.struck == 1)
        dataset.close()
        os.kill(harm.victims[0], signal.SIGKILL)
        assert isinstance(taker.result(), keras_mp.PoolClosed)
        assert digests(keeps_the_pool) == undisturbed()


def test_batches_outlive_their_dataset_and_pool(pool: keras_mp.WorkerPool) -> None:  # P6
    dataset = harmed("load", None, pool=pool)
    held = list(dataset)
    dataset.close()
    pool.close()
    del dataset
    gc.collect()
    assert digests(held) == undisturbed()


def test_closing_the_pool_first_leaves_nothing_of_the_dataset(pool: keras_mp.WorkerPool) -> None:  # P4
    dataset = harmed("load", None, pool=pool)
    dataset[0]
    pool.close()
    dataset.close()


def test_a_dataset_dropped_with_batches_in_flight(tmp_path: Path) -> None:  # P4
    dataset = harmed("load", Harm("hang", tmp_path), workers=2, max_queue_size=6)
    iterator = iter(dataset)
    next(iterator)
    assert eventually((tmp_path / "struck-0").exists)
    del iterator, dataset
    gc.collect()
    assert eventually(lambda: not worker_pids())


def test_an_iterator_dropped_half_way_gives_its_slots_back(pool: keras_mp.WorkerPool) -> None:
    with harmed("load", None, pool=pool) as dataset:
        for _ in range(30):
            dataset.set_epoch(0)
            next(iter(dataset))
        assert digests(dataset) == undisturbed()
        assert dataset.stats()["slots"] <= 40


# -- forks -----------------------------------------------------------------------------------------------------------


def _in_fork(work: Callable[[], bool]) -> int:
    """Exit code of a fork of this process that does `work`: 0 if it gave True."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_can_neither_use_nor_break_the_pool(pool: keras_mp.WorkerPool) -> None:
    with harmed("load", None, pool=pool) as dataset:
        iterator = iter(dataset)
        got = [digest(next(iterator))]

        def use() -> bool:
            with pytest.raises(keras_mp.PoolClosed, match=f"belongs to process {os.getppid()}"):
                dataset[1]
            pool.stats()
            dataset.close()
            pool.close()
            return True

        for _ in range(3):
            assert _in_fork(use) == 0
            got.append(digest(next(iterator)))
        got += digests(iterator)
        assert got == undisturbed()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_may_have_a_dataset_of_its_own(pool: keras_mp.WorkerPool) -> None:
    expected = undisturbed()
    with harmed("load", None, workers=2) as dataset:
        assert digest(dataset[0]) == expected[0]

        def use() -> bool:
            with harmed("load", None, workers=2) as own:
                same = digests(own) == expected
            children = psutil.Process().children
            return same and eventually(lambda: not children())

        assert _in_fork(use) == 0
        assert digest(dataset[1]) == expected[1]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_forks_while_workers_start_and_die(pool: keras_mp.WorkerPool) -> None:
    """A fork never holds what would keep a half-started worker alive, nor a lock that it cannot get."""
    expected = undisturbed()
    with harmed("load", None, pool=pool) as dataset:
        for _ in range(8):
            taker = _Taker(lambda: digests(dataset[i] for i in range(len(dataset))))
            assert _in_fork(lambda: pool.stats()["workers"] == 2) == 0
            assert taker.result() == expected
            for pid in pool.stats()["pids"]:
                os.kill(pid, signal.SIGKILL)


def test_children_of_the_program_inherit_nothing(pool: keras_mp.WorkerPool) -> None:
    with harmed("load", None, pool=pool) as dataset:
        dataset[0]
        listing = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
        ).stdout
    assert "keras_mp" not in listing
    assert "socket" not in listing


# -- processes that do not end as they should ------------------------------------------------------------------------


def _close_everything(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if row[0] == 1300:
        os.closerange(3, 1000)
        signal.pause()
    return row


def test_a_worker_that_closes_its_socket_but_lives(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(np.arange(2400.0).reshape(24, 100), _close_everything, batch_size=4, pool=pool) as data:
        with pytest.raises(keras_mp.WorkerCrashed, match="closed its socket, but went on running, at sample 13"):
            digests(data)


class _LeaveChild:
    """Forks a child that holds all the worker has open, then ends the worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if row[0] == 1300 and not (self.folder / "child").exists():
            child = os.fork()
            if child == 0:
                signal.pause()
            (self.folder / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        return row


def test_a_worker_whose_child_keeps_the_socket_open(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    source = np.arange(2400.0).reshape(24, 100)
    with keras_mp.PoolDataset(source, _LeaveChild(tmp_path), batch_size=4, pool=pool) as data:
        assert digests(data) == digests(source[start : start + 4] for start in range(0, 24, 4))
        assert data.stats()["restarts"] == 1
    assert eventually(lambda: is_gone(int((tmp_path / "child").read_text())))


class _ForkOnce:
    """Forks a child that goes on as if it were the worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if row[0] == 1300 and not (self.folder / "child").exists():
            (self.folder / "child").touch()
            if os.fork() == 0:
                raise SystemExit  # comes back as a failed sample: the child answers for its parent
        return row


def test_a_child_that_answers_for_its_worker(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    source = np.arange(2400.0).reshape(24, 100)
    with keras_mp.PoolDataset(source, _ForkOnce(tmp_path), batch_size=4, pool=pool) as data:
        expected = digests(source[start : start + 4] for start in range(0, 24, 4))
        for _ in range(3):  # whoever answers first, no batch is taken for another
            got: list[str] = []
            try:
                got.extend(digest(batch) for batch in data)
            except keras_mp.SampleError:
                pass
            assert got == expected[: len(got)]
        assert got == expected


def test_all_workers_killed_at_once(tmp_path: Path) -> None:
    """Each is within a batch, which it has told by a file, and is held there by a FIFO that opens when all are dead."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    class Wait:
        def __call__(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if not (tmp_path / "open").exists():
                (tmp_path / f"inside-{os.getpid()}").touch()
                gate.read_text()
            return row * 2

    source = np.arange(2400.0).reshape(24, 100)
    with keras_mp.WorkerPool(4) as pool, keras_mp.PoolDataset(source, Wait(), batch_size=4, pool=pool) as data:
        taker = _Taker(lambda: digests(data))
        assert eventually(lambda: len(list(tmp_path.glob("inside-*"))) == 4)
        (tmp_path / "open").touch()
        for path in tmp_path.glob("inside-*"):
            os.kill(int(path.name.split("-")[1]), signal.SIGKILL)
        assert taker.result() == digests(source[start : start + 4] * 2 for start in range(0, 24, 4))
        assert pool.stats()["restarts"] == 4


def test_a_worker_stopped_and_continued_in_time_is_not_replaced(
    tmp_path: Path, pool: keras_mp.WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_STOPPED_GRACE_S", 60.0)
    harm = Harm("SIGSTOP", tmp_path)
    with harmed("load", harm, pool=pool) as dataset:
        taker = _Taker(lambda: digests(dataset))
        assert eventually(lambda: harm.struck == 1)
        victim = harm.victims[0]
        assert eventually(lambda: psutil.Process(victim).status() == psutil.STATUS_STOPPED)
        os.kill(victim, signal.SIGCONT)
        assert taker.result() == undisturbed()
        assert dataset.stats()["restarts"] == 0


def test_sigpipe_and_sigchld_are_the_programs_own(tmp_path: Path) -> None:
    """Programs that let SIGPIPE end them, or that have their children reaped by the system."""
    code = """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with harmed("load", Harm("SIGKILL", here), workers=2) as dataset:
        got = digests(dataset)
        for _ in range(5):
            for pid in dataset.stats()["pids"]:
                os.kill(pid, signal.SIGKILL)
            dataset.set_epoch(0)
            assert digests(dataset) == got == undisturbed()
    print("right")
    """
    assert scripts.run(code, tmp_path).splitlines()[-1] == "right"
