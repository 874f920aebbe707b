"""Streams drawn by chance, gone through with looks and interruptions, whatever becomes of the workers (P1, P2)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

import keras_mp
from tests.episodes import Mismatch
from tests.shards import Numbers, NumbersFrom, stream

_EPOCHS = 3


def run_stream(rng: random.Random, pools: Mapping[int, keras_mp.WorkerPool]) -> int:
    """Goes through a few epochs of a stream; how many.

    Raises:
        Mismatch: a batch is not what a process without workers makes of the same stream.
    """
    lengths = [rng.choice([0, rng.randrange(30)]) for _ in range(rng.randint(1, 12))] + [5]
    options: dict[str, Any] = {
        "read": rng.choice([Numbers, NumbersFrom])(lengths),
        "lanes": rng.randint(1, 7),
        "batch_size": rng.randint(1, 8),
        "shuffle": rng.choice([0, 1, 4, 40]),
        "length": rng.choice([None, sum(lengths)]),
        "seed": rng.randrange(100),
    }
    with stream(**options) as reference:
        expected = [list(reference) for _ in range(_EPOCHS)]
    epoch, state = 0, None
    while epoch < _EPOCHS:
        with stream(**options, pool=pools[rng.choice(list(pools))]) as data:
            if state is not None:
                data.load_state_dict(state)
            epoch, state = _go_on(data, expected, rng)
    return _EPOCHS


def _go_on(data: Any, expected: list[list[Any]], rng: random.Random) -> tuple[int, Any]:
    """Goes on from where the dataset is, maybe not to the end; the epoch then, and the state."""
    while (epoch := data.epoch) < len(expected):
        position = start = data.state_dict()["position"]
        for batch in data:
            _compare(batch, expected[epoch], position, epoch)
            position += 1
            draw = rng.random()
            if draw < 0.05 and data.epoch == epoch:  # with the last batch of a known length, the next epoch begins
                number = rng.randrange(start, len(expected[epoch]))
                _compare(data[number - start], expected[epoch], number, epoch)
            elif draw < 0.1:
                state = json.loads(json.dumps(data.state_dict()))
                return state["epoch"], state
        if position != len(expected[epoch]):
            raise Mismatch(f"epoch {epoch} of a stream ended after {position} of {len(expected[epoch])} batches")
    return data.epoch, None


def _compare(batch: Any, expected: list[Any], number: int, epoch: int) -> None:
    if number >= len(expected) or not np.array_equal(batch, expected[number]):
        raise Mismatch(f"batch {number} of epoch {epoch} of a stream differs")
