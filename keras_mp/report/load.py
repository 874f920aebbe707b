"""What the model of `sizing` knows of a run: the numbers of a dataset, per batch.

They come from two places. What `PipelineMonitor` measured is of `fit` itself: its last epoch. Without it, the time from
a batch to the next is a step of the training only where the training takes batches itself: in a loop, and in `fit` on
JAX and torch. In `fit` on TensorFlow, and in an export, a thread of TensorFlow's takes them, ahead of the training; a
step's length is not known then.

How busy workers were is worked out from the same times, so that what passes after the training does not count:

    busy = service_s / (workers * (step_s + seconds waited per batch))
"""

from __future__ import annotations

import dataclasses

from keras_mp import sizing
from keras_mp.stats import Stats, Training

_IN_USE = 0.9  # of the cores; the system has other things to do as well
_IN_PROCESS = ("in-process", "threads", "ThreadPoolExecutor")


@dataclasses.dataclass(frozen=True)
class Load:
    """What the model knows of a run. Seconds are for one batch.

    Attributes:
        workers: how many make batches; 0: the process that trains, or a number that is not known.
        service_s: of a worker.
        cpu_s: processor time of that.
        step_s: of the training, its batch being there; None: not known.
        wait_s: that who took batches waited.
        cycle_s: from one batch taken to the next.
        process_cpu_s: processor time of the process that trains, without what it spent on making batches.
        cores: that may be used.
        busy: share of their time that workers were at batches, from 0 to 1.
        starting: share of that time for which a worker, on average, was not there yet, from 0 to 1.
        waited: share of its time that who took batches waited, from 0 to 1; without what came before the first batch of
            a pass, except in what `PipelineMonitor` measured.
        first_wait_s: that came before the first batch of a pass, on average.
        first_waited: share of the time, all included, that this took.
        late: share of its time that who took batches waited for others than the first of a pass.
        of_fit: whether `PipelineMonitor` measured it.
    """

    workers: int
    service_s: float
    cpu_s: float
    step_s: float | None
    wait_s: float
    cycle_s: float
    process_cpu_s: float
    cores: int
    busy: float
    starting: float
    waited: float
    first_wait_s: float
    first_waited: float
    late: float
    of_fit: bool

    @classmethod
    def of(cls, stats: Stats, training: Training | None, cores: int) -> Load:
        """The numbers of `PipelineMonitor`, if there are any, else those of who took the batches."""
        measured = training is not None and training.batches > 0 and training.stats.loaded_batches > 0
        numbers = training.stats if training is not None and measured else stats
        if training is not None and measured:
            wait_s = training.wait_s / training.batches
            cycle_s, step, taken = training.elapsed_s / training.batches, training.step_s, training.batches
            waited = training.wait_fraction
        else:
            wait_s = numbers.batch_wait_s
            cycle_s, taken = wait_s + numbers.use_s, numbers.batches
            waited = wait_s / cycle_s if cycle_s else 0.0
            step = numbers.use_s if numbers.wait_is_of_training and numbers.steps else -1.0
        total_s = training.elapsed_s if training is not None and measured else numbers.wait_s + numbers.used_s
        first_waited = min(1.0, numbers.first_wait_s / max(total_s, 1e-6))
        cpu_s = numbers.cpu_s / max(1, numbers.loaded_batches)
        own_cpu_s = numbers.process_cpu_s - (numbers.cpu_s if numbers.engine in _IN_PROCESS else 0.0)
        busy = numbers.worker_busy_fraction
        if cycle_s and numbers.workers:
            busy = max(busy, min(1.0, numbers.service_s / (numbers.workers * cycle_s)))
        return cls(
            workers=numbers.workers,
            service_s=numbers.service_s,
            cpu_s=min(cpu_s, numbers.service_s),
            step_s=None if step < 0 else step,
            wait_s=wait_s,
            cycle_s=cycle_s,
            process_cpu_s=max(0.0, own_cpu_s) / max(1, taken),
            cores=cores,
            busy=busy,
            starting=_starting(numbers),
            waited=waited,
            first_wait_s=numbers.first_wait_s / max(1, numbers.batches - numbers.steps),
            first_waited=first_waited,
            late=max(0.0, waited - first_waited) if measured else waited,
            of_fit=measured,
        )

    @property
    def needed(self) -> int | None:
        """Workers that would keep up, whatever the cores say; None where a step's length is not known."""
        return None if self.step_s is None else sizing.workers_to_keep_up(self.service_s, self.step_s)

    @property
    def useful(self) -> int | None:
        """Workers above which the cores cannot do more; None: cores are no limit, or it cannot be said."""
        if self.step_s is None:
            return None
        training_cores = sizing.cores_in_use(0.0, self.process_cpu_s, self.step_s)
        return sizing.useful_workers(self.service_s, self.cpu_s, self.cores, training_cores)

    @property
    def cores_in_use(self) -> float:
        """By workers and training together, while it ran."""
        return min(float(self.cores), sizing.cores_in_use(self.cpu_s, self.process_cpu_s, self.cycle_s))

    @property
    def cores_are_full(self) -> bool:
        """Whether there is no core left for another worker."""
        return self.cpu_s > 0 and self.cores_in_use >= _IN_USE * self.cores


def _starting(stats: Stats) -> float:
    expected_s = stats.workers * stats.elapsed_s
    return max(0.0, 1 - stats.pool_ready_s / expected_s) if expected_s and stats.pool_ready_s else 0.0
