"""How many workers a training needs: the arithmetic of a queue, with nothing of the package in it.

A worker needs `service_s` seconds for a batch, so N workers give N / service_s batches a second. The training takes one
every `step_s` seconds when it is there. They keep up where N / service_s >= 1 / step_s:

    N >= service_s / step_s

which `workers_to_keep_up` raises by `MARGIN`, since neither batches nor steps take the same time each.

Cores limit that. Of the seconds at a batch, `cpu_s` are processor time (the others are sleep, disk, network), and the
process that trains needs `process_cpu_s` of its own for a step. At a step every `step_s` seconds the training uses
process_cpu_s / step_s cores, and each worker that never waits uses cpu_s / service_s of one. So as many can be at work:

    (cores - process_cpu_s / step_s) / (cpu_s / service_s)

`useful_workers` is that, rounded so that a rest of more than a quarter of a worker is worth one. Where all cores are in
use already, the seconds above are longer than the work takes on a free core, and nothing can be said of more workers
but that they take the cores from each other: `cores_in_use` tells.
"""

from __future__ import annotations

import math

MARGIN = 1.1
_LEAST_STEP_S = 1e-6
_REST_WORTH_A_WORKER = 0.25


def workers_to_keep_up(service_s: float, step_s: float) -> int:
    """The least number of workers for which the training hardly waits.

    Args:
        service_s: seconds of one worker for one batch.
        step_s: seconds of a step whose batch is there.

    Returns:
        ceil(1.1 * service_s / step_s), at least 1.
    """
    return max(1, math.ceil(MARGIN * service_s / max(step_s, _LEAST_STEP_S)))


def useful_workers(service_s: float, cpu_s: float, cores: int, training_cores: float = 0.0) -> int | None:
    """The greatest number of workers that the cores can keep at work; more of them cannot help.

    Args:
        service_s: seconds of one worker for one batch.
        cpu_s: processor time of that.
        cores: that may be used.
        training_cores: how many of them the process that trains uses.

    Returns:
        At least 1; None where a batch takes no processor time to speak of, so that cores are no limit.
    """
    if service_s <= 0 or cpu_s < service_s / 1000:
        return None
    count = max(0.0, cores - training_cores) / (cpu_s / service_s)
    return max(1, math.ceil(count - _REST_WORTH_A_WORKER))


def cores_in_use(cpu_s: float, process_cpu_s: float, cycle_s: float) -> float:
    """How many cores workers and training use together.

    Args:
        cpu_s: processor time of a worker for a batch.
        process_cpu_s: processor time of the process that trains, for a step.
        cycle_s: seconds from one step to the next, waiting included.
    """
    return (cpu_s + process_cpu_s) / max(cycle_s, _LEAST_STEP_S)
