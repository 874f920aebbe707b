"""The command `keras-mp`, run on modules that lie in a folder, as a user runs it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from keras_mp import cli
from tests.support import python_path

# What the workers import lies apart, so that they need not import Keras.
_SAMPLES = """
import os, pathlib, signal, threading
import numpy as np

def tile(path):
    number = int(path[5:8])
    if number in (17, 45):
        raise OSError(f"{path} is cut off")
    image = np.full((30 if number == 99 else 32, 32, 3), number / 120, "float32")
    if number == 60:
        image[3, 4, :2] = np.nan
    return {"image": image, "label": number}

def lethal(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 21:
        threading.Event().wait()
    return np.float32(number)

def stuck(number):
    if number == 9:
        pathlib.Path("stuck").write_text(str(os.getpid()))
        threading.Event().wait()
    return np.float32(number)

def padded(samples):
    rows = np.zeros((len(samples), max(map(len, samples))))
    for row, sample in zip(rows, samples):
        row[: len(sample)] = sample
    return rows

def ragged(number):
    return np.ones(1 + number % 7)

def spoilt(batch, rng):
    if (batch == 13).any():
        raise ValueError("thirteen")
    return np.where(batch == 20, np.inf, batch)
"""
_DATA = """
import keras, numpy as np
import keras_mp, samples

paths = [f"tile_{number:03}.npy" for number in range(120)]
tiles = keras_mp.PoolDataset(paths, samples.tile, batch_size=16, shuffle=True, seed=0, workers=2)
good = [path for path in paths if path[5:8] not in ("017", "045", "060", "099")]

def clean() -> keras_mp.PoolDataset:
    return keras_mp.PoolDataset(good, samples.tile, batch_size=16, workers=2)

lethal = keras_mp.PoolDataset(range(24), samples.lethal, batch_size=4, workers=2, timeout=5)
stuck = keras_mp.PoolDataset(range(24), samples.stuck, batch_size=4, workers=2)
ragged = keras_mp.PoolDataset(range(30), samples.ragged, collate=samples.padded, batch_size=4, workers=0)
spoilt = keras_mp.PoolDataset(np.arange(40.0), batch_transform=samples.spoilt, batch_size=4, workers=0)

class Batches(keras.utils.PyDataset):
    odd = True

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 3 and self.odd:
            raise ValueError("no such batch")
        return np.zeros((3 if index == 11 else 8, 5 if index == 7 and self.odd else 4)), np.zeros(8)

batches = Batches()

class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return np.zeros((8, 4))

class parts:
    batches = keras_mp.parallelize(batches, workers=0)

array = np.zeros(3)

def needs_argument(folder):
    return tiles

def fails():
    raise RuntimeError("the disk is not there")

def wrong():
    return [tiles]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "samples.py").write_text(_SAMPLES, encoding="utf-8")
    (folder / "data.py").write_text(_DATA, encoding="utf-8")
    (folder / "broken.py").write_text("number = 1\n\nnumber / 0\n", encoding="utf-8")
    (folder / "unfinished.py").write_text("def data(:\n", encoding="utf-8")
    (folder / "lacking.py").write_text("import a_package_that_nobody_has\n", encoding="utf-8")
    (folder / "script.py").write_text("raise SystemExit('usage: script.py FOLDER')\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the command in the folder, in this process; the modules there are forgotten afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield lambda *arguments: cli.main(arguments)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path(), "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}


@pytest.fixture(scope="module")
def tiles(folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`check` on 120 samples with two broken ones, one NaN and one odd shape."""
    done = subprocess.run(
        [sys.executable, "-m", "keras_mp", "check", "data:tiles", "--json", "tiles.json"],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done, json.loads((folder / "tiles.json").read_text(encoding="utf-8"))


def _problems(path: Path) -> dict[int, tuple[str, str]]:
    found = json.loads(path.read_text(encoding="utf-8"))["problems"]
    assert len({problem["index"] for problem in found}) == len(found)
    return {problem["index"]: (problem["kind"], problem["text"]) for problem in found}


def test_check_names_all_that_is_wrong(tiles: tuple[subprocess.CompletedProcess[str], Any]) -> None:
    done, _ = tiles
    assert done.returncode == 1
    for number in (17, 45, 60, 99):
        assert re.search(rf"^ *{number} .*tile_{number:03}\.npy", done.stdout, re.MULTILINE), done.stdout
    assert "OSError: tile_017.npy is cut off" in done.stdout
    assert "sample['image'] has 2 NaN" in done.stdout
    assert "has shape (30, 32, 3), (32, 32, 3) in 117 others" in done.stdout
    assert "120 samples checked" in done.stdout
    assert "2 failed, 1 not finite, 1 different" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # neither bar nor colours where there is no terminal
    assert "Traceback" not in done.stderr


def test_json_has_all_of_it(tiles: tuple[Any, dict[str, Any]]) -> None:
    _, found = tiles
    assert (found["ok"], found["checked"], found["unit"], found["epochs"]) == (False, 120, "sample", 1)
    assert found["target"] == "data:tiles"
    assert [(problem["index"], problem["kind"]) for problem in found["problems"]] == [
        (17, "failed"),
        (45, "failed"),
        (60, "not finite"),
        (99, "different"),
    ]
    assert "in tile\n" in found["problems"][0]["traceback"]
    assert found["problems"][2]["item"] == "'tile_060.npy'"
    arrays = {array["path"]: (array["shape"], array["dtype"]) for array in found["arrays"]}
    assert arrays == {"sample['image']": ([32, 32, 3], "float32"), "sample['label']": ([], "int64")}
    assert len(found["slowest"]) == 5
    assert found["slowest"][0]["seconds"] >= found["slowest"][-1]["seconds"] >= found["median_s"] > 0


def test_a_clean_dataset_exits_with_zero(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "data:clean") == 0
    assert "116 samples checked" in (out := capsys.readouterr().out)
    assert "nothing is wrong" in out


def test_what_kills_or_hangs_a_worker_is_named(run: Callable[..., int], folder: Path) -> None:
    assert run("check", "data:lethal", "--json", "lethal.json") == 1
    problems = _problems(folder / "lethal.json")
    assert problems.keys() == {5, 21}
    assert "ended its worker" in problems[5][1]
    assert "took too long" in problems[21][1]


@pytest.mark.parametrize("target", ["data:batches", "data:Batches", "data:parts.batches"])
def test_batches_of_a_pydataset(
    target: str, run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", target, "--json", "batches.json", "--workers", "0") == 1
    assert _problems(folder / "batches.json") == {
        3: ("failed", "source failed: ValueError: no such batch"),
        7: ("different", "batch[0] has shape (8, 5), (?, 4) in 10 others"),
    }
    assert "12 batches checked" in capsys.readouterr().out


def test_lengths_may_vary_where_collate_makes_one_of_them(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "data:ragged") == 0
    assert "sample (?,) float64" in capsys.readouterr().out


def test_a_batch_that_fails_is_named_by_its_samples(run: Callable[..., int], folder: Path) -> None:
    assert run("check", "data:spoilt", "--json", "spoilt.json") == 1
    found = json.loads((folder / "spoilt.json").read_text(encoding="utf-8"))["problems"]
    assert [(problem["unit"], problem["index"], problem["item"], problem["text"]) for problem in found] == [
        ("batch", 3, "samples 12 to 15", "batch_transform failed: ValueError: thirteen"),
        ("batch", 5, "samples 20 to 23", "batch has 1 Inf"),
    ]


def test_a_part_of_it_in_several_epochs(run: Callable[..., int], folder: Path) -> None:
    assert run("check", "data:clean", "--sample", "5", "--epochs", "3", "--json", "part.json") == 0
    found = json.loads((folder / "part.json").read_text(encoding="utf-8"))
    assert (found["checked"], found["epochs"]) == (15, 3)


def test_an_endless_dataset_is_checked_in_part(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "data:Endless") == 2
    assert "--sample N" in capsys.readouterr().err
    assert run("check", "data:Endless", "--sample", "3", "--workers", "0") == 0


_WRONG_TARGETS = {
    "data": "must name a module and a dataset in it",
    ":tiles": "must name a module and a dataset in it",
    "data:": "must name a module and a dataset in it",
    "data.py:tiles": "name the module: data:tiles",
    "./data.py:tiles": "name the module: data:tiles",
    "nowhere:tiles": "no module 'nowhere' here",
    "data.inner:tiles": "no module 'data.inner' here",
    "lacking:tiles": "lacking cannot be imported: ModuleNotFoundError: No module named 'a_package_that_nobody_has'",
    "broken:tiles": "ZeroDivisionError: division by zero",
    "unfinished:tiles": "SyntaxError",
    "script:tiles": "SystemExit: usage: script.py FOLDER",
    "data:tile": "data has no 'tile'; it has batches, clean, lethal, ragged, spoilt, stuck, tiles",
    "data:array": "data:array is array of shape (3,), dtype float64, a ndarray; name a keras_mp.PoolDataset",
    "data:needs_argument": "cannot be called without arguments (missing a required argument: 'folder')",
    "data:fails": "data:fails() failed: RuntimeError: the disk is not there",
    "data:wrong": "a list; name a keras_mp.PoolDataset",
}


@pytest.mark.parametrize("target", _WRONG_TARGETS)
@pytest.mark.parametrize("command", ["check", "tune"])
def test_a_wrong_target_is_one_line(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], command: str, target: str
) -> None:
    assert run(command, target) == 2
    out, err = capsys.readouterr()
    assert err.startswith("keras-mp: ")
    assert err.count("\n") == 1
    assert _WRONG_TARGETS[target] in err
    assert not out


@pytest.mark.parametrize(("target", "line"), [("broken:tiles", 3), ("unfinished:tiles", 1)])
def test_an_error_in_the_users_module_says_where(
    run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], target: str, line: int
) -> None:
    assert run("check", target) == 2
    assert f"({folder / target.partition(':')[0]}.py, line {line})" in capsys.readouterr().err
    assert run("check", target, "--traceback") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: command"),
        (("look", "data:tiles"), "invalid choice: 'look'"),
        (("check",), "required: target"),
        (("check", "data:tiles", "--epochs", "0"), "whole number of at least 1, got '0'"),
        (("check", "data:tiles", "--sample", "x"), "whole number of at least 1, got 'x'"),
        (("check", "data:tiles", "--timeout", "-1"), "positive number of seconds, got '-1'"),
        (("check", "data:tiles", "--timeout", "nan"), "positive number of seconds, got 'nan'"),
        (("check", "data:tiles", "--workers", "5000"), "workers must be between 0 and 4096, got 5000"),
        (("check", "data:tiles", "--json", "nowhere/found.json"), "a file in a folder that exists"),
        (("bench", "data:tiles", "--seconds", "soon"), "positive number of seconds, got 'soon'"),
        (("tune", "data:tiles", "--workers", "1,two"), "whole number of at least 0, got 'two'"),
        (("tune", "data:tiles", "--plot", "."), "a file in a folder that exists"),
    ],
)
def test_wrong_arguments(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bench_says_how_fast(run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "data:clean", "--epochs", "2", "--json", "bench.json") == 0
    out = capsys.readouterr().out
    assert "first batch after" in out
    assert "transform" in out
    found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    assert (found["batches"], found["samples"]) == (15, 2 * 116 - 16)  # the first is not counted
    assert found["bytes"] == found["samples"] * (32 * 32 * 3 * 4 + 8)
    assert found["samples_per_s"] == pytest.approx(found["samples"] / found["elapsed_s"])
    assert found["stats"]["loaded_batches"] == 16


def test_bench_of_what_fails_is_one_line(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "data:tiles") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "is cut off" in err


def test_tune_names_the_workers_to_use(
    run: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--workers", "0,1,1", "--rounds", "2", "--seconds", "0.2", "--json", "t.json", "--plot", "t.png")
    assert run("tune", "data:clean", *arguments) == 0
    found = json.loads((folder / "t.json").read_text(encoding="utf-8"))
    assert [each["workers"] for each in found["measured"]] == [0, 1]
    assert all(len(each["rounds_batches_per_s"]) == 2 and each["batches_per_s"] > 0 for each in found["measured"])
    assert found["workers"] in (0, 1)
    assert f"workers={found['workers']}  #" in capsys.readouterr().out
    assert (folder / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_in_an_unknown_format_is_one_line(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--workers", "0", "--rounds", "1", "--seconds", "0.1", "--plot", "t.doc")
    assert run("tune", "data:clean", *arguments) == 2
    assert "t.doc cannot be written" in capsys.readouterr().err


def _heed_ctrl_c() -> None:
    """A shell's background jobs, which may be how this runs, inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Terminal:
    """The command on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keras_mp", *arguments],
            cwd=folder,
            env=_environment(),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_heed_ctrl_c,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str | None = None) -> None:
        """Reads until the pattern has been shown; None: to the end."""
        while pattern is None or not re.search(pattern, self.text):
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # Linux's way to say that nobody has the other end any more
                data = b""
            if not data:
                assert pattern is None, self.text
                return
            self.text += data.decode(errors="replace")

    def close(self) -> int:
        self.read_until()
        os.close(self._master)
        return self.process.wait(60)


def test_a_terminal_shows_a_bar_and_is_left_as_it_was(folder: Path) -> None:
    terminal = _Terminal(folder, "check", "data:tiles")
    assert terminal.close() == 1
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.text)
    assert re.search(r"━ +\d+/120 samples [\d.,]+/s \d:\d\d:\d\d", shown), terminal.text
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")  # the cursor is back
    assert "120 samples checked" in terminal.text
    assert "Traceback" not in terminal.text


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(folder: Path) -> None:
    (folder / "stuck").unlink(missing_ok=True)
    terminal = _Terminal(folder, "check", "data:stuck")
    terminal.read_until(r"━.* [48]/24")  # the first batches are there, and the third will not come
    worker = _worker_of(folder / "stuck", terminal.process)
    _interrupt(terminal.process)
    assert terminal.close() == 130
    assert "keras-mp: interrupted" in terminal.text
    assert "Traceback" not in terminal.text
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(30)
    assert not worker.is_running()


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """SIGINT to all of them, as a terminal does; again after a while, as Python loses one that hits a finaliser."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        again = threading.Timer(40, _interrupt, [process])
        again.daemon = True
        again.start()


def _worker_of(path: Path, process: subprocess.Popen[bytes]) -> psutil.Process:
    """The worker that has said in a file that it is stuck."""
    while not (path.exists() and path.read_text()):
        assert process.poll() is None
    return psutil.Process(int(path.read_text()))
