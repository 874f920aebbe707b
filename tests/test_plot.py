"""`plot_timeline`: a lane for each who did something, the stages in colours; and the guide that shows it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_mp
from tests.census import eventually
from tests.support import run_script

_GUIDE = Path(__file__).resolve().parents[1] / "docs" / "timeline.md"


def _double(value: float) -> float:
    return 2 * value


def _labels(figure: Figure) -> set[str]:
    (legend,) = figure.legends
    return {text.get_text() for text in legend.get_texts()}


def test_it_draws_a_lane_for_each_and_the_stages(running_pool: keras_mp.WorkerPool, tmp_path: Path) -> None:
    with keras_mp.PoolDataset(np.arange(80.0), _double, batch_size=8, pool=running_pool) as dataset:
        with dataset.trace():
            list(dataset)
        pids = dataset.stats().pids
    figure = keras_mp.plot_timeline(dataset)
    (axes,) = figure.axes
    lanes = [label.get_text() for label in axes.get_yticklabels()]
    assert lanes[0] == "consumer"
    assert set(lanes[1:]) <= {f"worker (pid {pid})" for pid in pids} and len(lanes) > 1
    always = {"batch handed out", "consumer waits", "batch", "source", "transform", "collate", "write"}
    assert _labels(figure) - {"worker starts", "worker started"} == always  # the second worker may start only now
    assert sorted(int(text.get_text()) for text in axes.texts) == list(range(10))
    assert axes.get_xlabel() == "seconds since the recording began"
    figure.savefig(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_it_marks_what_becomes_of_workers() -> None:
    with keras_mp.WorkerPool(2) as pool, keras_mp.PoolDataset(np.arange(80.0), batch_size=2, pool=pool) as dataset:
        trace = dataset.trace()
        list(dataset)
        assert eventually(lambda: len(dataset.stats().pids) == 2)
        pool.resize(1)
        assert eventually(lambda: any(event.name == "worker let go" for _, lane in trace.lanes() for event in lane))
    assert "worker let go" in _labels(keras_mp.plot_timeline(dataset))


def test_of_many_batches_none_is_numbered_and_a_part_can_be_drawn() -> None:
    with keras_mp.PoolDataset(np.arange(80.0), _double, batch_size=1, workers=0) as dataset:
        dataset.trace()
        list(dataset)
        assert dataset.timeline is not None
        (_, waits), _ = dataset.timeline.lanes()
        handed_out = [event.begun - dataset.timeline.begun for event in waits if event.seconds is None]
        whole = keras_mp.plot_timeline(dataset)
        part = keras_mp.plot_timeline(dataset, start_s=handed_out[9], end_s=handed_out[12])
    assert not whole.axes[0].texts
    assert {int(text.get_text()) for text in part.axes[0].texts} <= set(range(9, 14))
    assert part.axes[0].get_xlim() == (handed_out[9], handed_out[12])
    with pytest.raises(ValueError, match=r"nothing from start_s=1000000 s to the end"):
        keras_mp.plot_timeline(dataset, start_s=1_000_000)
    with pytest.raises(ValueError, match=r"nothing from start_s=0\.0 s to -1 s"):
        keras_mp.plot_timeline(dataset, end_s=-1)


def test_without_a_recording_it_says_what_to_call() -> None:
    with keras_mp.PoolDataset(np.arange(8.0), workers=0) as dataset:
        with pytest.raises(ValueError, match=r"call dataset\.trace"):
            keras_mp.plot_timeline(dataset)
        dataset.trace()
        with pytest.raises(ValueError, match="train on it"):
            keras_mp.plot_timeline(dataset)


@pytest.mark.parametrize("dataset", [None, [1, 2], "trace.json"])
def test_what_is_no_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(TypeError, match="dataset must be a PoolDataset"):
        keras_mp.plot_timeline(dataset)


def test_without_matplotlib_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with keras_mp.PoolDataset(np.arange(8.0), workers=0) as dataset:
        with pytest.raises(ImportError, match=r"pip install 'keras-mp\[plot\]'"):
            keras_mp.plot_timeline(dataset)


def test_the_guides_code_runs(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", _GUIDE.read_text(encoding="utf-8"), re.M | re.S))
    run_script(tmp_path / "guide.py", code)
    assert {each.name for each in tmp_path.iterdir()} == {"guide.py", "trace.json", "timeline.png"}
