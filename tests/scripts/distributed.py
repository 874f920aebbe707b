"""Trains one small model on one device and on two, or as one worker of a cluster; prints weights as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

DATA = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")


def target(row: Any) -> tuple[Any, Any]:
    return row, row.sum(keepdims=True)


def build() -> Any:
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def flat(model: Any) -> list[float]:
    return [float(value) for array in model.get_weights() for value in array.ravel()]


def fitted(model: Any) -> list[float]:
    import keras_mp

    with keras_mp.PoolDataset(DATA, target, batch_size=8, shuffle=True, seed=1, workers=2) as train:
        model.fit(train, epochs=2, verbose=0, shuffle=False)
    return flat(model)


def mirrored() -> dict[str, Any]:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    one = fitted(build())
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = build()
    return {"one": one, "two": fitted(model), "replicas": strategy.num_replicas_in_sync}


def data_parallel() -> dict[str, Any]:
    import keras

    one = fitted(build())
    devices = keras.distribution.list_devices()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    return {"one": one, "two": fitted(build()), "replicas": len(devices)}


def worker() -> dict[str, Any]:
    """One process of a MultiWorkerMirroredStrategy, or with no TF_CONFIG the only one.

    Keras 3 has no `fit` under this strategy, so the loop is TensorFlow's own.
    """
    import tensorflow as tf

    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if config else tf.distribute.get_strategy()
    import keras

    import keras_mp

    with strategy.scope():
        model = build()
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
    processes = len(config["cluster"]["worker"]) if config else 1
    train = keras_mp.PoolDataset(DATA, target, batch_size=8 // processes, shuffle=True, seed=1, workers=2)
    if config:
        train = train.shard()  # by TF_CONFIG
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    export = train.to_tf_dataset().with_options(options)
    batches = strategy.distribute_datasets_from_function(lambda context: export)

    def replica(batch: Any) -> None:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2) / strategy.num_replicas_in_sync
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    step = tf.function(lambda batch: strategy.run(replica, args=(batch,)))

    for _ in range(2):
        for batch in batches:
            step(batch)
    train.close()
    return {"weights": flat(model)}


if __name__ == "__main__":
    print(json.dumps({"mirrored": mirrored, "data_parallel": data_parallel, "worker": worker}[sys.argv[1]]()))
