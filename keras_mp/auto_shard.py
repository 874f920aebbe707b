"""How data is divided among processes that train together: by Keras itself, or by `shard()`, which asks who is who.

Keras's own division, from 3.16 on, asks each process for every n-th number of a pass. A process gets the batches of its
shard for them, of which each process has as many.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import keras

from keras_mp.checks import check_count
from keras_mp.errors import short_repr
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


def checked_place(num_shards: int | None, index: int | None) -> tuple[int, int]:
    """Among how many processes this one trains, and its number: as the user says, or as is found.

    Raises:
        TypeError, ValueError: one of them is missing, or out of range; or nothing is found.
    """
    if num_shards is None and index is None:
        return find_place()
    if num_shards is None or index is None:
        raise TypeError(f"shard() needs both num_shards and index, or none of them, got {num_shards=}, {index=}")
    num_shards, index = check_count(num_shards, "num_shards"), check_count(index, "index", 0)
    if index >= num_shards:
        raise ValueError(f"index must be below num_shards={num_shards}, got {index}")
    return num_shards, index


def find_place() -> tuple[int, int]:
    """Among how many processes this one trains, and its number, from 0. Imports no framework.

    Raises:
        ValueError: nothing says so, or what does cannot be used; the message names what was looked at.
    """
    places: dict[str, Callable[[], tuple[int, int] | None]] = {
        "Keras's distribution": _place_in_distribution,
        "TF_CONFIG": _place_in_tf_config,
        "JAX": _place_in_jax,
        "torch.distributed": _place_in_torch,
    }
    for find in places.values():
        if (found := find()) is not None:
            return found
    raise ValueError(
        "shard() found nothing that says which of several processes this is. It looked for a keras.distribution with "
        "num_data_shards, the environment variable TF_CONFIG, jax.distributed.initialize() (jax.process_index()), and "
        "torch.distributed.init_process_group() (get_rank()); call it after one of these is set up, or pass "
        "shard(num_shards, index)"
    )


def _place_in_distribution() -> tuple[int, int] | None:
    distribution = keras.distribution.distribution()
    shards = getattr(distribution, "num_data_shards", None)
    return None if shards is None else (int(shards), int(getattr(distribution, "data_shard_id", 0)))


def _place_in_tf_config() -> tuple[int, int] | None:
    text = os.environ.get("TF_CONFIG")
    if not text:
        return None
    try:
        config: dict[str, Any] = json.loads(text)
        kind, number = str(config["task"]["type"]), int(config["task"]["index"])
        counts = {name: len(addresses) for name, addresses in config["cluster"].items()}
        chiefs, workers = counts.get("chief", 0), counts.get("worker", 0)
        first = {"chief": 0, "worker": chiefs}[kind]
        if not 0 <= number < counts[kind]:
            raise ValueError(f"task index {number} of {counts[kind]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"shard() found TF_CONFIG={short_repr(text)}, which does not say which worker this is ({error!r}): it "
            "needs a cluster of workers (and a chief), and a task whose type is one of these; or pass "
            "shard(num_shards, index)"
        ) from error
    return chiefs + workers, first + number


def _place_in_jax() -> tuple[int, int] | None:
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    initialized = getattr(jax.distributed, "is_initialized", lambda: False)()
    if not initialized and keras.backend.backend() != "jax":
        return None  # asking would have JAX take the devices
    count = int(jax.process_count())
    return (count, int(jax.process_index())) if initialized or count > 1 else None


def _place_in_torch() -> tuple[int, int] | None:
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_world_size()), int(distributed.get_rank())
