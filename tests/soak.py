"""Trains for a while as workers are killed, stopped and starved at random, and checks every batch and epoch of it.

    python -m tests.soak --seconds 600 --seed 7
    python -m tests.soak --seed 7 --round 31          # that round again

Rounds of real `model.fit`, on the dataset itself and through `to_tf_dataset()`, iterations that are given up half-way,
and episodes (tests/episodes.py): passes in the way of each Keras version and calls of `fit`, with looks, resumes and
iterations in iterations at random; and streams (tests/stream_episodes.py). Every batch must be bit for bit what a
process without workers makes of the same seed, in every epoch (P1, P2), and still be that when it is held for long
(P6). Nothing may be left at the end (P4). No batch is hit twice, since that would rightly be an error. The exit code is
1 if anything was wrong.

What happens in a round follows from the seed and the round's number; when workers are hit, from the clock too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import numpy.typing as npt
import psutil

import keras_mp
from keras_mp.workers.handle import WorkerHandle
from tests import census, episodes, stream_episodes
from tests.faults.common import digest
from tests.soak_data import SIDE, transform

_SAMPLES, _BATCH_SIZE = 500, 32
_EPOCHS = 2
_HELD = 40
_MAX_SLOTS = 3 * (_HELD + 30)
_MAX_RSS_GROWTH = 300 << 20
EXPECTED_WARNINGS = (
    "keras_mp: .* samples failed",
    "__array__ implementation doesn't accept a copy keyword",  # h5py's, of TensorFlow's variables
    "Your input ran out of data",  # `steps_per_epoch` that does not divide the batches
)
_ENDS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)

# What is not drawn in the first episodes of a round, so that each kind comes.
_KINDS: list[dict[str, Any]] = [
    {},
    {"steps": 2, "ahead": 3},
    {"as_keras": False},
    {"builds": True},
    {"interruptions": 6, "looks": 0.4},
    {"as_keras": True, "picks": True, "looks": 0.4},
    {"parts": 2, "by_keras": True},
    {"parts": 3, "by_keras": False},
]
KINDS_OF_EPISODES = len(_KINDS)

Array = npt.NDArray[Any]


def make_dataset(seed: int, pool: keras_mp.WorkerPool | None) -> keras_mp.PoolDataset:
    """The dataset of a round, on workers or (the reference) without."""
    where: dict[str, Any] = {"workers": 0} if pool is None else {"pool": pool}
    return Checked(
        range(_SAMPLES), transform, batch_size=_BATCH_SIZE, shuffle=True, seed=seed, on_error="replace", **where
    )


class Checked(keras_mp.PoolDataset):
    """Tells `watch(epoch, index, batch)` of every batch that Keras takes, in a `fit` that does not shuffle."""

    watch: Any = None

    def __getitem__(self, index: int) -> Any:
        batch = super().__getitem__(index)
        if self.watch is not None:
            self.watch(self.epoch, index, batch)  # the epoch only now: with the batch it may have begun
        return batch


@dataclasses.dataclass
class Report:
    """What a run did."""

    rounds: int = 0
    batches: int = 0
    epochs: int = 0
    episodes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    held: int = 0
    kills: int = 0
    stops: int = 0
    stalls: int = 0
    starvations: int = 0
    restarts: int = 0
    most_slots: int = 0
    rss_growth: int = 0
    mismatches: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    leaks: list[str] = dataclasses.field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.mismatches or self.errors or self.leaks)

    def __str__(self) -> str:
        lines = [
            f"{self.rounds} rounds, {self.batches} batches checked, {self.held} of them again after being held",
            f"{self.epochs} epochs checked in episodes: " + ", ".join(f"{n} {k}" for k, n in self.episodes.items()),
            f"{self.kills} kills, {self.stops} stops for good, {self.stalls} stalls, {self.starvations} starvations",
            f"{self.restarts} restarts, {self.most_slots} slots at most, memory grew by {self.rss_growth >> 20} MiB",
            f"{len(self.mismatches)} mismatches, {len(self.errors)} errors, {len(self.leaks)} leaks",
        ]
        return "\n".join([*lines, *self.mismatches[:20], *self.errors[:5], *self.leaks[:20]])


class Checker:
    """Compares batches with those of a dataset without workers, and holds some to compare them again later."""

    def __init__(self, seed: int, report: Report, rng: random.Random) -> None:
        self._reference = make_dataset(seed, None)
        self._report = report
        self._rng = rng
        self._held: collections.deque[tuple[str, str, Any]] = collections.deque()

    def watch(self, epoch: int, index: int, batch: Any) -> None:
        """Checks one batch, arrays or tensors."""
        if self._reference.epoch != epoch:
            self._reference.set_epoch(epoch)
        expected = digest(self._reference[index])
        name = f"batch {index} of epoch {epoch} in round {self._report.rounds}"
        self._report.batches += 1
        if _digest(batch) != expected:
            self._report.mismatches.append(f"{name} differs")
        if self._rng.random() < 0.3:
            self._held.append((name, expected, batch))
        while len(self._held) > _HELD:
            self._let_go()

    def finish(self) -> None:
        """Looks at what is still held."""
        while self._held:
            self._let_go()

    def _let_go(self) -> None:
        self._held.rotate(-self._rng.randrange(len(self._held)))
        name, expected, batch = self._held.popleft()
        self._report.held += 1
        if _digest(batch) != expected:
            self._report.mismatches.append(f"{name} was overwritten while it was held")


def _digest(batch: Any) -> str:
    return digest(tuple(np.asarray(part) for part in batch))


class Chaos(threading.Thread):
    """Kills, stops and starves workers until told to end."""

    def __init__(self, pools: Iterable[keras_mp.WorkerPool], seed: int, report: Report) -> None:
        super().__init__(name="chaos", daemon=True)
        self._dispatchers = [pool._dispatcher for pool in pools]
        self._rng = random.Random(seed)
        self._report = report
        self._over = threading.Event()
        self._stalled: list[psutil.Process] = []

    def run(self) -> None:
        while not self._over.wait(self._rng.expovariate(2.5)):
            self._go_on()
            for dispatcher in self._rng.sample(self._dispatchers, len(self._dispatchers)):
                with dispatcher.lock:
                    victims = [handle.process.pid for handle in dispatcher.workers.handles if _may_be_hit(handle)]
                    if victims:
                        self._act(victims)
                        break
        self._go_on()

    def finish(self) -> None:
        """Ends the chaos."""
        self._over.set()
        self.join()

    def _act(self, victims: list[int]) -> None:
        pid = self._rng.choice(victims)
        deed = self._rng.choices(["kill", "kill all", "stop", "stall", "starve"], [8, 1, 1, 5, 3])[0]
        if deed == "kill":
            self._signal(pid, self._rng.choice(_ENDS))
            self._report.kills += 1
        elif deed == "kill all":
            for each in victims:
                self._signal(each, signal.SIGKILL)
                self._report.kills += 1
        elif deed == "stop":
            self._signal(pid, signal.SIGSTOP)
            self._report.stops += 1
        elif deed == "stall":
            self._signal(pid, signal.SIGSTOP)
            self._stalled.append(psutil.Process(pid))
            self._report.stalls += 1
        else:
            self._starve(pid)
            self._report.starvations += 1

    def _starve(self, pid: int) -> None:
        """No more descriptors for this worker. (No larger slots would rightly be an error.)"""
        try:
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (17, hard))
        except ProcessLookupError:
            pass

    def _go_on(self) -> None:
        while self._stalled:
            process = self._stalled.pop()
            try:
                process.resume()  # looks first whether the pid is still that process's
            except psutil.NoSuchProcess:
                pass

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _may_be_hit(handle: WorkerHandle) -> bool:
    if handle.end is not None or handle.is_stopped or not handle.process.ready:
        return False  # where starts fail, too, a small pool would rightly say that none succeeds
    faults = [fault for job in handle.jobs for fault in job.faults]
    return all(fault.kind == "unstarted" for fault in faults) and len(faults) < 2


def _make_model() -> Any:
    model = keras.Sequential(
        [keras.layers.Input((SIDE, SIDE, 3)), keras.layers.Flatten(), keras.layers.Dense(4), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    return model


def _fit(dataset: Any, checker: Checker, model: Any) -> None:
    dataset.watch = checker.watch
    model.fit(dataset, epochs=_EPOCHS, shuffle=False, verbose=0)
    dataset.watch = None


def _fit_through_tf_data(dataset: Any, checker: Checker, model: Any) -> None:
    import tensorflow as tf

    def check(number: Any, pictures: Any, labels: Any) -> Any:
        epoch, index = divmod(int(number), len(dataset))
        checker.watch(epoch, index, (pictures, labels))
        return np.int64(0)

    def look(number: Any, batch: Any) -> Any:
        with tf.control_dependencies([tf.numpy_function(check, [number, *batch], tf.int64)]):
            return tuple(tf.identity(part) for part in batch)

    exported = dataset.to_tf_dataset(epochs=_EPOCHS).enumerate().map(look)
    model.fit(exported, epochs=1, verbose=0, shuffle=False)


def _hold_tensors(dataset: Any, checker: Checker, model: Any) -> None:
    for number, batch in enumerate(dataset.to_tf_dataset(epochs=_EPOCHS)):
        checker.watch(*divmod(number, len(dataset)), batch)


def _give_up_half_way(dataset: Any, checker: Checker, model: Any) -> None:
    for _ in range(4):
        dataset.set_epoch(0)
        batches: Iterator[Any] = iter(dataset)
        for index in range(len(dataset) // 3):
            checker.watch(0, index, next(batches))


def _flush_tensorflow() -> None:
    """TensorFlow lets go of the last arrays that it was given only when a later call into Python returns."""
    import tensorflow as tf

    for _ in range(2):
        tf.numpy_function(lambda: np.int64(0), [], tf.int64)


def _run_episodes(rng: random.Random, pools: episodes.Pools, report: Report, until: Callable[[], bool]) -> None:
    """Episodes of every kind, and then others until it is time for something else."""
    for fixed in (*_KINDS, *itertools.repeat({}, 8)):
        if report.episodes["driven"] >= len(_KINDS) and until():
            return
        driving = episodes.draw_driving(rng, **fixed)
        with _told(driving):
            report.epochs += episodes.run_driven(rng, pools, driving)
        report.episodes["driven"] += 1


def _run_trained_episode(rng: random.Random, pools: episodes.Pools, report: Report, model: Any) -> None:
    for fixed in ({"interruptions": ()}, {"looks": 0.4}):
        training = episodes.draw_training(rng, **fixed)
        with _told(training):
            report.epochs += episodes.run_fit(rng, pools, training, model)
        report.episodes["trained"] += 1


@contextlib.contextmanager
def _told(options: Any) -> Iterator[None]:
    """Says of an error in which episode it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {options}")
        raise


def soak(seconds: float, seed: int, workers: int = 2, only: int | None = None) -> Report:
    """Runs for about `seconds`; the last round is finished.

    Args:
        seconds: how long.
        seed: of the chaos and of the data.
        workers: processes in the pool.
        only: the number of the one round to run, over and over.
    """
    report = Report()
    model, counting = _make_model(), episodes.make_model()
    # What TensorFlow keeps for itself.
    _hold_tensors(make_dataset(seed, None), Checker(seed, Report(), random.Random(seed)), model)
    model.fit(make_dataset(seed, None), verbose=0)
    before = census.take_census()
    pools = {count: keras_mp.WorkerPool(count) for count in {1, 3, workers}}
    chaos = Chaos(pools.values(), seed, report)
    chaos.start()
    process, rss = psutil.Process(), 0
    started = time.monotonic()
    ways = [_fit, None, _fit_through_tf_data, None, _hold_tensors, None, _give_up_half_way, None]

    def is_over() -> bool:
        return time.monotonic() - started > seconds

    try:
        while not is_over() and report.clean:
            if not rss and time.monotonic() - started > seconds / 3:
                rss = process.memory_info().rss
            number = report.rounds if only is None else only
            rng = random.Random(f"{seed}, round {number}")
            way = ways[number % len(ways)]
            if way is None:
                _run_episodes(rng, pools, report, is_over)
                _run_trained_episode(rng, pools, report, counting)
                report.epochs += stream_episodes.run_stream(rng, pools)
                report.episodes["streamed"] += 1
            else:
                round_seed = rng.randrange(1 << 30)
                checker = Checker(round_seed, report, rng)
                with make_dataset(round_seed, pools[workers]) as dataset:
                    way(dataset, checker, model)
                    checker.finish()
                    report.most_slots = max(report.most_slots, dataset.stats()["slots"])
                del dataset, checker
            report.rounds += 1
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        kind = report.mismatches if isinstance(error, episodes.Mismatch) else report.errors
        kind.append(f"seed {seed}, round {report.rounds if only is None else only}: {text}")
    finally:
        chaos.finish()
        for pool in pools.values():
            report.restarts += pool.stats()["restarts"]
            pool.close()
    report.rss_growth = max(0, process.memory_info().rss - rss) if rss else 0
    if report.rss_growth > _MAX_RSS_GROWTH:
        report.leaks.append(f"memory grew by {report.rss_growth} bytes after the first third")
    if report.most_slots > _MAX_SLOTS:
        report.leaks.append(f"{report.most_slots} slots for {_HELD} held batches")
    _flush_tensorflow()
    report.leaks += census.wait_until_nothing_is_left(before)
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--round", type=int, default=None, help="only this one, over and over")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        report = soak(options.seconds, options.seed, options.workers, options.round)
    sys.stdout.write(f"seed {options.seed}, {options.seconds:g} s, {options.workers} workers\n{report}\n")
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
