"""One of two JAX processes among which Keras (3.16 on) divides the data; prints what the model was trained on.

As in `consumed.py`, the change of the weights over a step says which samples it saw: here those of both processes.
"""

# ruff: noqa: E402  # JAX must know of the other process before Keras is imported

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"

import jax

rank, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)

import keras
import numpy as np

import keras_mp
from tests.scripts import consumed


def stream(**options: Any) -> keras_mp.StreamDataset:
    """The same samples as `consumed.dataset`'s, from eight shards."""
    return keras_mp.StreamDataset(
        [range(shard, consumed.SAMPLES, 8) for shard in range(8)],
        iter,
        consumed.one_hot,
        **{"batch_size": consumed.BATCH, "lanes": 4, "shuffle": 3, "seed": 7, "length": consumed.SAMPLES, **options},
    )


keras.utils.set_random_seed(1)
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=not how.endswith("by-hand")))
model = consumed.model()
census = consumed.Census()
if how == "stream-steps":
    whole = stream(workers=1, length=None)
elif how.startswith("stream"):
    whole = stream(workers=1)
else:
    whole = consumed.dataset(shuffle=how != "plain", workers=1)
with whole:
    train = whole.shard(2, rank) if how == "twice" or how.endswith("by-hand") else whole
    try:
        model.fit(train, epochs=3, steps_per_epoch=3 if how == "stream-steps" else None, verbose=0, callbacks=[census])
    except ValueError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
    else:
        if how.startswith("stream"):
            parts = [stream(workers=0).shard(2, number) for number in range(2)]
            plain = [
                [sorted(np.argmax([*x, *y], axis=1).tolist()) for (x, _), (y, _) in zip(*parts, strict=True)]
                for _ in range(3)
            ]
        else:
            expected = consumed.dataset(shuffle=how != "plain", workers=0, batch_size=2 * consumed.BATCH)
            plain = [[sorted(np.argmax(x, axis=1).tolist()) for x, _ in expected] for _ in range(3)]
        print(json.dumps({"trained": census.epochs, "plain": plain, "epoch": train.epoch}), flush=True)
    train.close()
