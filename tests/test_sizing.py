"""The arithmetic of how many workers a training needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mp import sizing

_SECONDS = st.floats(1e-5, 100)


@given(service_s=_SECONDS, step_s=_SECONDS)
def test_so_many_workers_give_batches_as_fast_as_they_are_taken_and_hardly_more(
    service_s: float, step_s: float
) -> None:
    workers = sizing.workers_to_keep_up(service_s, step_s)
    assert workers / service_s >= 1 / step_s
    if workers > 1:
        assert (workers - 1) / service_s < sizing.MARGIN / step_s


@given(service_s=_SECONDS, cpu_share=st.floats(0.01, 1), cores=st.integers(1, 256), used=st.floats(0, 300))
def test_as_many_workers_are_useful_as_the_cores_can_keep_at_work(
    service_s: float, cpu_share: float, cores: int, used: float
) -> None:
    useful = sizing.useful_workers(service_s, cpu_share * service_s, cores, used)
    assert useful is not None and useful >= 1
    left = cores - used
    assert (useful - 1) * cpu_share < max(left, 1e-9) or useful == 1
    assert (useful + 0.26) * cpu_share > left


@pytest.mark.parametrize(
    ("cpu_s", "cores", "training_cores", "useful"),
    [(0.1, 4, 0, 4), (0.1, 4, 1, 3), (0.05, 4, 0, 8), (0.098, 2, 0, 2), (0.1, 2, 2, 1), (0.0, 2, 0, None)],
)
def test_sleep_leaves_cores_to_others_and_the_training_takes_some(
    cpu_s: float, cores: int, training_cores: float, useful: int | None
) -> None:
    assert sizing.useful_workers(0.1, cpu_s, cores, training_cores) == useful


def test_a_step_of_no_time_divides_by_nothing() -> None:
    assert sizing.workers_to_keep_up(0.1, 0.0) > 1000
    assert sizing.workers_to_keep_up(0.0, 0.0) == 1
