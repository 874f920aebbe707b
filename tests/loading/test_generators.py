"""Generators that the dataset's code holds draw the same wherever it runs, and differ from sample to sample (P2)."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import keras_mp
from tests import drawing
from tests.support import run_script

_LEGACY = np.random.RandomState(np.random.PCG64(7))
_THREADS = {"workers": 3, "use_multiprocessing": False}


def _samples(transform: Any) -> Callable[..., Any]:
    return lambda **options: keras_mp.PoolDataset(range(24), transform, batch_size=2, seed=5, **options)


_CASES: dict[str, Callable[[], Callable[..., Any]]] = {
    "attributes": lambda: _samples(drawing.Holder()),
    "slot": lambda: _samples(drawing.Slotted()),
    "globals": lambda: _samples(drawing.from_the_module),
    "default": lambda: _samples(drawing.by_default),
    "partial": lambda: _samples(
        functools.partial(
            drawing.with_argument, np.random.default_rng(7), other=np.random.RandomState(np.random.PCG64(7))
        )
    ),
    "method": lambda: _samples(drawing.Holder().__call__),
    "closure": lambda: _samples(drawing.closure()),
    "source": lambda: functools.partial(keras_mp.PoolDataset, drawing.Source(), batch_size=2, seed=5),
    "collate": lambda: functools.partial(
        keras_mp.PoolDataset,
        range(24),
        collate=functools.partial(drawing.stack_with_noise, np.random.default_rng(7), other=random.Random(7)),
        batch_size=2,
        seed=5,
    ),
    "batches": lambda: functools.partial(keras_mp.parallelize, drawing.Batches(), seed=5),
}


def _epochs(make: Callable[..., Any], **options: Any) -> list[Any]:
    with make(**options) as train:
        return [np.stack([np.asarray(batch, dtype=np.float64) for batch in train]) for _ in range(2)]


@pytest.mark.parametrize("case", _CASES)
def test_the_same_draws_wherever_they_are_made(case: str, running_pool: keras_mp.WorkerPool) -> None:
    reference = _epochs(_CASES[case](), workers=0)
    np.testing.assert_array_equal(reference, _epochs(_CASES[case](), pool=running_pool))
    np.testing.assert_array_equal(reference, _epochs(_CASES[case](), **_THREADS))
    drawn = np.concatenate([epoch.reshape(-1, epoch.shape[-1])[:, 1:].ravel() for epoch in reference])
    assert len(np.unique(drawn)) == len(drawn)  # no stream is another's


def test_an_executor_draws_them_too(processes: concurrent.futures.Executor) -> None:
    reference = _epochs(_samples(drawing.Holder()), workers=0)
    np.testing.assert_array_equal(reference, _epochs(_samples(drawing.Holder()), pool=processes))


@pytest.mark.parametrize("options", [{"workers": 0}, _THREADS])
def test_they_are_left_as_they_were(options: dict[str, Any]) -> None:
    holder, untouched = drawing.Holder(), drawing.Holder()
    state = copy.deepcopy(drawing.Holder.shared.get_state())
    _epochs(_samples(holder), **options)
    assert np.array_equal(holder(0)[:-1], untouched(0)[:-1])
    drawing.Holder.shared.set_state(state)


def test_a_script_s_own_generators_and_a_module_s(tmp_path: Path) -> None:
    """What `__main__` defines travels by value, with the globals that its functions name."""
    (tmp_path / "helper.py").write_text("import numpy as np\nrng = np.random.default_rng(7)\n")
    code = """
        import keras_mp, numpy as np, helper
        rng, legacy = np.random.default_rng(7), np.random.RandomState(7)
        class Noise:
            def __call__(self, value):
                return np.array([value, rng.random(), legacy.rand(), helper.rng.random()])
        def epoch(**options):
            with keras_mp.PoolDataset(range(24), Noise(), batch_size=2, seed=5, **options) as train:
                return np.concatenate(list(train))
        if __name__ == "__main__":
            reference = epoch(workers=0)
            for options in {"workers": 1}, {"workers": 3}, {"workers": 3, "use_multiprocessing": False}:
                assert np.array_equal(reference, epoch(**options)), options
            assert len(np.unique(reference[:, 1:])) == 72
    """
    run_script(tmp_path / "script.py", "\n".join(line[8:] for line in code.splitlines()))


@pytest.mark.parametrize("where", ["at the top", "in the function"])
def test_torch_s_global_generator(where: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    top, inside = ("import torch", "pass") if where == "at the top" else ("", "import torch")
    code = f"""
        import keras_mp, numpy as np
        {top}
        def noise(value):
            {inside}
            return np.array([value, torch.rand(()).item(), torch.randn(()).item()])
        def epoch(**options):
            with keras_mp.PoolDataset(range(24), noise, batch_size=2, seed=5, **options) as train:
                return np.concatenate(list(train))
        if __name__ == "__main__":
            reference = epoch(workers=0)
            import torch
            before = torch.get_rng_state()
            threads = {{"workers": 3, "use_multiprocessing": False}}
            for options in {{"workers": 0}}, {{"workers": 1}}, {{"workers": 3}}, threads:
                assert np.array_equal(reference, epoch(**options)), options
            assert len(np.unique(reference[:, 1:])) == 48
            assert torch.equal(before, torch.get_rng_state())
    """
    run_script(tmp_path / "script.py", "\n".join(line[8:] for line in code.splitlines()))


def test_what_cannot_be_searched_does_no_harm() -> None:
    class Hostile:
        """Knows no attribute, and is a cycle."""

        def __init__(self) -> None:
            self.me = self

        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

        def __call__(self, value: Any) -> Any:
            return value

    cycle: list[Any] = []
    cycle.append(cycle)
    transform = functools.partial(lambda value, **_: value, hostile=Hostile(), cycle=cycle)
    with keras_mp.PoolDataset(range(4), transform, batch_size=4, workers=0) as train:
        assert [batch.tolist() for batch in train] == [[0, 1, 2, 3]]


def test_code_made_by_cython_is_searched_as_any_other(tmp_path: Path) -> None:
    """The class of Cython's functions, which h5py's classes hold, has a descriptor as its `__module__`."""
    path = tmp_path / "numbers.h5"
    with h5py.File(path, "w") as file:
        file["numbers"] = np.arange(8)

    def read(index: int) -> Any:
        with h5py.File(path) as file:
            return file["numbers"][index]

    with keras_mp.PoolDataset(range(8), read, batch_size=8, workers=0) as train:
        np.testing.assert_array_equal(train[0], np.arange(8))
