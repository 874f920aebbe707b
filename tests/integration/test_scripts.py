"""What users write: scripts without a guard, notebook cells, classes in `__main__`; and what an import costs."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import keras_mp
from tests.support import python_path, run_script

pytestmark = pytest.mark.any_backend

_LIGHT = "numpy"  # a backend that is imported fast, for scripts that do not train


def _script(text: str) -> str:
    return textwrap.dedent(text).lstrip()


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """Everything that a spawned pool trips over, in one script: it runs once, and once only."""
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import os
            import numpy as np
            import keras_mp

            print("main runs in", os.getpid())
            scale = 2.0

            class Tile:
                def __init__(self, value):
                    self.value = value

            class Scale:
                def __call__(self, tile):
                    return np.float32(tile.value * scale)

            def make(offset):
                def closure(tile):
                    return np.float32(tile.value + offset), os.getpid()
                return closure

            tiles = [Tile(value) for value in range(10)]
            print("callable", [b.tolist() for b in keras_mp.PoolDataset(tiles, Scale(), batch_size=5, workers=2)])
            print("lambda", [b.tolist() for b in keras_mp.PoolDataset(
                tiles, lambda t: t.value, batch_size=5, workers=2)])
            batches = list(keras_mp.PoolDataset(tiles, make(100), batch_size=5, workers=2))
            print("closure", [b[0].tolist() for b in batches])
            print("elsewhere", all(pid != os.getpid() for b in batches for pid in b[1]))

            class Batch:
                def __init__(self, tiles):
                    self.total = sum(t.value for t in tiles)

            print("own batch", [b.total for b in keras_mp.PoolDataset(tiles, collate=Batch, batch_size=5, workers=2)])
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    lines = output.splitlines()
    assert len([line for line in lines if line.startswith("main runs in")]) == 1
    assert lines[1:] == [
        "callable [[0.0, 2.0, 4.0, 6.0, 8.0], [10.0, 12.0, 14.0, 16.0, 18.0]]",
        "lambda [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]",
        "closure [[100.0, 101.0, 102.0, 103.0, 104.0], [105.0, 106.0, 107.0, 108.0, 109.0]]",
        "elsewhere True",
        "own batch [10, 35]",
    ]


def test_a_pydataset_in_a_script_without_a_guard(tmp_path: Path) -> None:
    """Its class travels by value, and its base class does not cost the workers keras."""
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import sys
            import keras
            import numpy as np
            import keras_mp

            class Data(keras.utils.PyDataset):
                def __init__(self, **options):
                    super().__init__(**options)
                    self.order = np.arange(32)

                def __len__(self):
                    return 4

                def __getitem__(self, index):
                    rows = self.order[index * 8:index * 8 + 8]
                    heavy = bool({"keras", "jax"} & set(sys.modules))
                    return rows[:, None].astype("float32"), np.full(8, heavy)

                def on_epoch_end(self):
                    super().on_epoch_end()
                    self.order = self.order[::-1]

            data = keras_mp.parallelize(Data(), workers=2)
            print("first", [int(batch[0][0, 0]) for batch in data])
            print("second", [int(batch[0][0, 0]) for batch in data])
            print("heavy", any(batch[1].any() for batch in data))
            model = keras.Sequential([keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            model.fit(data, epochs=2, verbose=0)
            print("trained")
            """
        ),
        KERAS_BACKEND="jax",
    )
    assert output.splitlines()[-4:] == ["first [0, 8, 16, 24]", "second [31, 23, 15, 7]", "heavy False", "trained"]


def test_a_notebook_cell() -> None:
    """A cell's code runs in a namespace called `__main__` that no file stands for."""
    cells = [
        "import numpy as np\nimport keras_mp\nfactor = 3",
        "def preprocess(x, rng):\n    return np.float32(x * factor), rng.random()",
        "with keras_mp.PoolDataset(np.arange(8), preprocess, batch_size=4, workers=1, seed=1) as data:\n"
        "    got = [batch[0].tolist() for batch in data]",
        "def preprocess(x):\n    return x + 1",
        "with keras_mp.PoolDataset(np.arange(8), preprocess, batch_size=4, workers=1) as data:\n"
        "    again = [batch.tolist() for batch in data]",
    ]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"<cell {number}>", "exec"), namespace)
    assert namespace["got"] == [[0, 3, 6, 9], [12, 15, 18, 21]]
    assert namespace["again"] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_module_beside_the_script_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_transforms.py").write_text("def double(x):\n    return x * 2\n")
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import keras_mp
            from my_transforms import double
            print([b.tolist() for b in keras_mp.PoolDataset(range(4), double, batch_size=2, workers=1)])
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    assert output == "[[0, 2], [4, 6]]\n"


def test_a_module_called_like_the_standard_librarys_does_no_harm(tmp_path: Path) -> None:
    """Workers run with -P: the folder they start in is on no search path until the parent's is."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "selectors.py").write_text("raise SystemExit('wrong module')")
    (folder / "dataclasses.py").write_text("raise SystemExit('wrong module')")
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import os
            import keras_mp
            data = keras_mp.PoolDataset(range(4), batch_size=2, workers=1)
            os.chdir("elsewhere")
            print([b.tolist() for b in data])
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    assert output == "[[0, 1], [2, 3]]\n"


def test_prints_and_logs_of_workers_are_seen(tmp_path: Path) -> None:
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import keras_mp
            def say(x):
                print("sample", x, flush=True)
                return x
            list(keras_mp.PoolDataset(range(2), say, workers=1))
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    assert output.splitlines() == ["sample 0", "sample 1"]


def test_a_script_that_ends_in_the_middle_of_an_epoch(tmp_path: Path) -> None:  # P3, P4
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import os
            import numpy as np
            import keras_mp
            data = keras_mp.PoolDataset(range(1000), lambda x: np.zeros(1000), batch_size=2, workers=2)
            it = iter(data)
            next(it)
            exported = iter(data.to_tf_dataset())
            next(exported)
            print(*data.stats()["pids"])
            """
        ),
    )
    assert len(output.split()) == 2  # that they are gone is what the leak fixture checks


def test_importing_loads_no_framework() -> None:
    code = (
        "import sys, keras_mp; keras_mp.WorkerPool; keras_mp.empty(3); dir(keras_mp)\n"
        "print(sorted({'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env={"PYTHONPATH": python_path(), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    times = re.findall(r"^import time: +\d+ \| +(\d+) \| +(.*)$", done.stderr, re.MULTILINE)
    assert any(name.strip() == "keras_mp" for _, name in times)
    assert not any(name.strip().split(".")[0] in ("keras", "tensorflow") for _, name in times)


def test_the_public_names() -> None:
    import types

    assert set(keras_mp.__all__) <= set(dir(keras_mp))
    for name in keras_mp.__all__:
        assert not isinstance(getattr(keras_mp, name), types.ModuleType)
    with pytest.raises(AttributeError, match="module 'keras_mp' has no attribute 'absent'"):
        keras_mp.absent  # noqa: B018
    errors = [keras_mp.SampleError, keras_mp.WorkerCrashed, keras_mp.BatchTimeout]
    assert all(issubclass(e, keras_mp.KerasMPError) for e in [*errors, keras_mp.TooManyFailures, keras_mp.PoolClosed])


def test_a_dataset_in_a_child_process(tmp_path: Path) -> None:
    """A copy of a dataset in another process: usable where it was pickled, a clear error where it was forked."""
    output = run_script(
        tmp_path / "train.py",
        _script(
            """
            import multiprocessing
            import warnings
            import keras_mp

            def use(data):
                data.set_epoch(1)  # the fork has a copy of what was read ahead in epoch 0
                try:
                    print("child", data[1].tolist(), flush=True)
                except keras_mp.PoolClosed as error:
                    print("child", str(error).split(";")[1].strip(), flush=True)

            if __name__ == "__main__":
                warnings.simplefilter("ignore")  # newer Pythons warn of forks with threads
                data = keras_mp.PoolDataset(range(4), batch_size=2, workers=1)
                print("parent", data[0].tolist(), flush=True)
                for method in "fork", "spawn":
                    child = multiprocessing.get_context(method).Process(target=use, args=(data,))
                    child.start()
                    child.join()
                print("parent", data[1].tolist(), flush=True)
            """
        ),
        KERAS_BACKEND=_LIGHT,
    )
    assert output.splitlines() == [
        "parent [0, 1]",
        "child make the dataset in the forked process, or give it workers=0",
        "child [2, 3]",
        "parent [2, 3]",
    ]


def test_numbers_are_the_same_in_a_new_process(tmp_path: Path) -> None:  # P2
    code = _script(
        """
        import numpy as np
        import keras_mp

        def draw(x, rng):
            return rng.random() + np.random.rand()

        data = keras_mp.PoolDataset(range(6), draw, batch_size=2, shuffle=True, seed=7, workers=2)
        drawn = [batch.tolist() for _ in range(2) for batch in data]
        """
    )
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(code, namespace)
    namespace.pop("data").close()
    assert run_script(tmp_path / "draw.py", code + "print(drawn)\n", KERAS_BACKEND=_LIGHT) == f"{namespace['drawn']}\n"
