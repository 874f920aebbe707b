"""Lengths of all samples, evaluated by the workers of the dataset that they are for, before it can have a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from keras_mp.engines.choice import EngineChoice
from keras_mp.engines.readahead import NONE_AHEAD, Limit, ReadAhead
from keras_mp.loading.lengths import LengthLoader
from keras_mp.plan.batching import Batching
from keras_mp.plan.shuffle import Indices

# A length is quickly told or takes a file's opening: of some hundred a batch, neither asking nor waiting costs much.
_BATCH = 256
_DEPTH_PER_WORKER = 4


def measure_lengths(
    function: Callable[[int], int], count: int, choice: EngineChoice, seed: int, retries: int, batch_size: int = _BATCH
) -> Indices:
    """Evaluates `function(index)` once for each sample.

    Args:
        function: the user's, from a sample's index to its length.
        count: samples in the source.
        choice: where it is evaluated.
        seed: for a function that draws random numbers.
        retries: how often a sample that fails is tried again.
        batch_size: how many are evaluated by one worker without a word.

    Returns:
        The lengths: int64, shape (count,).

    Raises:
        SampleError: the function failed, or returned something else than a whole number from 0.
        KerasMPError: it cannot be sent to the workers, or ended them.
    """
    plan = Batching(count, batch_size)
    running = dataclasses.replace(choice, timeout_s=None).start(LengthLoader(function, seed, retries))
    requests = (plan.request(0, batch) for batch in range(plan.num_batches))
    depth = _DEPTH_PER_WORKER * max(1, choice.workers)
    limit = NONE_AHEAD if choice.is_inline else Limit(depth, depth, depth * batch_size * 8)
    ahead = ReadAhead(running.engine, requests, limit)
    try:
        ahead.start()
        return np.concatenate([ahead.next().batch for _ in range(plan.num_batches)])
    finally:
        ahead.close()
        running.close()
