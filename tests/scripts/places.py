"""One of two processes that train together, on the shard that `shard()` finds; prints what was trained on, as JSON.

    python places.py jax|torch RANK PORT

On JAX Keras spreads each step over both processes; on torch, where Keras has no distribution of its own, the loop is
torch's, with `DistributedDataParallel`. As in `consumed.py`, the change of the weights over a step says which samples
it saw: here those of both processes.
"""

# ruff: noqa: E402  # JAX must know of the other process before Keras is imported

from __future__ import annotations

import json
import os
import sys
from typing import Any

backend, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.environ["KERAS_BACKEND"] = backend
os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
if backend == "jax":
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
else:
    import torch

    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)

import keras
import numpy as np

from tests.scripts import consumed

EPOCHS = 2


def fitted_on_jax(train: Any) -> list[list[list[int]]]:
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    census = consumed.Census()
    consumed.model().fit(train, epochs=EPOCHS, verbose=0, callbacks=[census])
    return census.epochs


def looped_on_torch(train: Any) -> list[list[list[int]]]:
    model = consumed.model()
    model.build((None, consumed.SAMPLES))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=2.0)  # the mean over two processes is half the sum
    epochs: list[list[list[int]]] = []
    before = np.zeros(consumed.SAMPLES)
    for _ in range(EPOCHS):
        epochs.append([])
        for x, _ in train:
            optimizer.zero_grad()
            parallel(torch.from_numpy(x)).sum().backward()
            optimizer.step()
            now = model.get_weights()[0][:, 0]
            epochs[-1].append(np.repeat(np.arange(consumed.SAMPLES), np.rint(before - now).astype(int)).tolist())
            before = now
    return epochs


with consumed.dataset(workers=1) as whole, whole.shard() as train:
    own = [sorted(int(np.argmax(row)) for x, _ in train for row in x) for _ in range(EPOCHS)]
    train.set_epoch(0)
    trained = fitted_on_jax(train) if backend == "jax" else looped_on_torch(train)
    print(json.dumps({"own": own, "trained": trained, "steps": len(train), "shard": repr(train)}), flush=True)
if backend == "torch":
    torch.distributed.destroy_process_group()
