"""Code that users write anywhere: its tracebacks show their lines, and what no worker can import travels by value."""

from __future__ import annotations

import importlib.util
import linecache
import os
import runpy
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

import keras_mp
from tests.support import python_path, run_script

pytestmark = pytest.mark.any_backend

_LIGHT = "numpy"  # a backend that is imported fast


def _failing(transform: Any) -> keras_mp.SampleError:
    with keras_mp.PoolDataset(range(4), transform, batch_size=2, workers=1) as data:
        with pytest.raises(keras_mp.SampleError) as caught:
            data[0]
    return caught.value


def _frame(filename: str, line: int, name: str, source: str) -> str:
    return f'  File "{filename}", line {line}, in {name}\n    {source}\n'


# -- tracebacks ------------------------------------------------------------------------------------------------------


def test_a_scripts_traceback_shows_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    output = run_script(
        path,
        textwrap.dedent(
            """\
            import keras_mp

            class Scale:
                def __call__(self, x):
                    def inner():
                        return x / (x - 1)  # the inner line
                    return inner()

            with keras_mp.PoolDataset(range(4), Scale(), batch_size=2, workers=1) as data:
                try:
                    data[0]
                except ZeroDivisionError as error:
                    print(error.failure.traceback)
                    print(str(error).count("# the inner line"))
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    assert _frame(str(path), 7, "__call__", "return inner()") in output
    assert _frame(str(path), 6, "inner", "return x / (x - 1)  # the inner line") in output
    assert "dynamic-code" not in output
    assert output.splitlines()[-1] == "1"


@pytest.mark.parametrize("name", ["<ipython-input-3-0123456789ab>", "/tmp/ipykernel_12345/67890.py"])
def test_a_notebook_cells_traceback_shows_its_lines(name: str) -> None:
    """A cell has no file: its lines are known to the training process only, in `linecache`, where IPython puts them."""
    cell = "factor = 3\ndef preprocess(x):\n    return [1, 2][x + factor]  # in the cell\n"
    linecache.cache[name] = len(cell), None, cell.splitlines(keepends=True), name
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(cell, name, "exec"), namespace)
        error = _failing(namespace["preprocess"])
    finally:
        del linecache.cache[name]
    assert isinstance(error, IndexError)
    for text in (error.failure.traceback, str(error)):
        assert _frame(name, 3, "preprocess", "return [1, 2][x + factor]  # in the cell") in text


def test_a_cell_that_was_run_again_shows_its_new_lines() -> None:
    name = "<ipython-input-4-0123456789ab>"
    with keras_mp.WorkerPool(1) as pool:
        for comment in ("first", "second"):
            cell = f"def preprocess(x):\n    return 1 / x  # {comment}\n"
            linecache.cache[name] = len(cell), None, cell.splitlines(keepends=True), name
            namespace: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(cell, name, "exec"), namespace)
            with keras_mp.PoolDataset(range(4), namespace["preprocess"], batch_size=2, pool=pool) as data:
                with pytest.raises(ZeroDivisionError, match=f"# {comment}"):
                    data[0]
    del linecache.cache[name]


def test_the_command_lines_traceback_shows_its_lines() -> None:
    code = textwrap.dedent(
        """
        import dataclasses
        import keras_mp

        @dataclasses.dataclass
        class Scale:
            by: int
            def __call__(self, x):
                return x / self.by  # on the command line

        import linecache
        exec("def unrelated(x):\\n    return x / 0")
        linecache.cache.setdefault("<string>", (2, None, ["of another\\n"] * 2, "<string>"))  # as Python 3.13 does
        for transform in Scale(0), unrelated:
            with keras_mp.PoolDataset(range(4), transform, batch_size=2, workers=1) as data:
                try:
                    data[0]
                except ZeroDivisionError as error:
                    print(error.failure.traceback)
        """
    )
    done = subprocess.run(
        [sys.executable, "-Wignore", "-c", code, "an argument"],
        env={**os.environ, "PYTHONPATH": python_path(), "KERAS_BACKEND": _LIGHT},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    first, second = done.stdout.split("Traceback (most recent call last):\n")[1:]
    assert _frame("<command line>", 9, "__call__", "return x / self.by  # on the command line") in first
    assert 'File "<string>", line 2, in unrelated\nZeroDivisionError' in second


# -- by value --------------------------------------------------------------------------------------------------------

_MODULE = """
import math
import threading
from enum import Enum

lock = threading.Lock()  # which nothing that travels needs
scale = 3

class Kind(Enum):
    SMALL = 1

class Base:
    def __init__(self, add=0):
        self.add = add

    def apply(self, x):
        return helper(x) + self.add

    @classmethod
    def make(cls, x):
        return cls(1).apply(x)

    @staticmethod
    def plain(x):
        return helper(x)

class Item(Base):
    kind = Kind.SMALL

    def __call__(self, x):
        assert self.kind is Kind.SMALL
        return super().apply(x)

def helper(x):
    return math.floor(x) * scale
"""


def _uses(module: Any) -> dict[str, Any]:
    """What of the module can be a transform: each multiplies by three and adds something."""
    item = module.Item
    return {
        "function": module.helper,
        "object": module.Item(2),
        "method": module.Base(2).apply,
        "class method": module.Item.make,
        "static method": module.Base.plain,
        "closure over the class": lambda x: item(2)(x),
    }


def _assert_right(uses: dict[str, Any]) -> None:
    for name, transform in uses.items():
        with keras_mp.PoolDataset(range(4), transform, batch_size=4, workers=1) as data:
            assert data[0].tolist() == [transform(x) for x in range(4)], name


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["keras_mp_test_from_a_path", "keras_mp_test_absent.inner", "tomllib"])
def test_a_module_loaded_from_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under the name of another module that workers could import."""
    path = tmp_path / "settings.py"
    path.write_text(_MODULE)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # so that it is put back
    module = _load(name, path)
    _assert_right(_uses(module))
    error = _failing(module.Item("text"))
    assert _frame(str(path), 17, "apply", "return helper(x) + self.add") in str(error)


def test_a_module_that_was_made_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("keras_mp_test_made")
    exec(_MODULE, module.__dict__)
    monkeypatch.setitem(sys.modules, "keras_mp_test_made", module)
    _assert_right(_uses(module))


def test_a_module_run_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "settings.py"
    path.write_text(_MODULE)
    for name in (None, "keras_mp_test_run", "__main__"):
        _assert_right(_uses(types.SimpleNamespace(**runpy.run_path(str(path), run_name=name))))


def test_modules_that_workers_can_import_travel_by_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class that travels by value the worker has a copy, so what it imports by itself would be none of it."""
    package = tmp_path / "keras_mp_test_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys, types\nmade = sys.modules[__name__ + '.made'] = "
        "types.ModuleType(__name__ + '.made')\nexec('class Made: pass', vars(made))"
    )
    (package / "inner.py").write_text("class Inner: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    inner = importlib.import_module("keras_mp_test_package.inner")
    made = importlib.import_module("keras_mp_test_package.made")
    try:
        pairs = [(inner.Inner, "keras_mp_test_package.inner"), (made.Made, "keras_mp_test_package.made")]

        def same(index: int) -> bool:
            cls, name = pairs[index]
            return cls is getattr(importlib.import_module(name), cls.__name__)

        with keras_mp.WorkerPool(1) as pool, keras_mp.PoolDataset(range(2), same, batch_size=2, pool=pool) as data:
            assert data[0].tolist() == [True, True]
    finally:
        for name in [name for name in sys.modules if name.startswith("keras_mp_test_package")]:
            del sys.modules[name]


def test_batches_of_a_class_by_value_are_of_the_callers_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "keras_mp_test_batches"
    (tmp_path / "batches.py").write_text("class Batch:\n    def __init__(self, rows):\n        self.rows = rows\n")
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = _load(name, tmp_path / "batches.py")
    with keras_mp.PoolDataset(range(4), collate=module.Batch, batch_size=4, workers=1) as data:
        batch = data[0]
    assert type(batch) is module.Batch
    assert batch.rows == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_dataset_made_in_a_child_process(method: str, tmp_path: Path) -> None:
    """A sweep: one process for each run, each with a dataset of its own."""
    output = run_script(
        tmp_path / "sweep.py",
        textwrap.dedent(
            f"""
            import multiprocessing
            import keras_mp

            scale = 2

            class Source:
                def __len__(self):
                    return 4

                def __getitem__(self, index):
                    return double(index)

            def double(x):
                return x * scale

            class Batch:
                def __init__(self, rows):
                    self.total = sum(rows)

            def run(seed):
                with keras_mp.PoolDataset(Source(), double, batch_size=2, workers=1, seed=seed) as data:
                    print([batch.tolist() for batch in data], flush=True)
                with keras_mp.PoolDataset(Source(), collate=Batch, batch_size=2, workers=1, seed=seed) as data:
                    print([(type(batch) is Batch, batch.total) for batch in data], flush=True)

            if __name__ == "__main__":
                child = multiprocessing.get_context("{method}").Process(target=run, args=(1,))
                child.start()
                child.join()
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    assert output.splitlines() == ["[[0, 4], [8, 12]]", "[(True, 2), (True, 10)]"]
