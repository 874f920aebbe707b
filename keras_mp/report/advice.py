"""What the numbers of a dataset mean: is the input the bottleneck, why, and what to change.

The model behind the numbers is in `sizing`, and where they come from in `load`. What is not known is not guessed: where
a step's length is not, the sentences name `PipelineMonitor`, which measures it.
"""

from __future__ import annotations

from keras_mp.report.footprint import Footprint
from keras_mp.report.load import Load
from keras_mp.report.words import capital, count, listed, seconds, size
from keras_mp.stats import KERAS_POOL, Stats, Training

HARDLY_WAITS = 0.1  # share of the time
_BUSY = 0.75  # workers that are busy for more than this share of the time are what is waited for
_IDLE = 0.5  # below it, fewer would do
_STARTING = 0.1  # of the workers' time
_DOMINATES = 0.5  # of the work
_LITTLE_CPU = 0.5  # of the work
_FEW_BATCHES = 8
_SENSIBLE_PER_CORE = 16
_SLOW_SAMPLES = 3

_STAGE_NAMES = {
    "source": "reading the source, source[i],",
    "write": "writing to shared memory",
}
_REMEDIES = {
    "source": "keep what it gives (cache=), or store it in a form that is faster to read",
    "load": "keep what it gives (cache=)",
    "cache": "put the cache on a faster disk, or in memory (cache='ram')",
    "transform": "make it cheaper, or move what is the same in every epoch to load= and keep it (cache=)",
    "collate": "arrays of one shape, or keras_mp.pad(), are written straight into shared memory",
    "batch_transform": "make it cheaper, or move it into the model",
    "write": "smaller dtypes (uint8 in place of float32) make it cheaper",
}


def advise(stats: Stats, training: Training | None, cores: int, footprint: Footprint | None = None) -> list[str]:
    """What the numbers say, in sentences, the most important first.

    Args:
        stats: of the dataset.
        training: what `PipelineMonitor` measured, if it did.
        cores: that may be used.
        footprint: of the workers, where it is known.
    """
    if stats.engine == KERAS_POOL:
        return [
            "Keras's own pool makes the batches, in processes whose numbers do not come back; without pool='keras' "
            "they would be here."
        ]
    if stats.loaded_batches == 0:
        return ["Nothing has been loaded yet: train on the dataset or iterate over it, then ask again."]
    load = Load.of(stats, training, cores)
    sentences = [*_about_waiting(stats, load), *_about_starts(load), *_about_faults(stats), *_about_imports(footprint)]
    if stats.batches < _FEW_BATCHES:
        sentences.append(f"These are the numbers of {count(stats.batches, 'batch', 'batches')}: too few to rely on.")
    return sentences


def _about_waiting(stats: Stats, load: Load) -> list[str]:
    who = "fit" if load.of_fit else "the training"
    if load.step_s is None:
        return _about_tensorflow(stats, load)
    if load.waited < HARDLY_WAITS:
        return [_hardly(who, load)]
    if load.late < HARDLY_WAITS:
        return [f"{capital(who)} waited {load.waited:.0%} of the time for data, and hardly but for the first batch."]
    waited = f"{capital(who)} waited {load.waited:.0%} of the time for data"
    return [f"{waited}; {_what_would_help(stats, load)}", *_about_work(stats, load)]


def _hardly(who: str, load: Load) -> str:
    said = f"{capital(who)} waited {load.waited:.0%} of the time for data: the input is not the bottleneck."
    needed = load.needed
    if needed is not None and load.workers > needed and load.busy < _IDLE:
        return f"{said} {_workers(load)} {load.busy:.0%} busy; {count(needed, 'worker')} would do."
    return said


def _about_tensorflow(stats: Stats, load: Load) -> list[str]:
    """Where a thread of TensorFlow's took the batches and nobody measured the training."""
    if load.waited < HARDLY_WAITS and load.cycle_s:
        return [
            f"Batches were ready when TensorFlow asked for them (it waited {load.waited:.0%} of the time): the "
            "training does not wait for the workers."
        ]
    monitor = "callbacks=[keras_mp.PipelineMonitor()] in fit"
    unknown = (
        "A thread of TensorFlow's takes the batches ahead of the training, so how long that waited is not known here; "
        f"{monitor} measures it."
    )
    if load.workers and load.busy >= _BUSY:
        return [
            f"{_workers(load)} {load.busy:.0%} busy, so the training probably waits for them: {monitor} finds how "
            "long, and how many workers would keep up.",
            *_about_work(stats, load),
        ]
    if load.workers:
        return [f"{unknown} {_workers(load)} {load.busy:.0%} busy, so more of them would hardly help."]
    return [unknown, *_about_work(stats, load)]


def _what_would_help(stats: Stats, load: Load) -> str:
    needed, useful = load.needed or 1, load.useful
    most = min(useful or _SENSIBLE_PER_CORE * load.cores, _SENSIBLE_PER_CORE * load.cores)
    times = f"{seconds(load.service_s)} of work a batch, {seconds(load.step_s or 0)} a step"
    keep_up = f"{count(needed, 'worker')} would keep up ({times})"
    if stats.engine == "in-process":
        if load.cores_are_full:
            return f"batches are made by the process that trains, and no core is left for workers ({times})."
        if needed > most:
            return (
                f"batches are made by the process that trains. {count(most, 'worker')} would make them beside it: as "
                f"many as make sense on {_cores(load)}, if too few to keep up ({times})."
            )
        return f"batches are made by the process that trains; {keep_up} beside it."
    if not load.workers:
        return f"how many workers the {stats.engine} has is not known here; {keep_up}."
    busy = f"{_workers(load, start=False)} {load.busy:.0%} busy"
    if load.busy < _BUSY and load.starting > _STARTING:
        return (
            f"{busy}, and for {load.starting:.0%} of the time still starting. What comes after the start is in "
            "dataset.report(since=earlier), with earlier = dataset.stats() taken then."
        )
    if load.busy < _BUSY:
        return (
            f"{busy}, so more of them would not help: handing over batches is the limit, or single slow batches. "
            "Larger batches, a larger max_queue_size=, and on TensorFlow fit(dataset.to_tf_dataset()), which does not "
            "stand still between epochs, can help."
        )
    if needed <= load.workers:
        return (
            f"{busy}. On average they keep up ({times}), so it is slow batches that are waited for: a larger "
            "max_queue_size= evens them out, a worker more leaves room for them."
        )
    if useful is not None and load.workers >= useful:
        threads = (
            " Threads share one interpreter, and processes (use_multiprocessing=True) do not."
            if stats.engine == "threads"
            else ""
        )
        return (
            f"{busy}. More workers cannot help: a batch takes {seconds(load.cpu_s)} of processor time, and "
            f"{load.cores_in_use:.1f} of {_cores(load)} are in use, {_training_share(load)}.{threads} Less work a "
            "batch helps, or a cluster."
        )
    if needed <= most:
        return f"{busy}; {keep_up}."
    if most == useful:
        return (
            f"{busy}; {useful} workers are as many as {_cores(load)} can keep at work, and more cannot help. To keep "
            f"up, {needed} would be needed ({times}): less work a batch helps, or a cluster."
        )
    return (
        f"{busy}; {needed} would be needed to keep up ({times}), more than make sense on {_cores(load)}. Less work a "
        "batch helps, or a cluster."
    )


def _training_share(load: Load) -> str:
    return f"{load.process_cpu_s / max(load.cycle_s, 1e-6):.1f} of them by the training itself"


def _about_starts(load: Load) -> list[str]:
    if load.first_waited < HARDLY_WAITS or (not load.workers and load.late >= HARDLY_WAITS):
        return []
    return [
        f"{load.first_waited:.0%} of the time passed before the first batch of a pass was there "
        f"({seconds(load.first_wait_s)} each time): workers start, and nothing has been read ahead. Longer epochs make "
        "it matter less, and on TensorFlow to_tf_dataset(epochs=...) reads ahead from one to the next."
    ]


def _about_work(stats: Stats, load: Load) -> list[str]:
    """What most of the work is, where a stage dominates it, and what to do about that."""
    name, stage = max(stats.stages.items(), key=lambda item: item[1].total_s, default=("", None))
    if stage is None or not stats.work_s or stage.total_s < _DOMINATES * stats.work_s:
        return []
    slowest = stage.slowest[:_SLOW_SAMPLES]
    said = f"{capital(_STAGE_NAMES.get(name, name))} is {stage.total_s / stats.work_s:.0%} of the work"
    if slowest:
        said += f"; its slowest samples are {listed(slowest)}"
    sentences = [f"{said}. To spend less: {_REMEDIES[name]}."]
    if name == "source" and stats.cpu_s < _LITTLE_CPU * stats.work_s:
        sentences.append(
            f"Only {stats.cpu_s / stats.work_s:.0%} of the work is processor time: the workers wait for the disk or "
            "the network. More of them help until that is fully used, which only a measurement shows."
        )
    return sentences


def _about_faults(stats: Stats) -> list[str]:
    sentences = []
    if stats.failures:
        sentences.append(f"{count(stats.failures, 'sample')} failed; dataset.failures says which, and why.")
    if stats.retries:
        sentences.append(
            f"Samples that failed were begun again {count(stats.retries, 'time')} (retries=), which takes time."
        )
    others = stats.restarts - stats.timeouts
    if stats.timeouts:
        sentences.append(
            f"{count(stats.timeouts, 'worker')} had to be ended because a batch took longer than timeout=, and what it "
            "was at was done again."
        )
    if others > 0:
        sentences.append(
            f"{count(others, 'worker')} ended and had to be replaced: crashed in the dataset's code, or killed, "
            "perhaps for want of memory."
        )
    return sentences


def _about_imports(footprint: Footprint | None) -> list[str]:
    if footprint is None or not footprint.frameworks:
        return []
    names, own = " and ".join(footprint.frameworks), size(footprint.own_bytes)
    return [
        f"The workers have imported {names}: each holds {own} of its own, and starts seconds later. The module that "
        "the dataset's code is in does that, or one that it imports (keras imports its backend). Functions that need "
        "none of it belong into a module of their own: see docs/workers.md."
    ]


def _workers(load: Load, start: bool = True) -> str:
    the = "The" if start else "the"
    return f"{the} {load.workers} workers were" if load.workers != 1 else f"{the} one worker was"


def _cores(load: Load) -> str:
    return count(load.cores, "core")
