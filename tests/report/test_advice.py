"""What the numbers of a run are said to mean: a sentence for each case of the model."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from keras_mp.loading.timing import SlowSample
from keras_mp.report.advice import advise
from keras_mp.stats import KERAS_POOL, StageStats, Stats, Training


def _stats(**changed: Any) -> Stats:
    """100 batches of 8: one worker, 160 ms of sleep a batch, a step of 40 ms that waits for 120 of each 160 ms."""
    slow = (SlowSample(0.3, 7, "tile_7.npy", 0, 0, "transform"),)
    numbers: dict[str, Any] = {
        "engine": "worker pool",
        "workers": 1,
        "elapsed_s": 16.0,
        "batches": 100,
        "loaded_batches": 100,
        "samples": 800,
        "wait_s": 12.0,
        "first_wait_s": 0.12,
        "used_s": 3.96,
        "steps": 99,
        "work_s": 16.0,
        "cpu_s": 0.2,
        "pool_busy_s": 15.7,
        "pool_ready_s": 16.0,
        "stages": {"source": StageStats(0.1, 0.001), "transform": StageStats(14.7, 0.147, slow)},
    }
    return Stats(**{**numbers, **changed})


def _advice(stats: Stats, training: Training | None = None, cores: int = 4) -> str:
    return "\n".join(advise(stats, training, cores))


def test_one_busy_worker_is_too_few_and_the_number_that_keeps_up_is_named() -> None:
    advice = _advice(_stats())
    assert (
        "The training waited 75% of the time for data; the one worker was 100% busy; 5 workers would keep up" in advice
    )
    assert "(160 ms of work a batch, 40 ms a step)" in advice
    assert "Transform is 92% of the work; its slowest samples are 7 (tile_7.npy: 300 ms)" in advice


def test_what_the_monitor_measured_of_fit_comes_first() -> None:
    of_epoch = _stats(workers=4, work_s=40.0, pool_busy_s=39.2, pool_ready_s=40.0, elapsed_s=10.0, cpu_s=0.1)
    training = Training(1, 100, 10.0, 7.1, 0.065, of_epoch)
    advice = _advice(_stats(wait_is_of_training=False, wait_s=0.0), training)
    assert "fit waited 71% of the time for data; the 4 workers were 100% busy; 7 workers would keep up" in advice


def test_where_it_hardly_waits_the_input_is_not_the_bottleneck() -> None:
    advice = advise(_stats(wait_s=0.32, work_s=3.0, workers=1, pool_busy_s=3.0, pool_ready_s=4.2), None, 4)
    assert advice == ["The training waited 5% of the time for data: the input is not the bottleneck."]


def test_workers_that_are_not_needed_are_told() -> None:
    idle = _stats(wait_s=0.0, workers=8, work_s=4.0, pool_busy_s=4.0, pool_ready_s=32.0)
    assert _advice(idle).endswith("The 8 workers were 12% busy; 2 workers would do.")


def test_cores_that_are_in_use_are_the_limit() -> None:
    full = _stats(workers=2, work_s=32.0, cpu_s=31.0, pool_busy_s=31.5, pool_ready_s=32.0, process_cpu_s=0.8)
    full = dataclasses.replace(full, stages={"transform": StageStats(30.0, 0.3)})
    advice = _advice(full, cores=2)
    assert "More workers cannot help: a batch takes 310 ms of processor time, and 2.0 of 2 cores are in use" in advice
    assert "would keep up" not in advice
    assert "move what is the same in every epoch to load= and keep it (cache=)" in advice
    assert "Threads share one interpreter" in _advice(dataclasses.replace(full, engine="threads"), cores=2)
    assert "would keep up" in _advice(full, cores=32)


def test_the_training_itself_leaves_a_core_or_none() -> None:
    one_of_two = _stats(workers=1, work_s=16.0, cpu_s=15.8, process_cpu_s=3.9)
    assert "More workers cannot help" in _advice(one_of_two, cores=2)
    assert "3 workers are as many as 4 cores can keep at work" in _advice(one_of_two, cores=4)


def test_as_many_workers_as_the_cores_carry_are_named_if_more_would_be_needed() -> None:
    of_processor = _stats(cpu_s=15.8)
    assert "4 workers are as many as 4 cores can keep at work, and more cannot help. To keep up, 5" in _advice(
        of_processor
    )
    assert "5 workers would keep up" in _advice(of_processor, cores=8)


def test_workers_that_idle_while_the_training_waits_are_not_the_limit() -> None:
    advice = _advice(_stats(workers=8, work_s=30.0, pool_busy_s=30.0, pool_ready_s=128.0))
    assert "the 8 workers were 23% busy, so more of them would not help" in advice
    assert "to_tf_dataset()" in advice and "max_queue_size=" in advice


def test_the_start_of_workers_is_not_taken_for_a_limit() -> None:
    advice = _advice(_stats(workers=8, work_s=30.0, pool_busy_s=30.0, pool_ready_s=64.0))
    assert "for 50% of the time still starting" in advice and "dataset.report(since=earlier)" in advice


def test_what_passes_before_the_first_batch_is_told_apart() -> None:
    advice = _advice(_stats(wait_s=1.0, first_wait_s=0.8, workers=5))
    assert "waited 5% of the time for data: the input is not the bottleneck" in advice
    assert "16% of the time passed before the first batch of a pass was there (800 ms each time)" in advice
    assert "before the first batch" not in _advice(_stats(wait_s=0.3, first_wait_s=0.2))


def test_what_fit_waited_for_the_first_batch_needs_no_more_workers() -> None:
    of_epoch = _stats(workers=5, wait_s=1.0, first_wait_s=0.9, elapsed_s=5.0, pool_busy_s=15.0, pool_ready_s=25.0)
    advice = _advice(of_epoch, Training(0, 100, 5.0, 1.0, 0.04, of_epoch))
    assert advice.startswith(
        "fit waited 20% of the time for data, and hardly but for the first batch.\n18% of the time"
    )
    assert "more of them would not help" not in advice


def test_workers_that_keep_up_on_average_are_late_with_slow_batches() -> None:
    advice = _advice(_stats(workers=5, wait_s=0.6, work_s=16.0, pool_busy_s=16.0, pool_ready_s=20.0))
    assert "it is slow batches that are waited for: a larger max_queue_size=" in advice


def test_a_source_that_sleeps_is_a_disk_or_a_network() -> None:
    advice = _advice(_stats(stages={"source": StageStats(15.0, 0.15), "transform": StageStats(0.5, 0.005)}))
    assert "Reading the source, source[i], is 94% of the work" in advice
    assert "Only 1% of the work is processor time: the workers wait for the disk or the network" in advice
    reading_of_processor = _stats(cpu_s=15.0, stages={"source": StageStats(15.0, 0.15)})
    assert "the network" not in _advice(reading_of_processor)


def test_a_step_too_short_to_hide_the_work_behind_needs_no_absurd_number_of_workers() -> None:
    advice = _advice(_stats(used_s=0.002, wait_s=15.9))
    assert re.search(r"\d+ would be needed to keep up \(160 ms of work .*, more than make sense on 4 cores", advice)


@pytest.mark.parametrize("engine", ["in-process", "threads", "ProcessPoolExecutor"])
def test_other_engines_know_a_part_of_it(engine: str) -> None:
    workers = 1 if engine == "threads" else 0
    advice = _advice(_stats(engine=engine, workers=workers, pool_busy_s=0.0, pool_ready_s=0.0))
    assert "5 workers would keep up" in advice
    if engine == "in-process":
        assert "batches are made by the process that trains; 5 workers would keep up" in advice
    if engine == "ProcessPoolExecutor":
        assert "how many workers the ProcessPoolExecutor has is not known here" in advice


def test_in_process_the_cores_limit_what_workers_can_do() -> None:
    stats = _stats(engine="in-process", workers=0, pool_busy_s=0, pool_ready_s=0, cpu_s=11.9, wait_s=12.0, work_s=12.0)
    stats = dataclasses.replace(stats, process_cpu_s=15.8)
    assert "no core is left for workers" in _advice(stats, cores=1)
    assert "3 workers would make them beside it: as many as make sense on 4 cores" in _advice(stats, cores=4)


def test_of_a_thread_of_tensorflow_no_step_is_invented() -> None:
    busy = _stats(wait_is_of_training=False)
    advice = _advice(busy)
    assert "the training probably waits for them" in advice and "PipelineMonitor()" in advice
    assert not re.search(r"\d+ workers? would", advice)
    ready = _advice(_stats(wait_is_of_training=False, wait_s=0.22))
    assert ready == (
        "Batches were ready when TensorFlow asked for them (it waited 2% of the time): the training does not wait for "
        "the workers."
    )
    idle = _advice(_stats(wait_is_of_training=False, workers=8, work_s=10.0, pool_busy_s=10.0, pool_ready_s=128.0))
    assert "so how long that waited is not known here" in idle and "8% busy" in idle
    executor = _advice(_stats(wait_is_of_training=False, workers=0, pool_busy_s=0.0, pool_ready_s=0.0))
    assert "is not known here" in executor and "busy" not in executor


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"failures": 3}, "3 samples failed; dataset.failures says which, and why."),
        ({"retries": 1}, "begun again 1 time (retries=)"),
        ({"restarts": 2, "timeouts": 2}, "2 workers had to be ended because a batch took longer than timeout="),
        ({"restarts": 1}, "1 worker ended and had to be replaced: crashed"),
        ({"batches": 3, "steps": 2, "used_s": 0.08, "wait_s": 0.4}, "numbers of 3 batches: too few to rely on"),
    ],
)
def test_what_went_wrong_is_said(numbers: dict[str, Any], said: str) -> None:
    assert said in _advice(_stats(**numbers))
    assert said not in _advice(_stats())


def test_without_numbers_it_says_so() -> None:
    assert advise(Stats(), None, 2) == [
        "Nothing has been loaded yet: train on the dataset or iterate over it, then ask again."
    ]
    assert "without pool='keras'" in _advice(Stats(engine=KERAS_POOL, workers=2, batches=2))
