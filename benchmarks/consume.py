"""The two consumers, a plain loop and Keras's `fit`: both read one value of every leaf of every batch."""

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from benchmarks import memory
from benchmarks.loaders import Feed
from benchmarks.work import touch


class Recorder:
    """A time stamp per batch; sums, processor time and memory where they are wanted."""

    def __init__(self, batches: int, sample_memory_at: int | None) -> None:
        self.batches = batches
        self.times: list[float] = []
        self.cpu: list[float] = []  # at each end of an epoch
        self.sums: list[float] = []
        self.usage: memory.Usage | None = None
        self._sample_memory_at = sample_memory_at
        self._sum = 0.0

    def mark(self, touched: float) -> None:
        self.times.append(time.perf_counter())
        self._sum += touched
        if len(self.times) == self._sample_memory_at:
            self.usage = memory.measure()
        if len(self.times) % self.batches == 0:
            self.cpu.append(time.process_time())
            self.sums.append(self._sum)
            self._sum = 0.0


def loop(feed: Feed, epochs: int, recorder: Recorder) -> None:
    """Iterate `epochs` times, or once over a feed that holds all epochs."""
    for _ in range(1 if feed.spans_epochs else epochs):
        for batch in feed.data:
            recorder.mark(touch(batch))


class Fitter:
    """Runs `fit` with a train step that sums what it touches and sleeps `step_s`, as an accelerator would."""

    def __init__(self, example: Any, step_s: float) -> None:
        """`example` is a batch like those to come: the step is traced on it before any clock starts."""
        import keras

        self._model = _touching_model(step_s)
        self._repeated = _repeat(keras.utils.PyDataset, example)
        self._model.fit(self._repeated(2), shuffle=False, verbose=0)

    def fit(self, feed: Feed, epochs: int, recorder: Recorder) -> None:
        import keras

        model = self._model
        steps = recorder.batches if feed.spans_epochs else None
        seen = [float(model.total.numpy())]

        class Marks(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                recorder.mark(0.0)

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                seen.append(float(model.total.numpy()))

        model.fit(feed.data, epochs=epochs, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[Marks()])
        recorder.sums = [after - before for before, after in pairwise(seen)]

    def epoch_from_memory_s(self, batches: int) -> float:
        """Seconds of an epoch of `fit` that never waits: one batch in memory, again and again."""
        recorder = Recorder(batches, None)
        begin = time.perf_counter()
        self.fit(Feed(self._repeated(batches)), 1, recorder)
        return recorder.times[-1] - begin


def _repeat(base: Any, example: Any) -> Callable[[int], Iterable[Any]]:
    class Repeated(base):
        def __init__(self, batches: int) -> None:
            super().__init__()
            self._batches = batches

        def __len__(self) -> int:
            return self._batches

        def __getitem__(self, index: int) -> Any:
            return example

    return Repeated


def _touching_model(step_s: float) -> Any:
    import keras

    if keras.backend.backend() != "tensorflow":
        raise SystemExit("the fit consumer needs KERAS_BACKEND=tensorflow; `ours-iter` runs on any backend")
    import tensorflow as tf

    def accelerate() -> None:
        time.sleep(step_s)

    class Touch(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.total = tf.Variable(0.0, dtype=tf.float64, trainable=False)

        def train_step(self, data: Any) -> dict[str, Any]:
            firsts = [tf.cast(tf.reshape(leaf, [-1])[0], tf.float64) for leaf in tf.nest.flatten(data)]
            touched = tf.add_n(firsts)
            self.total.assign_add(touched)
            if step_s:
                tf.numpy_function(accelerate, [], [])
            return {"touched": touched}

    model = Touch()
    model.compile()
    return model
