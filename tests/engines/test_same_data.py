"""P2 in one table: whoever loads, however it is consumed, and whatever dies on the way, the data is the same."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.consumers import exported, fitted, iterated, seeded
from tests.transforms import Augmented

_LOADERS: dict[str, dict[str, Any]] = {
    "in-process": {"workers": 0},
    "1 process": {"workers": 1},
    "2 processes": {"workers": 2},
    "5 processes": {"workers": 5},
    "1 thread": {"workers": 1, "use_multiprocessing": False},
    "5 threads": {"workers": 5, "use_multiprocessing": False},
    "keras": {"workers": 2, "pool": "keras"},
}


def global_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tobytes()


def digest(loader: dict[str, Any], consume: Any, flag: Path | None = None) -> str:
    state = global_state()
    batches = seeded(consume, Augmented(flag), **loader)
    assert global_state() == state  # the user's own randomness is untouched
    return hashlib.sha256(b"".join(batch.tobytes() for batch in batches)).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def reference() -> str:
    digest(_LOADERS["keras"], fitted)  # opens a queue that Keras keeps for the life of the process
    return digest(_LOADERS["in-process"], iterated)


@pytest.mark.parametrize("consume", [iterated, fitted, exported])
@pytest.mark.parametrize("loader", _LOADERS)
def test_undisturbed(loader: str, consume: Any, reference: str) -> None:
    assert digest(_LOADERS[loader], consume) == reference


@pytest.mark.parametrize("consume", [iterated, fitted, exported])
@pytest.mark.parametrize("loader", ["1 process", "2 processes", "5 processes"])
def test_with_a_worker_killed_in_the_middle_of_a_batch(
    loader: str, consume: Any, reference: str, tmp_path: Path
) -> None:
    flag = tmp_path / "killed"
    assert digest(_LOADERS[loader], consume, flag) == reference
    assert flag.exists()


def test_other_seeds_and_epochs_give_other_data(reference: str) -> None:
    def shifted(dataset: Any) -> Iterator[Any]:
        dataset.set_epoch(1)
        return iterated(dataset)

    assert digest(_LOADERS["in-process"], shifted) != reference
