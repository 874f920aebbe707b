"""`trace()`: what the file says, on every engine, and when it is written."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
import signal
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import keras_mp
from keras_mp.loading.recording import CONSUMER, Event, Recorder, Recording
from keras_mp.trace import Trace
from tests import traced
from tests.census import eventually

_ENGINES = ("processes", "threads", "in-process")


@pytest.fixture
def engine_options(engine: str, running_pool: keras_mp.WorkerPool) -> dict[str, Any]:
    """Arguments that ask for an engine."""
    options: dict[str, dict[str, Any]] = {
        "processes": {"pool": running_pool},
        "threads": {"workers": 2, "use_multiprocessing": False},
        "in-process": {"workers": 0},
    }
    return options[engine]


def _dataset(**options: Any) -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(np.arange(80.0)[:, None], traced.double, **{"batch_size": 8, **options})


def _checked(path: pathlib.Path) -> list[dict[str, Any]]:
    """The file's events, once they are found to be what the format asks for."""
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    lanes: dict[tuple[int, int], list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys()
        assert event["ph"] in ("M", "X", "i")
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            lanes[event["pid"], event["tid"]].append(event)
    for lane in lanes.values():
        ends: list[int] = []  # of what is open, the outermost first
        for event in sorted(lane, key=lambda each: (each["ts"], -each["dur"])):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1], "what begins within another event ends within it"
            ends.append(end)
    return events


def _of(events: list[dict[str, Any]], category: str, phase: str = "X") -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == category and event["ph"] == phase]


def _lanes(events: list[dict[str, Any]]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


@pytest.mark.parametrize("engine", _ENGINES)
def test_it_has_each_batch_with_its_stages_and_who_waited(
    engine: str, engine_options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "trace.json"
    with _dataset(**engine_options) as dataset:
        with dataset.trace(path):
            list(dataset)
            list(dataset)
        list(dataset)  # which is not recorded
    events = _checked(path)
    lanes = _lanes(events)
    batches = _of(events, "batch")
    keys = [(each["args"]["epoch"], each["args"]["batch"]) for each in batches]
    assert sorted(keys) == [(epoch, batch) for epoch in range(2) for batch in range(10)]
    assert all(each["args"]["samples"] == 8 for each in batches)
    assert {lanes[each["tid"]].partition(" ")[0] for each in batches} == {
        "worker" if engine == "processes" else "thread"
    }
    stages = _of(events, "stage")
    samples = collections.Counter(
        (each["args"]["epoch"], each["args"]["index"]) for each in stages if each["name"] == "transform"
    )
    assert samples == {(epoch, index): 1 for epoch in range(2) for index in range(80)}
    for stage in stages:
        (batch,) = (each for each in batches if _holds(each, stage))
        assert (batch["args"]["epoch"], batch["args"]["batch"]) == (stage["args"]["epoch"], stage["args"]["batch"])
    waits, handed_out = _of(events, "consumer"), _of(events, "consumer", "i")
    assert [each["name"] for each in waits] == 2 * [f"wait for batch {batch}" for batch in range(10)]
    assert [each["name"] for each in handed_out] == 2 * [f"batch {batch} handed out" for batch in range(10)]
    assert {lanes[each["tid"]] for each in waits + handed_out} == {"consumer"}


def _holds(batch: dict[str, Any], stage: dict[str, Any]) -> bool:
    if batch["tid"] != stage["tid"] or batch["args"]["batch"] != stage["args"]["batch"]:
        return False
    return bool(batch["ts"] <= stage["ts"] and stage["ts"] + stage["dur"] <= batch["ts"] + batch["dur"])


def test_small_batches_that_travel_together_are_told_apart(
    running_pool: keras_mp.WorkerPool, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "trace.json"
    with keras_mp.PoolDataset(np.arange(4000.0), batch_size=4, pool=running_pool) as dataset, dataset.trace(path):
        list(dataset)
    batches = _of(_checked(path), "batch")
    assert sorted(each["args"]["batch"] for each in batches) == list(range(1000))


def test_batches_from_an_executors_processes(processes: concurrent.futures.Executor, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with _dataset(pool=processes) as dataset, dataset.trace(path):
        list(dataset)
    events = _checked(path)
    assert sorted(each["args"]["batch"] for each in _of(events, "batch")) == list(range(10))
    assert "worker (pid" in str(_lanes(events)) and f"(pid {os.getpid()})" not in str(_lanes(events))


def test_a_worker_that_is_killed_and_the_one_after_it_are_marked(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with _dataset(workers=1, batch_size=2, max_queue_size=2) as dataset:
        with dataset.trace(path):
            batches = iter(dataset)
            next(batches)
            (pid,) = dataset.stats().pids
            os.kill(pid, signal.SIGKILL)
            assert len(list(batches)) == 39
    events = _checked(path)
    marks = {each["name"]: each for each in _of(events, "worker", "i")}
    assert marks.keys() == {"worker started", "worker died", "worker restarted"}
    assert marks["worker died"]["args"]["text"] == f"process {pid} ended with signal SIGKILL"
    assert _lanes(events)[marks["worker died"]["tid"]] == f"worker (pid {pid})"
    assert marks["worker restarted"]["tid"] != marks["worker died"]["tid"]
    assert [each["name"] for each in _of(events, "worker") if each["name"] == "start"] == ["start", "start"]
    assert {each["args"]["batch"] for each in _of(events, "batch")} == set(range(40))


def test_a_worker_that_is_let_go_has_not_died(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with keras_mp.WorkerPool(2) as pool, _dataset(pool=pool, batch_size=2) as dataset:
        with dataset.trace(path) as trace:
            list(dataset)
            assert eventually(lambda: len(dataset.stats().pids) == 2)
            _, second = dataset.stats().pids
            pool.resize(1)
            assert eventually(lambda: any(event.name == "worker let go" for _, lane in trace.lanes() for event in lane))
    (mark,) = (each for each in _of(_checked(path), "worker", "i") if each["name"] != "worker started")
    assert mark["name"] == "worker let go"
    assert str(second) in mark["args"]["text"]


def test_a_timeout_is_marked_and_what_was_lost_with_it_is_shown(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    source = np.arange(8.0)[:, None]
    with keras_mp.PoolDataset(source, traced.hang_at_three, batch_size=8, workers=1, timeout=0.5) as dataset:
        with dataset.trace(path), pytest.raises(keras_mp.BatchTimeout):
            list(dataset)
    events = _checked(path)
    marks = _of(events, "worker", "i")
    assert sum(each["name"] == "worker timed out" for each in marks) == 2
    assert "timeout=0.5 s" in next(each["args"]["text"] for each in marks if each["name"] == "worker timed out")
    lost = [each for each in _of(events, "worker") if each["name"] == "batch 0 lost"]
    assert len(lost) == 2 and all(each["dur"] > 400_000 for each in lost)
    assert next(each["args"]["text"] for each in _of(events, "consumer", "i")) == "BatchTimeout"


@pytest.mark.parametrize("engine", _ENGINES)
def test_a_batch_that_fails_is_marked(engine: str, engine_options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with keras_mp.PoolDataset(np.zeros((8, 1)), traced.fail, batch_size=8, **engine_options) as dataset:
        with pytest.raises(keras_mp.SampleError), dataset.trace(path):
            list(dataset)
    (failed,) = _of(_checked(path), "consumer", "i")
    assert (failed["name"], failed["args"]["text"]) == ("batch 0 failed", "SampleError")


# -- when it is written ------------------------------------------------------------------------------------------


def _model() -> keras.Model:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    return model


class _Epochs(keras.callbacks.Callback):
    """How many batches the file has at the begin of each epoch but the first."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path
        self.counts: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch:
            self.counts.append(len(_of(_checked(self.path), "batch")))


@pytest.mark.parametrize("export", [False, True])
def test_a_plain_call_before_fit_is_enough(
    export: bool, running_pool: keras_mp.WorkerPool, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "trace.json"
    written = _Epochs(path)
    with keras_mp.PoolDataset(np.zeros((64, 1)), traced.pair, batch_size=8, pool=running_pool) as dataset:
        dataset.trace(path)
        _model().fit(dataset.to_tf_dataset() if export else dataset, epochs=3, verbose=0, callbacks=[written])
    assert all(count >= 8 * (epoch + 1) for epoch, count in enumerate(written.counts)) and len(written.counts) == 2
    events = _checked(path)
    keys = {(each["args"]["epoch"], each["args"]["batch"]) for each in _of(events, "batch")}
    assert keys >= {(epoch, batch) for epoch in range(3) for batch in range(8)}


def test_it_is_written_by_save_stop_and_close(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with _dataset(workers=0) as dataset:
        trace = dataset.trace(path)
        assert not path.exists() and trace.is_recording and trace.path == path
        batches = iter(dataset)
        next(batches)
        trace.save()
        assert len(_of(_checked(path), "batch")) == 1
        next(batches)
        trace.stop()
        assert len(_of(_checked(path), "batch")) == 2
        list(batches)
        trace.stop()
        assert len(_of(_checked(path), "batch")) == 2 and "stopped" in repr(trace)
        dataset.trace(path)
        next(iter(dataset))
    assert len(_of(_checked(path), "batch")) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]


def test_a_second_call_ends_the_first(tmp_path: pathlib.Path) -> None:
    with _dataset(workers=0) as dataset:
        first = dataset.trace(tmp_path / "first.json")
        list(dataset)
        with dataset.trace(tmp_path / "second.json"):
            assert not first.is_recording
            list(dataset)
    epochs = [{each["args"]["epoch"] for each in _of(_checked(tmp_path / f"{n}.json"), "batch")} for n in _NAMES]
    assert epochs == [{0}, {1}]


_NAMES = ("first", "second")


def test_what_cannot_be_written_keeps_the_file_of_before(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "folder" / "trace.json"
    path.parent.mkdir()
    with _dataset(workers=0) as dataset:
        trace = dataset.trace(path)
        list(dataset)
        path.unlink()
        path.parent.rmdir()
        with pytest.warns(RuntimeWarning, match="trace could not be written to .*trace.json"):
            list(dataset)  # training goes on
        with pytest.raises(FileNotFoundError):
            trace.save()
        path.mkdir(parents=True)  # which a file cannot replace
        with pytest.raises(IsADirectoryError):
            trace.save()
        assert [each.name for each in path.parent.iterdir()] == ["trace.json"]
        path.rmdir()


def test_a_dataset_without_a_trace_records_nothing() -> None:
    with _dataset(workers=0) as dataset:
        list(dataset)
        assert dataset.timeline is None


def test_a_part_or_a_copy_has_no_trace_of_its_own(tmp_path: pathlib.Path) -> None:
    with _dataset(workers=0) as dataset, dataset.trace(tmp_path / "trace.json"):
        part = dataset.shard(2, 0)
        list(part)
        assert part.timeline is None
        part.close()
    assert not _of(_checked(tmp_path / "trace.json"), "batch")


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("missing/trace.json", FileNotFoundError, r"missing/trace.json' cannot be written: No such file"),
        ("", IsADirectoryError, "is a folder; add a name"),
        ("file/trace.json", NotADirectoryError, "file/trace.json' cannot be written"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_at_once(
    path: str, error: type[Exception], match: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").touch()
    with _dataset(workers=0) as dataset, pytest.raises(error, match=match):
        dataset.trace(tmp_path / path)


@pytest.mark.parametrize("path", [3, True, ["trace.json"], b"trace.json"])
def test_a_path_must_be_one(path: Any) -> None:
    with _dataset(workers=0) as dataset, pytest.raises(TypeError, match=r"path must be a str or os\.PathLike"):
        dataset.trace(path)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError), (True, TypeError)])
def test_max_events_must_be_a_count(count: Any, error: type[Exception]) -> None:
    with _dataset(workers=0) as dataset, pytest.raises(error, match="max_events must be"):
        dataset.trace(max_events=count)


def test_a_closed_dataset_and_keras_s_own_pool_are_refused() -> None:
    dataset = _dataset(workers=0)
    dataset.close()
    with pytest.raises(keras_mp.PoolClosed, match="has been closed"):
        dataset.trace()
    with _dataset(pool="keras", workers=1) as by_keras, pytest.raises(ValueError, match="leave out pool="):
        by_keras.trace()


# -- bounded memory, and the lanes -------------------------------------------------------------------------------


def test_of_too_many_events_the_oldest_are_dropped_and_the_file_says_so(
    running_pool: keras_mp.WorkerPool, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "trace.json"
    with _dataset(pool=running_pool) as dataset, dataset.trace(path, max_events=100):
        list(dataset)
        list(dataset)
    about = json.loads(path.read_text(encoding="utf-8"))["otherData"]
    events = [event for event in _checked(path) if event["ph"] != "M"]
    assert len(events) <= 100 == about["max_events"]
    assert about["events_dropped"] > 100 and "dropped, to bound memory" in about["note"]
    assert {event["args"]["epoch"] for event in events if "epoch" in event["args"]} == {1}
    batches = _of(events, "batch")
    assert all(any(_holds(batch, stage) for batch in batches) for stage in _of(events, "stage"))


@st.composite
def _blocks(draw: st.DrawFn) -> list[list[Event]]:
    """Batches of a few lanes, one after the other on each, with stages within them."""
    clock = collections.defaultdict[int, int](int)
    blocks = []
    for number in range(draw(st.integers(1, 12))):
        worker = draw(st.integers(1, 3))
        lengths = draw(st.lists(st.integers(0, 2000), max_size=6))
        begun = clock[worker] + draw(st.integers(0, 500))
        end = begun + sum(lengths) + draw(st.integers(0, 300))
        clock[worker] = end
        block = [Event((worker, 0), "batch", f"batch {number}", begun / 1e7, (end - begun) / 1e7, 0, number, 4)]
        for length in lengths:
            block.append(Event((worker, 0), "stage", "transform", begun / 1e7, length / 1e7, 0, number, 1))
            begun += length
        blocks.append(block)
    return blocks


@given(blocks=_blocks(), max_events=st.integers(1, 40))
@example(  # 976 + 1224 and 1950 + 250 are the same, but not as sums of floats
    blocks=[
        [
            Event((1, 0), "batch", "batch 0", 976 / 1e7, 1224 / 1e7, 0, 0, 4),
            Event((1, 0), "stage", "transform", 1950 / 1e7, 250 / 1e7, 0, 0, 1),
        ]
    ],
    max_events=7,
)
def test_any_recording_is_nested_and_bounded(
    blocks: list[list[Event]], max_events: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    recorder = Recorder()
    trace = Trace(recorder, path, "a test", max_events)
    assert recorder.recording is not None
    recorder.recording.begun = 0.0
    for block in blocks:
        recorder.add(block)
    trace.stop()
    added = sum(map(len, blocks))
    events = [event for event in _checked(path) if event["ph"] != "M"]
    dropped = json.loads(path.read_text(encoding="utf-8"))["otherData"]["events_dropped"]
    assert len(events) <= max_events and len(events) + dropped == added
    if added <= max_events:
        assert not dropped


@given(waits=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1))
def test_waits_of_several_threads_never_overlap_on_a_lane(
    waits: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    recorder = Recorder()
    trace = Trace(recorder, path, "a test")
    assert recorder.recording is not None
    recorder.recording.begun = 0.0
    recorder.add([Event(CONSUMER, "consumer", "wait", float(begun), float(seconds)) for begun, seconds in waits])
    trace.stop()
    by_lane: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for event in _of(_checked(path), "consumer"):
        by_lane[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, by_lane.values())) == len(waits)
    for lane in by_lane.values():
        lane.sort()
        assert all(end <= begun for (_, end), (begun, _) in itertools.pairwise(lane))


def test_a_recording_counts_what_it_dropped() -> None:
    recording = Recording(2)
    moments = [Event(CONSUMER, "consumer", str(number), float(number), None) for number in range(5)]
    for moment in moments:
        recording.add([moment])
    assert recording.events() == (moments[3:], 3)
