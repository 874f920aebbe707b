"""Keras's own division of data among processes, from 3.16 on: it asks each process for every n-th number of a pass.

A process gets the batches of its shard for them, of which each process has as many.
"""

from __future__ import annotations

import keras

from keras_mp.plan.batching import Batching


def share_of(plan: Batching, seed_is_drawn: bool) -> tuple[int, Batching]:
    """Among how many processes Keras divides `plan`, and this process's share of it.

    Args:
        plan: of the whole dataset.
        seed_is_drawn: whether its seed is none of the user's, so another in each process.

    Raises:
        ValueError: it cannot be divided; the message names the way out.
    """
    distribution = keras.distribution.distribution()
    if not getattr(distribution, "auto_shard_dataset", False):
        return 1, plan
    shards, index = getattr(distribution, "num_data_shards", 1), getattr(distribution, "data_shard_id", 0)
    if shards == 1 or plan.is_endless:
        return shards, plan
    if plan.num_shards > 1:
        raise ValueError(
            f"this dataset is shard {plan.shard} of {plan.num_shards}, and Keras divides it once more among {shards} "
            "processes, so most of the data would never be seen; make the keras.distribution object with "
            "auto_shard_dataset=False, or leave out dataset.shard()"
        )
    if seed_is_drawn and plan.is_ordered:
        raise ValueError(
            f"Keras divides this dataset among {shards} processes, which must all shuffle it alike; received "
            "seed=None, so pass the same seed= in each"
        )
    return shards, plan.for_shard(shards, index)
