"""A dataset from its start to its end: what it is made of, its engine, the batches it serves, its copies and parts.

What Keras and loops ask of it stands in `bridge`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras

from keras_mp import exits
from keras_mp.callers import warn_of_left_out
from keras_mp.engines.choice import EngineChoice, Running
from keras_mp.engines.prefetch import Prefetch
from keras_mp.errors import PoolClosed, SampleError
from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.failures import FailureLog
from keras_mp.looks import Looks
from keras_mp.plan.batching import Batching
from keras_mp.plan.position import Position
from keras_mp.plan.progress import BatchKey
from keras_mp.plan.request import Request
from keras_mp.stats import ServedSoFar


class Lifecycle(keras.utils.PyDataset):
    """Batches of a plan, made by a loader somewhere, from the first to `close()`.

    Args:
        loader: what makes a batch.
        plan: which samples make it.
        choice: where it is made.
        seed_is_drawn: whether the plan's seed is none of the user's.
        max_failures: how many samples of an epoch may fail: a count (int), a share (float), or None for no limit.
    """

    def __init__(
        self,
        loader: Loader,
        plan: Batching,
        choice: EngineChoice,
        *,
        seed_is_drawn: bool,
        max_failures: float | None,
    ) -> None:
        super().__init__(
            workers=choice.workers if choice.by_keras else 1,
            use_multiprocessing=choice.by_keras,
            max_queue_size=choice.queue_size,
        )
        self._loader = loader
        self._choice = choice
        self._seed_is_drawn = seed_is_drawn
        self._max_failures = max_failures
        self._stride = 1  # among how many processes Keras divides the numbers
        self._warned_of_keras_pool = False
        self._closed = False
        self._set_plan(plan)
        self._make_runtime_state()

    def _set_plan(self, plan: Batching) -> None:
        """Starts afresh: at the first epoch of `plan`, nothing counted yet."""
        self._plan = plan
        self._position = Position(plan, None if self._seed_is_drawn else plan.seed, not self._choice.by_keras)
        samples = plan.epoch_length // plan.num_shards if plan.counts_batches else None
        self._failures = FailureLog(self._max_failures, samples)

    def _make_runtime_state(self) -> None:
        self._lock = threading.RLock()
        self._served_so_far = ServedSoFar()
        self._runtime: Running | None = None
        self._prefetch = Prefetch(self._choice.limit())
        self._looks = Looks()
        self._hook_is_due = False

    def _requests(self, keys: Iterator[BatchKey], further_epochs: int = 0) -> Iterator[Request]:
        """Requests for batches; where it is not known how many an epoch has, those of further epochs may follow."""
        plan, mark = self._position.plan, self._served_so_far.mark
        requests = (mark(plan.request(*key)) for key in keys)
        if plan.counts_batches or not further_epochs:
            return requests
        return (request._replace(goes_on=further_epochs) for request in requests)

    def _served(self, key: BatchKey, load: Callable[..., Loaded], *arguments: Any) -> Any:
        self._check_open()
        try:
            loaded = self._served_so_far.serve(key, load, *arguments)
        except SampleError as error:
            self._failures.record(error.failure)
            raise
        self._failures.add(loaded.failures)
        if self._choice.by_keras:
            warn_of_left_out(loaded.failures)
        return loaded.batch

    def _say_what_came_of(self, epoch: int | None) -> None:
        """Warns of the failures of an epoch, which is over, and writes the timeline so far; None: of all epochs."""
        self._failures.warn(epoch)
        self._served_so_far.write_trace()

    def _running(self) -> Running:
        with self._lock:
            if self._runtime is None:
                self._check_open()
                self._served_so_far.start()
                self._runtime = self._choice.start(self._loader, self._served_so_far.recorder)
                self._loader = self._runtime.loader
                exits.close_at_exit(self)
            return self._runtime

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosed(f"{type(self).__name__} has been closed; make a new one")

    def close(self) -> None:
        """Drops what is being loaded and ends the workers, unless another dataset uses them. May be called twice.

        Batches already taken stay valid. An iteration or an export that is in use raises `PoolClosed` for the next one.
        The end of the process closes every dataset.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            runtime, self._runtime = self._runtime, None
            self._prefetch.close()
        if runtime is not None:
            runtime.close()
        self._say_what_came_of(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _part(self, plan: Batching, choice: EngineChoice | None = None) -> Self:
        """A dataset like this one, of another plan, its batches maybe made elsewhere."""
        part = copy.copy(self)
        part._choice = choice or self._choice
        part._make_runtime_state()
        part._set_plan(plan)
        part._position.set_epoch(self._position.epoch)
        return part

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_runtime", "_prefetch", "_served_so_far")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return {**state, "_choice": self._choice.without_pool()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_runtime_state()
