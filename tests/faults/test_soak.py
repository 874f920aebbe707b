"""A short soak; `python -m tests.soak` runs a long one."""

from __future__ import annotations

import pytest

from tests import soak


@pytest.mark.filterwarnings("ignore:keras_mp. .* samples failed:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:keras_mp. no shared memory:RuntimeWarning")
def test_a_short_soak() -> None:
    report = soak.soak(seconds=12, seed=3)
    assert report.clean, str(report)
    assert report.batches > 0
    assert report.kills + report.stops + report.stalls + report.starvations > 0
