"""What a loader makes of a request: failures known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mp.errors import SampleFailure
from keras_mp.loading.base import ignore_position
from keras_mp.loading.loader import OnError, SampleLoader
from keras_mp.loading.timing import SlowestSamples, StageTimes
from keras_mp.plan.request import Request

_KILLED = SampleFailure("transform", 12, "12", 0, 1, "WorkerCrashed", "ended by SIGSEGV", "", "two workers")


def _must_not_see_twelve(value: int) -> Any:
    assert value != 12
    return np.float32(value)


@pytest.mark.parametrize(("policy", "expected"), [("skip", [10, 11, 13]), ("replace", [10, 11, 11, 13])])
def test_a_sample_known_to_have_failed_is_not_read_again(policy: OnError, expected: list[int]) -> None:
    loader = SampleLoader(range(20), _must_not_see_twelve, on_error=policy)
    loaded = loader.load(
        Request(0, 1, range(10, 14), failed=((2, _KILLED),)), ignore_position, None, StageTimes(SlowestSamples())
    )
    assert loaded.batch.tolist() == expected
    assert [failure.type for failure in loaded.failures] == ["WorkerCrashed"]
