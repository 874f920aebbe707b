"""A short soak; `python -m tests.soak` runs a long one."""

from __future__ import annotations

import warnings

from tests import soak


def test_a_short_soak() -> None:
    with warnings.catch_warnings():
        for message in soak.EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        report = soak.soak(seconds=12, seed=3)
    assert report.clean, str(report)
    assert report.batches > 0
    assert report.episodes["driven"] >= soak.KINDS_OF_EPISODES
    assert report.episodes["trained"] > 0
    assert report.episodes["streamed"] > 0
    assert report.kills + report.stops + report.stalls + report.starvations > 0
