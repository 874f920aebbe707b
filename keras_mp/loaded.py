"""What a user can do with a dataset besides training on it: shards, states, export, numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from keras_mp import checks
from keras_mp.auto_shard import checked_place
from keras_mp.bridge import Bridge
from keras_mp.errors import SampleFailure, short_repr
from keras_mp.loading.batch_loader import BatchLoader
from keras_mp.loading.inspection import inspecting
from keras_mp.looks import others, requests_of
from keras_mp.plan.position import Position
from keras_mp.plan.progress import Progress
from keras_mp.plan.state import check_version, dump_state, load_state
from keras_mp.report.footprint import Footprint
from keras_mp.report.report import Report
from keras_mp.stats import KERAS_POOL, HandedOut, Stats, Training
from keras_mp.trace import MAX_EVENTS, Trace

if TYPE_CHECKING:
    import tensorflow as tf


class LoadedDataset(Bridge):
    """What `PoolDataset` and the result of `parallelize` have in common."""

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the current one; `dataset[i]`, the next iteration and the next pass of Keras are its batches.

        A pass or an iteration that is under way goes on with its own.

        Args:
            epoch: epoch number, from 0.
        """
        epoch = checks.check_count(epoch, "epoch", 0)
        with self._lock:
            before = self._position.epoch
            self._position.set_epoch(epoch)
            if self._prefetch.expected is not None:
                self._prefetch.drop()
            self._prefetch.drop_looks()
        self._failures.warn(before)

    # -- going on elsewhere --------------------------------------------------------------------------------------

    def shard(self, num_shards: int | None = None, index: int | None = None) -> Self:
        """This process's part of the dataset, for data-parallel training.

        Shards are disjoint, cover every epoch, and have the same number of batches; see `batching` for which samples go
        where. `batch_size` is the size on each shard.

        Args:
            num_shards: number of parts. None, together with `index`: as many as there are processes that train
                together, as Keras's distribution, `TF_CONFIG`, JAX or `torch.distributed` say.
            index: which one, from 0.

        Raises:
            TypeError: one of them is missing.
            ValueError: the index is out of range, the samples cannot be divided into so many parts, or, without
                arguments, nothing says which process this is.
        """
        num_shards, index = checked_place(num_shards, index)
        self._refuse_endless("shard()")
        return self._part(self._plan.for_shard(num_shards, index))

    def state_dict(self) -> dict[str, Any]:
        """Where in its epochs the dataset is: plain numbers of constant size, fit for JSON.

        What counts is what was handed out: by an iteration (also inside its loop), an export or a pass of Keras. In
        `fit` on TensorFlow and in an export that runs ahead of what the model was trained on;
        `keras_mp.BackupAndRestore` knows the difference for `fit(dataset)`.
        """
        self._refuse_endless("state_dict()")
        with self._lock:
            return self.state_of(self._position.current)

    def state_of(self, progress: Progress) -> dict[str, Any]:
        """The state of a dataset that has come as far as `progress`."""
        return dump_state(progress, self._position.plan, type(self._loader).__name__, self._position.batch_seed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state_dict()` was taken: the current epoch is then what was left of that one.

        Iteration, `dataset[i]`, `len(dataset)`, the next pass of Keras and an export made now give the batches that
        had not been handed out, bit for bit, whatever the number of workers. The epoch after that is whole again.
        A dataset made with `seed=None` takes the seed of the state. An iteration that is under way raises
        `RuntimeError` when it is asked for its next batch.

        Args:
            state: what `state_dict()` returned, for a dataset of the same source, seed and batches.

        Raises:
            ValueError: it is of another dataset or version; the message says which number differs.
        """
        self._refuse_endless("load_state_dict()")
        check_version(state)
        with self._lock:
            if self._seed_is_drawn and "seed" in state:
                self._reseed(checks.check_count(state["seed"], "seed", 0))
            progress = load_state(state, self._position.plan, type(self._loader).__name__)
            self._position.move(progress)
            self._position.batch_seed = state.get("batch_seed")
            self._prefetch.drop()

    def _reseed(self, seed: int) -> None:
        self._loader = dataclasses.replace(self._loader, seed=seed)  # type: ignore[type-var]  # both loaders are dataclasses
        self._plan = dataclasses.replace(self._plan, seed=seed)
        self._position.use(dataclasses.replace(self._position.plan, seed=seed))
        self._seed_is_drawn = False
        self._send_changes()

    def _refuse_endless(self, what: str) -> None:
        if self._plan.is_endless:
            raise TypeError(
                f"{what} has no meaning for a dataset that never ends (num_batches=None): it has no epoch to divide or "
                "to go on with"
            )

    # -- for the command line ------------------------------------------------------------------------------------

    @property
    def is_endless(self) -> bool:
        """Whether it has no last batch."""
        return self._plan.is_endless

    @property
    def unit(self) -> Literal["sample", "batch"]:
        """What its source is made of."""
        return "batch" if isinstance(self._loader, BatchLoader) else "sample"

    @property
    def samples_per_epoch(self) -> int:
        """How many samples (batches, of `parallelize`) an epoch has."""
        return self._plan.epoch_length

    def samples_of(self, batch: int) -> list[int]:
        """Source indices of the samples of `batch` of the current epoch, in order."""
        return [int(index) for index in self._plan.samples(self.epoch, batch)]

    def with_workers(self, workers: int | None) -> Self:
        """A dataset like this one, on this number of workers of its own instead of its `workers` and `pool`.

        Args:
            workers: as for `PoolDataset`.

        Raises:
            TypeError, ValueError: it is not None or a whole number from 0 to 4096.
        """
        return self._part(self._plan, self._choice.with_workers(workers))

    def inspection(self, sample: int | None = None, timeout: float | None = None) -> Self:
        """A dataset whose batches say what is found in this one's: each is a list of `Inspected`.

        In an epoch each sample of the source comes once, in order, whatever `order`, `drop_remainder` and shards leave
        out, in batches of the same size and made by the same code. Code that fails does not end it: that is recorded.

        Args:
            sample: how many samples (batches, of `parallelize`) to draw from it by chance in each epoch; None: all.
            timeout: seconds that one batch may take in a worker process; None: as in this dataset.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or out of range, or a dataset that never ends is to
                be inspected whole.
        """
        if sample is None:
            self._refuse_endless("inspection() without sample=")
        else:
            sample = checks.check_count(sample, "sample")
        copied = self._part(self._plan.once(sample), self._choice.with_timeout(timeout))
        copied._loader = inspecting(self._loader)
        return copied

    # -- export --------------------------------------------------------------------------------------------------

    def to_tf_dataset(self, epochs: int = 1, prefetch: int | None = None, element_spec: Any = None) -> tf.data.Dataset:
        """The same batches as a `tf.data.Dataset`, loaded ahead by the same workers and not copied.

        Each iteration of the result is a new epoch of this dataset (or `epochs` of them one after the other, the next
        one loading while the last batches of the one before are consumed). Its cardinality is known, but for streams
        of unknown length.

        tf.data's autotuning is off in the result: nothing in it is to be tuned, and the tuner can hold up the end of an
        epoch (docs/speed.md). A pipeline of your own behind it may switch it on again by `with_options`.

        Args:
            epochs: epochs in one iteration.
            prefetch: batches that tf.data keeps ready besides those this dataset loads ahead (of small ones up to eight
                more); None: `tf.data.AUTOTUNE`.
            element_spec: nest of `tf.TensorSpec`; None: taken from two batches (docs/variable-lengths.md). Axes in
                which these differ are unknown, and so is the batch axis unless every batch has as many samples.

        Returns:
            A `tf.data.Dataset` of batches, in the structure that the dataset gives them (lists become tuples).

        Raises:
            ImportError: TensorFlow is not installed.
            tf.errors.InvalidArgumentError: while iterating, a batch contradicts `element_spec`; it names the leaf.
        """
        from keras_mp import tfdata

        return tfdata.export(self, checks.check_count(epochs, "epochs"), prefetch, element_spec)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches in a whole epoch; None if that is not known, or it never ends."""
        return self._position.count if self._plan.counts_batches else None

    @property
    def position(self) -> Position:
        """Where the dataset is, for `BackupAndRestore`."""
        return self._position

    def looks(self) -> list[Any]:
        """Batches of the current epoch, for a look at their structure: they differ in the axes in which others will."""
        with self._lock:
            count = min(2, self._position.start.left(self._plan.num_batches))
            keys = [self._position.look(number) for number in range(count)]
            wanted = requests_of(self._loader, list(self._requests(iter(keys))))
            engine = self._running().engine
            first, *more = engine.submit(wanted)
        batch = self._served(keys[0], engine.result, first)
        return [batch, *(loaded.batch for loaded in others(engine, more))]

    @property
    def batch_axis(self) -> int | None:
        """Samples in every batch, or None if that varies."""
        raise NotImplementedError

    # -- numbers and ends ----------------------------------------------------------------------------------------

    @property
    def failures(self) -> list[SampleFailure]:
        """The samples that failed and were left out or replaced: the last thousand, oldest first."""
        return self._failures.kept

    @property
    def _where(self) -> str:
        """Where batches are loaded, in words."""
        pool = None if self._runtime is None else self._runtime.pool
        return str(self._choice if pool is None else dataclasses.replace(self._choice, workers=pool.workers))

    @property
    def handed_out(self) -> HandedOut:
        """When batches were handed out, for `PipelineMonitor`."""
        return self._served_so_far.handed_out

    @property
    def training(self) -> Training | None:
        """What `PipelineMonitor` has measured of the last epoch of training on this dataset."""
        return self._served_so_far.training

    @training.setter
    def training(self, training: Training) -> None:
        self._served_so_far.training = training

    def stats(self, since: Stats | None = None) -> Stats:
        """Numbers so far: what was loaded, where the time went, who waited.

        Args:
            since: what this returned earlier: the numbers are of the time between the two.
        """
        runtime = self._runtime
        engine = {} if runtime is None else runtime.engine.stats()
        if self._choice.by_keras:
            engine = {"engine": KERAS_POOL, "workers": self._choice.workers}
        counts = {"failures": self._failures.total, "cache_bytes": self._loader.cache_bytes}
        now = self._served_so_far.stats(engine, epoch=self.epoch, **counts)
        return now if since is None else now.since(since)

    def report(self, since: Stats | None = None) -> Report:
        """Whether the training waits for its data, why, and how many workers would do.

        Args:
            since: what `stats()` returned earlier: the report is of the time since then, without what `PipelineMonitor`
                measured, which is of the last epoch of `fit`.

        Returns:
            A `keras_mp.Report`: print it, show it in a notebook, `.save("report.html")`, `.advice`.
        """
        training = self.training if since is None else None
        stats = self.stats(since)
        return Report(repr(self), stats, training, checks.usable_cores(), Footprint.of(stats.pids))

    def _repr_html_(self) -> str:
        """What a notebook shows: the report so far."""
        return self.report().html()

    def close(self) -> None:
        with self._lock:
            if self._runtime is not None and not self._closed:
                self._served_so_far.end(self.stats())
        super().close()

    close.__doc__ = Bridge.close.__doc__

    def trace(self, path: str | os.PathLike[str] | None = None, *, max_events: int = MAX_EVENTS) -> Trace:
        """Records from now on when each batch was made, by which worker and in which stages, and who waited for it.

        The file is of Chrome's Trace Event format and opens in https://ui.perfetto.dev. It has a lane for each worker,
        with a span for each batch, the stages of its samples within that, and the worker's start, death and timeout;
        and a lane for whoever takes the batches. It is written, in place of the one before, at the end of each epoch,
        when the dataset is closed, and by the result's `stop()` and `save()`; and at the end of
        `with train.trace("trace.json"):`. Calling this again ends the recording before.

        Batches that had been asked for before this call are in the consumer's lane only.

        Args:
            path: of the file. None: write none, say for `keras_mp.plot_timeline`.
            max_events: how many events are kept, the last ones: a batch of 32 samples with a transform makes about a
                hundred.

        Raises:
            OSError: there can be no such file.
            PoolClosed: the dataset has been closed.
            TypeError, ValueError: an argument is of the wrong kind; or the workers are of Keras's pool, which tells
                nothing.
        """
        self._check_open()
        if self._choice.by_keras:
            raise ValueError(
                "trace() records what the workers report, and those of pool='keras' report nothing; leave out pool="
            )
        if self.timeline is not None:
            self.timeline.stop()
        served = self._served_so_far
        served.trace = Trace(served.recorder, path, short_repr(self, 200), max_events)
        return served.trace

    @property
    def timeline(self) -> Trace | None:
        """The last recording, for `keras_mp.plot_timeline`."""
        return self._served_so_far.trace
