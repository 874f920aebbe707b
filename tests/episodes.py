"""Episodes of the soak: passes over a dataset as Keras runs them, and in between whatever a user may do to it.

An episode draws a dataset, where it is loaded and how its batches are asked for, and goes through a few epochs: calls
of `fit` that are given up, looks, iterations in iterations, and resumes on another number of workers come at random.
What should be served is kept beside it, from the rules of `docs/epochs.md` alone. Of each epoch: every sample comes
once (P1), and the batches are those of a plain loop without workers (P2).

`run_driven` asks as each version of Keras does. `run_fit` trains: what the model has consumed is told by its weights,
of which there is one a sample.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import random
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

import keras_mp
from tests.faults.common import digest
from tests.soak_data import WIDTH, Batches, Sample, one_hot

_MOST_EPOCHS = 12  # more than any episode comes to
_MOST_INTERRUPTIONS = 6

Record = tuple[tuple[int, ...], str]  # the samples of a batch, and all of it as text
Pools = Mapping[int, keras_mp.WorkerPool]


class Mismatch(Exception):
    """Something was not as promised."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a dataset is made of.

    Attributes:
        seed: of the dataset.
        samples: how many samples (of `parallelize`: batches).
        batch_size: on each part.
        order: "shuffle", "order" or "plain"; "batches" is `parallelize`, which has none either.
        repeats: how many samples come twice in an `order`.
        drop_remainder: as the argument.
        failing: samples that fail and are skipped.
        draws: whether samples draw from the global generators, too.
        one_hot: whether samples are inputs and targets of the model.
    """

    seed: int
    samples: int
    batch_size: int
    order: str
    repeats: int = 0
    drop_remainder: bool = False
    failing: tuple[int, ...] = ()
    draws: bool = True
    one_hot: bool = False

    @property
    def is_ordered(self) -> bool:
        """Whether the dataset has an order of its own."""
        return self.order in ("shuffle", "order")

    def make(self, place: tuple[str, int], depth: int, pools: Pools) -> Any:
        """The dataset, loaded at a place: in-process, on threads or on worker processes."""
        kind, count = place
        places: dict[str, dict[str, Any]] = {
            "in-process": {"workers": 0},
            "threads": {"workers": count, "use_multiprocessing": False},
            "pool": {"pool": pools.get(count)},
        }
        where = places[kind]
        if self.order == "batches":
            return keras_mp.parallelize(Batches(self.samples), seed=self.seed, max_queue_size=depth, **where)
        return keras_mp.PoolDataset(
            range(self.samples),
            one_hot if self.one_hot else Sample(self.failing, self.draws),
            batch_size=self.batch_size,
            shuffle=self.order == "shuffle",
            order=Order(self) if self.order == "order" else None,
            seed=self.seed,
            drop_remainder=self.drop_remainder,
            on_error="skip" if self.failing else "raise",
            max_queue_size=depth,
            **where,
        )

    def plain(self) -> Any:
        """The dataset without workers."""
        return self.make(("in-process", 0), 1, {})

    def check_once(self, epoch: int, served: list[int], failures: set[tuple[int, int, int | None]], parts: int) -> None:
        """Checks P1: what all parts have served, together with the failures that were reported."""
        failed = [index for of, index, _ in failures if of == epoch]
        substitutes = collections.Counter(by for of, _, by in failures if of == epoch and by is not None)
        found = collections.Counter(served + failed)
        found.subtract(substitutes)
        length = self.samples + self.repeats
        kept = length - length % (self.batch_size * parts) if self.drop_remainder else length
        if self.order == "shuffle" and kept < length:
            wanted = collections.Counter(sample for sample in found if 0 <= sample < self.samples)
        elif self.order == "order":
            wanted = collections.Counter(Order(self)(epoch, None)[:kept].tolist())
        else:
            wanted = collections.Counter(range(kept))
        wrong = {sample for sample in {*found, *wanted} if found[sample] != wanted[sample]}
        if wrong or found.total() != kept or not {*failed} <= {*self.failing}:
            raise Mismatch(
                f"epoch {epoch} is not {kept} samples once each: wrong are {sorted(wrong)}, failed {failed}, "
                f"substitutes {dict(substitutes)}, served {served}"
            )


@dataclasses.dataclass(frozen=True)
class Order:
    """An `order=`: all samples, and some of them twice."""

    data: Data

    def __call__(self, epoch: int, rng: Any) -> Any:
        order = np.random.default_rng([self.data.seed, epoch]).permutation(self.data.samples)
        return np.concatenate([order, order[: self.data.repeats]])


def _draw_data(rng: random.Random, parts: int = 1, **options: Any) -> Data:
    order = rng.choice(["shuffle", "shuffle", "order", "plain", "batches"])
    samples, batch_size = rng.randint(2 * parts, 40), rng.randint(1, 8)
    repeats, drop_remainder, failing = 0, False, 0
    if options.get("one_hot"):
        order = "plain" if order == "batches" else order
        samples = min(samples, WIDTH)
    if order == "batches":
        batch_size = 1
    else:
        drop_remainder = rng.random() < 0.3 and samples >= batch_size * parts
        failing = rng.randint(1, max(1, samples // 3)) if rng.random() < 0.3 and not options else 0
    if batch_size == 1:
        samples -= samples % parts
    if order == "order" and not failing and batch_size > 1:
        repeats = rng.randint(0, samples // 2)
    fails = tuple(sorted(rng.sample(range(samples), failing)))
    return Data(
        rng.randrange(1 << 30),
        samples,
        batch_size,
        order,
        repeats,
        drop_remainder,
        fails,
        rng.random() < 0.5,
        **options,
    )


def _draw_place(rng: random.Random, pools: Pools, threads: bool = True) -> tuple[str, int]:
    kind = rng.choice(["in-process", "threads" if threads else "in-process", "pool", "pool"])
    return kind, 0 if kind == "in-process" else rng.randint(1, 3) if kind == "threads" else rng.choice(sorted(pools))


# -- what Keras calls ------------------------------------------------------------------------------------------------

_Method = Callable[..., Any]


def _prepare(dataset: Any) -> int:
    return int(dataset.workers)


def _begin(dataset: Any) -> None:
    dataset.on_epoch_begin()


def _end(dataset: Any) -> None:
    dataset.on_epoch_end()


def _count(dataset: Any) -> int:
    return int(dataset.num_batches)


def _take(dataset: Any, number: int) -> Any:
    return dataset[number]


_MINE: tuple[_Method, ...] = (_prepare, _begin, _end, _count, _take)
# The same code as part of the package `keras`: who calls is told by that.
_KERAS: tuple[_Method, ...] = tuple(
    types.FunctionType(method.__code__, {**globals(), "__name__": "keras.driver"}) for method in _MINE
)


def _global_random(count: int, epoch: int) -> list[int]:
    numbers = list(range(count))
    random.shuffle(numbers)
    return numbers


def _random_of_epoch(count: int, epoch: int) -> list[int]:
    numbers = list(range(count))
    random.Random(epoch).shuffle(numbers)
    return numbers


def _in_order(count: int, epoch: int) -> list[int]:
    return list(range(count))


_WAYS = {"random": _global_random, "Random(epoch)": _random_of_epoch, "in order": _in_order}


@dataclasses.dataclass
class _Division:
    """What Keras 3.16 asks of a distribution that divides the data among processes."""

    num_data_shards: int
    data_shard_id: int
    auto_shard_dataset: bool = True


@contextlib.contextmanager
def _divided(parts: int, index: int) -> Iterator[None]:
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(_Division(parts, index))
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


# -- driven passes ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Driving:
    """How an episode goes.

    Attributes:
        data: the dataset.
        epochs: how many are gone through, at least.
        way: how the numbers of a pass are ordered.
        parts: among how many processes the data is divided.
        by_keras: whether Keras divides it, or `shard`.
        as_keras: whether the dataset sees Keras's code calling.
        steps: `steps_per_epoch`.
        ahead: how many batches of a pass are taken before they are needed, as TensorFlow does; 0: a pass begins when
            its first batch is needed.
        builds: whether a first pass takes one batch and is given up.
        interruptions: how often a call may be given up or the dataset be resumed.
        looks: how many looks there are at a moment, on average.
        picks: whether batches are looked at by number.
    """

    data: Data
    epochs: int
    way: str
    parts: int
    by_keras: bool
    as_keras: bool
    steps: int | None
    ahead: int
    builds: bool
    interruptions: int
    looks: float
    picks: bool


def draw_driving(rng: random.Random, **fixed: Any) -> Driving:
    """Draws an episode; `fixed` are fields that are not drawn."""
    parts = fixed.get("parts") or rng.choices([1, 2, 3], [4, 1, 1])[0]
    data = _draw_data(rng, parts)
    most = data.samples // data.batch_size + 2
    drawn: dict[str, Any] = {
        "data": data,
        "epochs": rng.randint(1, 4),
        "way": rng.choice(sorted(_WAYS)),
        "parts": parts,
        "by_keras": parts > 1 and rng.random() < 0.6,
        "as_keras": rng.random() < 0.7,
        "steps": rng.randint(1, most) if rng.random() < 0.4 else None,
        "ahead": rng.choice([0, 0, 1, 2, 5, 100]),
        "builds": rng.random() < 0.3,
        "interruptions": rng.randint(0, _MOST_INTERRUPTIONS),
        "looks": rng.choice([0, 0.1, 0.4]),
        "picks": rng.random() < 0.2,
        **fixed,
    }
    if drawn["picks"] and not drawn["as_keras"]:
        # Requests by number like any other: what is looked at counts as taken.
        drawn |= {"interruptions": 0, "ahead": 0, "builds": False}
    return Driving(**drawn)


@dataclasses.dataclass
class _Run:
    """A pass or an iteration: the epoch, what of it had been handed out before, and what came since.

    Attributes:
        length: batches that it takes in all.
        numbers: those that were asked for, in a pass; None: an iteration.
    """

    epoch: int
    before: list[Record]
    length: int
    numbers: list[int] | None
    records: list[Record] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> list[Record]:
        """What of the epoch has been handed out."""
        return self.before + self.records

    @property
    def is_complete(self) -> bool:
        """Whether all of it has been."""
        return len(self.records) == self.length


class _Part:
    """One process's way through the epochs, and what it should meet on it."""

    def __init__(self, options: Driving, index: int, pools: Pools, rng: random.Random) -> None:
        self._options = options
        self._data = options.data
        self._index = index
        self._pools = pools
        self._rng = rng
        self._prepare, self._begin, self._end_epoch, self._read, self._request = _KERAS if options.as_keras else _MINE
        self._stride = options.parts if options.by_keras else 1
        self.whole: dict[int, list[Record]] = {}  # by epoch
        self.failures: set[tuple[int, int, int | None]] = set()
        self.places: list[str] = []  # where it was loaded, from one resume to the next
        self._reference = self._divide(self._data.plain(), options.parts > 1)
        self._plain: dict[int, list[Record]] = {}
        self._permuted: dict[int, list[Record]] = {}
        self._count = len(self._reference)
        self._interruptions = options.interruptions
        self._picked: set[int] = set()  # epochs
        self._dataset = self._make()
        # What should be: the epoch, what of it was handed out before it was resumed, and how it was begun.
        self._epoch = 0
        self._before: list[Record] = []
        self._begun_by: _Run | None = None
        self._is_resumed = False
        self._run: _Run | None = None  # the pass that is under way
        self._current = _Run(0, [], self._count, None)  # who was last handed out something
        self._held: list[tuple[Iterator[Any], _Run]] = []
        self._is_beginning = False  # a pass: nothing has been asked for since `num_batches` or `on_epoch_begin`

    def go(self) -> None:
        """Goes through all epochs."""
        try:
            self._build()
            while self._epoch < self._options.epochs:
                passes = self._options.epochs - self._epoch
                self._fit(passes * -(-self._count // min(self._options.steps or self._count, self._count)))
                self._look()
            self._forget()
        finally:
            self._held.clear()
            self._dataset.close()
            self._reference.close()
        if sorted(self.whole) != list(range(self._epoch)):
            raise Mismatch(f"epochs {sorted(self.whole)} have been gone through, but the current one is {self._epoch}")

    def _make(self) -> Any:
        # Threads share the global `random` with the driver, which may shuffle with it just as a sample draws.
        threads = not (self._options.way == "random" and self._data.draws)
        place, depth = _draw_place(self._rng, self._pools, threads), self._rng.randint(1, 12)
        self.places.append(f"{' '.join(map(str, place))}, max_queue_size={depth}")
        dataset = self._data.make(place, depth, self._pools)
        return self._divide(dataset, self._options.parts > 1 and not self._options.by_keras)

    def _divide(self, dataset: Any, divide: bool) -> Any:
        return dataset.shard(self._options.parts, self._index) if divide else dataset

    def _forget(self) -> None:
        self.failures |= {(f.epoch, f.index, f.replaced_by) for f in self._dataset.failures}

    # -- calls of Keras ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        if not self._options.builds:
            return
        self._end()
        self._begin(self._dataset)
        next(self._pass(0))
        self._end()

    def _fit(self, epochs: int) -> None:
        """A call of `fit`; it may be given up, or the dataset be resumed, at any time."""
        self._prepare(self._dataset)
        if self._options.as_keras and self._run is not None and not self._run.is_complete:
            self._run = None
        if not self._options.as_keras:
            self._end()  # or the length of what was resumed would be taken for that of each pass
        steps, per_pass = self._options.steps, self._read(self._dataset) // self._stride
        self._is_beginning = True
        self._end()
        batches: Iterator[Any] | None = None
        seen = 0
        for epoch in range(epochs):
            self._begin(self._dataset)
            self._is_beginning = True
            self._look()
            if batches is None or steps is None:
                batches, seen = self._taken_ahead(self._pass(epoch)), 0
            for _ in range(steps or per_pass):
                if seen >= per_pass:
                    break
                seen += 1
                try:
                    next(batches)
                except StopIteration:  # a resumed epoch has fewer batches than Keras expects
                    batches = None
                    break
                self._look()
                if self._is_interrupted():
                    return
            if batches is not None and seen >= per_pass:
                batches, seen = self._taken_ahead(self._pass(epoch + 1)), 0
            self._look()
            self._end()
            self._look()
            if self._is_interrupted():
                return

    def _pass(self, epoch: int) -> Iterator[None]:
        count = self._read(self._dataset)
        if count != (self._count - len(self._before_of_next())) * self._stride:
            raise Mismatch(f"a pass has {count} batches, {len(self._before_of_next())} of {self._count} are done")
        numbers = _WAYS[self._options.way](count, epoch)
        if self._stride > 1:
            numbers = numbers[self._index :: self._stride]
        run = None
        for number in numbers:
            batch = self._request(self._dataset, number)
            self._is_beginning = False
            if run is None:
                if self._run is not None and self._run.is_complete:
                    self._end_run()
                run = self._run = _Run(self._epoch, self._before, self._count - len(self._before), [])
                self._note_beginning(run)
            self._current = run
            assert run.numbers is not None
            run.numbers.append(number)
            run.records.append(_record(batch))
            yield

    def _before_of_next(self) -> list[Record]:
        """What is done of the epoch that a pass which begins now goes through."""
        return [] if self._run is not None and self._run.is_complete else self._before

    def _taken_ahead(self, batches: Iterator[None]) -> Iterator[None]:
        """The same, some of them taken at once."""
        taken = list(itertools.islice(batches, self._options.ahead))

        def go_on() -> Iterator[None]:
            while taken:
                yield taken.pop()
                taken.extend(itertools.islice(batches, self._options.ahead - len(taken)))
            yield from batches

        return go_on()

    def _end(self) -> None:
        self._end_epoch(self._dataset)
        if self._run is not None and self._run.is_complete:
            self._end_run()

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is not None and run is self._current:
            self._finish(run)

    # -- what may come between -----------------------------------------------------------------------------------

    def _is_interrupted(self) -> bool:
        if not self._interruptions or self._rng.random() > 0.1:
            return False
        self._interruptions -= 1
        # What was left of a resumed epoch is not given up at its very end: the next `fit` would take its length for
        # that of every pass.
        if self._rng.random() < 0.6 or (self._run is not None and self._run.is_complete and self._run.before):
            self._resume()
        return True

    def _resume(self) -> None:
        """The dataset is left, and another one goes on; or the same one goes back to where it is."""
        state = json.loads(json.dumps(self._dataset.state_dict()))
        if self._rng.random() < 0.8:
            self._forget()
            self._dataset.close()
            self._dataset = self._make()
            self._run = None
            if self._options.by_keras:
                self._read(self._dataset)  # from then on it is divided
        self._held.clear()
        self._dataset.load_state_dict(state)
        current = self._current
        if len(current.done) == self._count:
            self._epoch = current.epoch
            self._finish(current)
        else:
            self._epoch, self._before = current.epoch, current.done
        self._current = _Run(self._epoch, self._before, self._count - len(self._before), None)
        self._is_resumed = True
        self._look_at_numbers()

    def _look(self) -> None:
        looks = [self._look_at_numbers, self._look_at_state, self._iterate, self._iterate, self._hold]
        if self._options.picks:
            looks.append(self._pick)
        while self._rng.random() < self._options.looks / (1 + self._options.looks):
            self._rng.choice(looks)()
            self._look_at_numbers()

    def _look_at_numbers(self) -> None:
        dataset = self._dataset
        if self._options.as_keras or (self._options.steps is None and not self._options.picks):
            assert dataset.num_batches
        assert dataset.stats()["epoch"] == dataset.epoch and repr(dataset) and dataset.failures is not None
        if (dataset.epoch, len(dataset)) != (self._epoch, self._count - len(self._before)):
            raise Mismatch(
                f"it is epoch {dataset.epoch} with {len(dataset)} batches left, but should be epoch {self._epoch} with "
                f"{self._count - len(self._before)}"
            )

    def _look_at_state(self) -> None:
        state, current = self._dataset.state_dict(), self._current
        epoch, done = current.epoch, len(current.done)
        if done == self._count:
            epoch, done = epoch + 1, 0
        found = state["epoch"], state["position"] - len(state["missing"])
        if found != (epoch, done):
            raise Mismatch(f"the state is {found}, but batch {done} of epoch {epoch} is next")

    def _iterate(self, depth: int = 0) -> None:
        """An iteration, dropped or whole, perhaps with another one inside."""
        moves = self._run is None
        run = _Run(self._epoch, self._before, self._count - len(self._before), None)
        take = self._rng.choice([1, self._rng.randint(1, run.length), run.length])
        if depth and moves:
            take = run.length  # one that is dropped would keep the iteration around it from ending the epoch
        for batch in self._dataset:
            run.records.append(_record(batch))
            if moves and run.epoch == self._epoch:
                self._current = run
                if len(run.records) == 1:
                    self._note_beginning(run)
                if run.is_complete:
                    self._finish(run)
            if depth < 2 and self._rng.random() * run.length < 0.5:
                self._iterate(depth + 1)
            if len(run.records) == take and self._rng.random() < 0.9:
                break
        self._check_look(run)

    def _hold(self) -> None:
        """Iterators that are begun in the middle of a pass and go on at other times."""
        if self._run is None:
            return
        if len(self._held) < 3:
            run = _Run(self._epoch, self._before, self._count - len(self._before), None)
            self._held.append((iter(self._dataset), run))
            self._held[-1][1].records.append(_record(next(self._held[-1][0])))
        iterator, run = self._rng.choice(self._held)
        for batch in itertools.islice(iterator, self._rng.randint(0, 3)):
            run.records.append(_record(batch))
        self._check_look(run)
        if run.is_complete:
            self._held.remove((iterator, run))

    def _pick(self) -> None:
        """A batch by its number."""
        run = self._run
        if run is None and self._picked:
            return  # which batches are left, and in which order, is known no more
        if self._is_beginning or (run is None and not self._options.as_keras):
            return  # it would begin a pass
        number = self._rng.randrange(len(self._dataset))
        if run is not None and run.numbers and not self._options.as_keras and (run.is_complete or self._options.steps):
            number = self._rng.choice(run.numbers)  # to ask for others is to take them
        record = _record(self._dataset[number])
        if run is not None and run.numbers is not None:
            if number not in run.numbers:
                self._picked.add(run.epoch)
            elif run.records[run.numbers.index(number)] != record:
                raise Mismatch(f"number {number} of epoch {run.epoch} is another batch when it is asked for again")
        elif self._data.is_ordered and record != self.plain(self._epoch)[len(self._before) + number]:
            raise Mismatch(f"batch {number} of epoch {self._epoch} is another one when it is looked at")

    # -- what should be ------------------------------------------------------------------------------------------

    def plain(self, epoch: int) -> list[Record]:
        """The batches of an epoch, from a loop without workers."""
        while epoch not in self._plain:
            self._plain[len(self._plain)] = [_record(batch) for batch in self._reference]
        return self._plain[epoch]

    def permuted(self, epoch: int) -> list[Record]:
        """The batches of an epoch where Keras shuffles and the dataset does not."""
        if epoch not in self._permuted:
            dataset = self._divide(self._data.plain(), self._options.parts > 1 and not self._options.by_keras)
            dataset.set_epoch(epoch)
            dataset.on_epoch_begin()
            numbers = range(dataset.num_batches)[self._index if self._stride > 1 else 0 :: self._stride]
            self._permuted[epoch] = [_record(dataset[number]) for number in reversed(numbers)]
            dataset.close()
        return self._permuted[epoch]

    def _note_beginning(self, run: _Run) -> None:
        if not run.before:
            self._begun_by = run

    def _finish(self, run: _Run) -> None:
        """All of an epoch has been handed out."""
        epoch, records = run.epoch, run.done
        if epoch in self.whole:
            raise Mismatch(f"epoch {epoch} has come twice")
        self.whole[epoch] = records
        allowed = self._allowed(epoch)
        picks_count = self._options.picks and not self._options.as_keras
        if epoch in self._picked or (picks_count and not self._data.is_ordered):  # they may look like shuffling
            records, allowed = sorted(records), [sorted(allowed[0])]
        if records not in allowed:
            raise Mismatch(f"epoch {epoch} is\n  {_text(records)}\nand should be\n  {_text(allowed[0])}")
        self._epoch, self._before, self._begun_by = epoch + 1, [], None
        if self._current is run:
            self._current = _Run(self._epoch, [], self._count, None)

    def _allowed(self, epoch: int) -> list[list[Record]]:
        """The orders in which an epoch may come."""
        plain, begun_by = self.plain(epoch), self._begun_by
        if self._data.is_ordered or begun_by is None:
            return [plain]
        permuted = self.permuted(epoch)
        if begun_by.numbers is None or self._options.way == "in order":
            # A state that was taken where Keras had shuffled says so.
            return [plain, permuted] if self._is_resumed and self._options.way != "in order" else [plain]
        first = self._index if self._stride > 1 else 0
        if begun_by.numbers[0] != first:
            return [permuted]
        return [permuted, plain]  # a pass that begins in order by chance may be taken for one that is

    def _check_look(self, run: _Run) -> None:
        plain = self.plain(run.epoch)
        if self._data.is_ordered and run.epoch not in self._picked:
            is_right = run.records == plain[len(run.before) :][: len(run.records)]
        else:
            left = collections.Counter(plain) - collections.Counter(run.before)
            is_right = not collections.Counter(run.records) - left
        if not is_right:
            raise Mismatch(
                f"an iteration of epoch {run.epoch} gave\n  {_text(run.records)}\nwhere\n  {_text(run.before)}\n"
                f"had been handed out, of\n  {_text(plain)}"
            )


def _record(batch: Any) -> Record:
    return tuple(np.asarray(batch[0]).tolist()), digest(batch)


def _text(records: list[Record]) -> str:
    """Batches in short: their samples, and a bit of their bytes."""
    return " ".join(f"{list(samples)}:{text[-5:-1]}" for samples, text in records)


def run_driven(rng: random.Random, pools: Pools, options: Driving) -> int:
    """Runs an episode; returns how many epochs were checked.

    Raises:
        Mismatch: something was wrong.
    """
    before = random.getstate()
    random.seed(options.data.seed)
    parts = [_Part(options, index, pools, rng) for index in range(options.parts)]
    try:
        for index, part in enumerate(parts):
            with _divided(options.parts, index) if options.by_keras else contextlib.nullcontext():
                try:
                    part.go()
                except Exception as error:
                    error.add_note(f"on part {index}, loaded {'; then '.join(part.places)}")
                    raise
    finally:
        random.setstate(before)
    epochs = min(len(part.whole) for part in parts)
    for epoch in range(epochs):
        served = [[sample for samples, _ in part.whole[epoch] for sample in samples] for part in parts]
        if len({len(part.whole[epoch]) for part in parts}) > 1:
            raise Mismatch(f"epoch {epoch} has not as many batches on each process: {served}")
        failures = set().union(*(part.failures for part in parts))
        options.data.check_once(epoch, list(itertools.chain(*served)), failures, options.parts)
    return sum(len(part.whole) for part in parts)


# -- trained passes --------------------------------------------------------------------------------------------------


class _Interruption(Exception):
    """Ends a call of `fit`."""


class _SumOfOutputs(keras.losses.Loss):
    def __init__(self) -> None:
        super().__init__(reduction="sum")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred[:, 0]


class _Census(keras.callbacks.Callback):
    """Which samples the model has been trained on, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[int]] = []
        self._before = np.zeros(WIDTH)

    def on_train_begin(self, logs: Any = None) -> None:
        self._before = self.model.get_weights()[0][:, 0]
        del self.steps[int(self.model.optimizer.iterations) :]  # those after the backup

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = self.model.get_weights()[0][:, 0]
        counts = np.rint(self._before - now).astype(int)
        self._before = now
        self.steps.append(np.repeat(np.arange(WIDTH), counts).tolist())


class _Looker(keras.callbacks.Callback):
    """Looks at the dataset at random moments, and may end the call."""

    def __init__(self, dataset: Any, rng: random.Random, options: Training) -> None:
        super().__init__()
        self._dataset = dataset
        self._rng = rng
        self._options = options
        self._has_begun = False  # until then, an iteration is one like any other
        self.steps_left = -1

    def _look(self) -> None:
        if not self._has_begun or self._rng.random() > self._options.looks:
            return
        dataset, looks = self._dataset, ["numbers", "state", "dropped", "whole", "nested", "export"]
        look = self._rng.choice([*looks, *["pick"] * (4 * self._options.picks)])
        if look == "numbers":
            assert dataset.num_batches and len(dataset) and repr(dataset) and dataset.stats() and not dataset.failures
        elif look == "state":
            json.dumps(dataset.state_dict())
        elif look == "dropped":
            next(iter(dataset))
        elif look == "whole":
            self._check(sum(1 for _ in dataset))
        elif look == "nested":
            for _ in dataset:
                self._check(sum(1 for _ in dataset))
                break
        elif look == "export" and self._rng.random() < 0.2:
            self._check(sum(1 for _ in dataset.to_tf_dataset()))
        elif look == "pick":
            dataset[self._rng.randrange(len(dataset))]

    def _check(self, found: int) -> None:
        if found != len(self._dataset):
            raise Mismatch(f"an iteration in a callback gave {found} batches of {len(self._dataset)}")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._look()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._look()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._has_begun = True
        self._look()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._look()
        self.steps_left -= 1
        if self.steps_left == 0:
            raise _Interruption


@dataclasses.dataclass(frozen=True)
class Training:
    """How an episode that trains goes.

    Attributes:
        data: the dataset.
        epochs: as Keras counts them.
        shuffle: the argument of `fit`.
        steps: `steps_per_epoch`.
        validates: whether the dataset is its own validation data.
        looks: how likely a callback looks at a moment.
        picks: whether it looks at batches by number.
        interruptions: after how many steps of a call it is ended; the run goes on from a backup.
        save_freq: steps between backups.
    """

    data: Data
    epochs: int
    shuffle: bool
    steps: int | None
    validates: bool
    looks: float
    picks: bool
    interruptions: tuple[int, ...]
    save_freq: int


def draw_training(rng: random.Random, **fixed: Any) -> Training:
    """Draws an episode; `fixed` are fields that are not drawn."""
    data = _draw_data(rng, one_hot=True)
    most = data.samples // data.batch_size + 2
    steps = rng.randint(1, most) if rng.random() < 0.5 else None
    drawn: dict[str, Any] = {
        "data": data,
        "epochs": rng.randint(1, 4),
        "shuffle": rng.random() < 0.7,
        "steps": steps,
        "validates": steps is None and rng.random() < 0.2,
        "looks": rng.choice([0, 0.1, 0.4]),
        "picks": rng.random() < 0.2,
        "interruptions": tuple(rng.randint(1, 2 * most) for _ in range(rng.choice([0, 0, 1, 2]))),
        "save_freq": rng.randint(1, 4),
        **fixed,
    }
    if drawn["validates"]:
        drawn |= {"interruptions": (), "looks": 0}
    return Training(**drawn)


def make_model() -> Any:
    """A model of one weight a sample."""
    model = keras.Sequential([keras.layers.Input((WIDTH,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), _SumOfOutputs())
    return model


def run_fit(rng: random.Random, pools: Pools, options: Training, model: Any) -> int:
    """Trains `model`, which is one of `make_model`; returns how many epochs were checked.

    Raises:
        Mismatch: something was wrong.
    """
    census = _Census()
    with tempfile.TemporaryDirectory() as folder:
        for steps_left in (*options.interruptions, -1):
            if options.interruptions:
                model = make_model()  # one that has been restored begins each fit at the epoch that it was restored to
            model.set_weights([np.zeros((WIDTH, 1), "float32")])
            model.optimizer.iterations.assign(0)
            with options.data.make(_draw_place(rng, pools), rng.randint(1, 12), pools) as dataset:
                looker = _Looker(dataset, rng, options)
                looker.steps_left = steps_left
                backup = keras_mp.BackupAndRestore(dataset, f"{folder}/backup", options.save_freq)
                try:
                    model.fit(
                        dataset,
                        epochs=options.epochs,
                        steps_per_epoch=options.steps,
                        shuffle=options.shuffle,
                        validation_data=dataset if options.validates else None,
                        callbacks=[backup, census, looker],
                        verbose=0,
                    )
                except _Interruption:
                    continue
                break
    return _check_steps(options, census.steps)


def _check_steps(options: Training, steps: list[list[int]]) -> int:
    """Checks what was trained on, of all passes; returns how many there were, begun ones included."""
    data = options.data
    reference = data.plain()
    epochs = [[sorted(_record(_argmax(batch))[0]) for batch in reference] for _ in range(_MOST_EPOCHS)]
    count = len(epochs[0])
    total = 0
    for _ in range(options.epochs):  # Keras's: they end with a pass at the latest
        total += min(options.steps or count, count - total % count)
    if len(steps) != total:
        raise Mismatch(f"trained for {len(steps)} steps in place of {total}")
    passes = [steps[start : start + count] for start in range(0, total, count)]
    for number, found in enumerate(passes):
        epoch = 2 * number if options.validates else number
        if len(found) == count:
            data.check_once(epoch, [sample for step in found for sample in step], set(), 1)
        if options.picks:
            is_right = not collections.Counter(map(str, found)) - collections.Counter(map(str, epochs[epoch]))
        else:
            is_right = found in [order[: len(found)] for order in _orders(options, epoch, epochs[epoch])]
        if not is_right:
            raise Mismatch(f"epoch {epoch} is\n  {found}\nand should be\n  {epochs[epoch]}")
    return len(passes)


def _orders(options: Training, epoch: int, plain: list[list[int]]) -> list[list[list[int]]]:
    """The orders in which the batches of an epoch may come."""
    if options.data.is_ordered or not options.shuffle:
        return [plain]
    dataset = options.data.plain()
    dataset.set_epoch(epoch)
    dataset.on_epoch_begin()
    numbers = reversed(range(dataset.num_batches))
    permuted = [sorted(_record(_argmax(dataset[number]))[0]) for number in numbers]
    return [plain, permuted, [plain[0], *(step for step in permuted if step != plain[0])]]


def _argmax(batch: Any) -> tuple[Any]:
    return (np.argmax(batch[0], axis=1),)
