"""Loads batches from an object of the user's that gives whole ones: what `parallelize` is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_mp.loading.base import Loaded, Loader, batch_error, check_batch
from keras_mp.loading.randomness import Key, Seeder
from keras_mp.loading.timing import SOURCE, StageTimes
from keras_mp.plan.request import Request
from keras_mp.plan.seeds import Stream


@dataclasses.dataclass
class BatchLoader(Loader):
    """Loads a batch from an object whose `[i]` is a whole batch already."""

    source: Any
    seed: int = 0
    retries: int = 0
    runs_user_code = True

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """Loads one batch; its position is that of the one sample."""
        times.begin_batch(request.epoch, request.batch, 1)
        report_position(0)
        attempts = self.retries
        while True:
            times.begin_sample(request.samples[0])
            times.item = f"batch {request.samples[0]}"
            try:
                if seed is not None:
                    seed(Key(Stream.BATCH, self.seed, request.epoch, request.batch))
                batch = check_batch(self.source[request.samples[0]], "source")
                times.lap(SOURCE)
                return Loaded(batch, ())
            except (Exception, SystemExit) as error:
                times.lap(SOURCE)
                times.retries += attempts > 0
                if attempts == 0:
                    raise batch_error(error, "source", request) from error
                attempts -= 1
