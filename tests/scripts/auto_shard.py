"""One of two JAX processes among which Keras (3.16 on) divides the data; prints what the model was trained on.

As in `consumed.py`, the change of the weights over a step says which samples it saw: here those of both processes.
"""

# ruff: noqa: E402  # JAX must know of the other process before Keras is imported

from __future__ import annotations

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"

import jax

rank, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)

import keras
import numpy as np

from tests.scripts import consumed

keras.utils.set_random_seed(1)
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=how != "by-hand"))
model = consumed.model()
census = consumed.Census()
with consumed.dataset(shuffle=how != "plain", workers=1) as whole:
    train = whole.shard(2, rank) if how in ("by-hand", "twice") else whole
    try:
        model.fit(train, epochs=3, verbose=0, callbacks=[census])
    except ValueError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
    else:
        expected = consumed.dataset(shuffle=how != "plain", workers=0, batch_size=2 * consumed.BATCH)
        plain = [[sorted(np.argmax(x, axis=1).tolist()) for x, _ in expected] for _ in range(3)]
        print(json.dumps({"trained": census.epochs, "plain": plain, "epoch": train.epoch}), flush=True)
    train.close()
