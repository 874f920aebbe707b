"""`report()` of real runs: its advice, followed, makes the waiting go away; its HTML stands by itself."""

from __future__ import annotations

import html.parser
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console

import keras_mp
from keras_mp.loading.timing import SlowSample
from keras_mp.stats import StageStats, Stats, Training

_VOID = {"meta", "br", "img", "link", "hr", "input"}


def _sleep_20_ms(value: float) -> float:
    time.sleep(0.02)
    return value


def _train(workers: int | None, samples: int = 160, **options: Any) -> tuple[keras_mp.Report, keras_mp.Report]:
    """A loop of 40 ms a step over batches of eight samples, 20 ms each: the report of all, and of all but the start."""
    with keras_mp.PoolDataset(
        np.arange(float(samples)), _sleep_20_ms, batch_size=8, workers=workers, **options
    ) as dataset:
        for number, _ in enumerate(dataset):
            time.sleep(0.04)
            if number == 9:
                first = dataset.stats()
        return dataset.report(), dataset.report(since=first)


def _wait_fraction(report: keras_mp.Report) -> float:
    stats = report.stats
    return stats.wait_s / (stats.wait_s + stats.used_s)


def test_the_advice_followed_makes_the_waiting_go_away() -> None:
    report, _ = _train(1, 240)
    assert _wait_fraction(report) > 0.6
    found = re.search(r"waited \d+% of the time for data; the one worker was 9\d%|100% busy", report.advice[0])
    assert found, report.advice
    number = re.search(r"(\d+) workers would keep up", report.advice[0])
    assert number is not None, report.advice
    assert 3 <= int(number[1]) <= 7  # 4 or 5 on a quiet machine
    _, followed = _train(int(number[1]), 480)
    assert _wait_fraction(followed) < _wait_fraction(report) / 3, followed.advice  # 0.01 to 0.1 on a quiet machine


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "batches are made by the process that trains; "),
        ({"workers": 1, "use_multiprocessing": False}, "the one worker was"),
    ],
)
def test_other_engines_are_advised_too(options: dict[str, Any], said: str) -> None:
    report, _ = _train(**options)
    assert said in report.advice[0]
    assert re.search(r"[3-7] workers would keep up", report.advice[0]), report.advice


def test_an_executor_is_told_how_many_workers_would_do() -> None:
    with ThreadPoolExecutor(1) as pool:
        _, report = _train(None, pool=pool)
    assert "how many workers the ThreadPoolExecutor has is not known here; " in report.advice[0]


def test_numbers_outlive_the_dataset_and_time_after_the_loop_does_not_count() -> None:
    with keras_mp.PoolDataset(np.arange(64.0), _sleep_20_ms, batch_size=4, workers=1) as dataset:
        assert "Nothing has been loaded yet" in dataset.report().advice[0]
        assert "Nothing has been loaded yet" in str(dataset.report())
        list(dataset)
        before = dataset.stats()
        time.sleep(0.3)  # somebody reads, or validates
        list(dataset)
        after = dataset.stats(since=before)
        assert after.used_s < 0.2 and (before.steps, after.steps) == (15, 15)
    closed = dataset.stats()
    assert (closed.batches, closed.loaded_batches, closed.slots, closed.running) == (32, 32, 0, 0)
    assert closed.first_wait_s > after.first_wait_s > 0
    dataset.close()
    assert dataset.stats() == closed
    assert "busy" in dataset.report().advice[0]


def _report(name: str = "PoolDataset(...)", item: str = "tile.npy", **changed: Any) -> keras_mp.Report:
    slow = (SlowSample(0.3, 7, item, 0, 0, "transform"),)
    numbers: dict[str, Any] = {
        "engine": "worker pool",
        "workers": 2,
        "elapsed_s": 8.0,
        "batches": 100,
        "loaded_batches": 100,
        "samples": 800,
        "bytes": 3 << 30,
        "wait_s": 4.0,
        "used_s": 4.0,
        "steps": 99,
        "work_s": 16.0,
        "cpu_s": 0.2,
        "pids": (11, 12),
        "busy_s": (7.9, 4.0),
        "ready_s": (8.0, 8.0),
        "stages": {"source": StageStats(0.1, 0.001), "transform": StageStats(14.7, 0.147, slow)},
    }
    return keras_mp.Report(name, Stats(**{**numbers, **changed}), None, 4)


class _Checker(html.parser.HTMLParser):
    """Balanced tags, nothing from outside, no code."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        names = dict(attrs)
        assert not names.keys() & {"src", "href", "onload", "onclick", "data"}, (tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _checked(text: str) -> _Checker:
    checker = _Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert "http" not in text and "url(" not in text and "@import" not in text
    return checker


def test_the_file_is_html_that_needs_no_other(tmp_path: Path) -> None:
    report = _report()
    path = report.save(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    checker = _checked(path.read_text(encoding="utf-8"))
    assert {"html", "title", "svg", "table", "style"} <= checker.seen
    assert path.read_text(encoding="utf-8").count("<svg") == 4
    said = " ".join(checker.text)
    for part in ("process 11", "99%", "3 GiB", "800 samples", "tile.npy", *report.advice):
        assert part in said, part


def test_what_users_wrote_is_text() -> None:
    evil = "<script>alert('&')</script>"
    report = _report(name=evil, item=evil)
    checker = _checked(report.html())
    assert "script" not in checker.seen
    assert evil in "".join(checker.text)
    assert "[bold]" in str(_report(name="[bold]", item="[/red]")) and "[/red]" in str(_report(item="[/red]"))


def test_a_notebook_shows_dataset_and_report() -> None:
    with keras_mp.PoolDataset(np.arange(8.0), batch_size=4, workers=0) as dataset:
        _checked(dataset._repr_html_())
        list(dataset)
        shown = dataset._repr_html_()
        _checked(shown)
        assert "2 batches, 8 samples" in shown
        assert dataset.report()._repr_html_().startswith("<div")
    parallel = keras_mp.parallelize([np.ones(3)] * 4, workers=0)
    list(parallel)
    assert "4 batches" in parallel._repr_html_()
    parallel.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"workers": 200, "pids": tuple(range(200)), "busy_s": (1.0,) * 200, "ready_s": (2.0,) * 200},
        {"wait_is_of_training": False},
        {"stages": {}, "work_s": 0.0},
        {"used_s": 0.0, "wait_s": 0.0, "steps": 0},
        {"workers": 0, "engine": "in-process", "pids": (), "busy_s": (), "ready_s": ()},
        {"used_s": 1e-9},
        {"failures": 3, "retries": 2, "restarts": 3, "timeouts": 1},
    ],
)
def test_whatever_the_numbers_it_can_be_shown(changed: dict[str, Any]) -> None:
    report = _report(**changed)
    assert report.advice
    _checked(report.html())
    assert len(str(report).splitlines()) < 60
    assert max(map(len, str(report).splitlines())) <= 110


def test_it_prints_tables_and_what_the_monitor_measured() -> None:
    report = _report()
    text = str(report)
    assert text == str(_report())
    for part in ("PoolDataset(...)", "transform", "14.7 s", "92%", "process 12", "50%", "waited"):
        assert part in text, part
    console = rich.console.Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(report)
    assert "transform" in console.export_text()
    console.file.close()
    training = Training(2, 100, 10.0, 7.1, 0.029, report.stats)
    measured = keras_mp.Report(report.name, report.stats, training, 4)
    assert "fit waited" in str(measured) and "fit waited" in measured.html()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [(3, TypeError, "path must be a path such as 'report.html', got int"), ("report.pdf", ValueError, "'report.pdf'")],
)
def test_a_wrong_path_is_refused(path: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _report().save(path)


def _import_jax(value: float) -> float:
    import jax

    return value + 0 * len(jax.__version__)


def test_it_names_a_framework_that_the_workers_have_imported() -> None:
    with keras_mp.PoolDataset(np.arange(16.0), batch_size=1, workers=1) as plain:
        list(plain)
        assert not any("imported" in sentence for sentence in plain.report().advice)
        assert "a worker's own memory" in str(plain.report())
    with keras_mp.PoolDataset(np.arange(16.0), _import_jax, batch_size=1, workers=1) as heavy:
        list(heavy)
        report = heavy.report()
        assert any("The workers have imported JAX: each holds" in sentence for sentence in report.advice)
        assert "JAX included" in str(report)
    assert heavy.report().footprint is None  # they are gone
