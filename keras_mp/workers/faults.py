"""What is recorded of a worker's end: how it ended, what that was to its batch, and which sample was at hand."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
from typing import Any, Literal, NamedTuple

from keras_mp.errors import SampleFailure, short_repr
from keras_mp.loading.base import Loader
from keras_mp.loading.loader import SampleLoader
from keras_mp.plan.request import Request
from keras_mp.workers.messages import EXIT_NO_DESCRIPTOR

_PLAIN_TYPES = (str, bytes, int, float, type(pathlib.Path()))  # whose repr runs no code of the user's


@dataclasses.dataclass(frozen=True)
class WorkerEnd:
    """How a worker ended.

    Attributes:
        cause: "late", past a deadline or stopped for too long, and killed for it; "broken", it did not keep to the
            protocol, and was killed for it; "exited", by itself or killed by somebody else.
        text: that in words, to follow "process 12".
        was_stopped: it stood stopped (SIGSTOP) when it was found late.
        exit_code: negative for a signal; None: it would not end.
    """

    cause: Literal["late", "broken", "exited"]
    text: str
    was_stopped: bool = False
    exit_code: int | None = None

    @property
    def is_from_outside(self) -> bool:
        """Whether it may well have been somebody else's doing, and not that of the code which it ran."""
        if self.cause == "late":
            return self.was_stopped
        # They say nothing against a batch that the worker had not begun: somebody else's signals, and no descriptor.
        return self.exit_code in (-signal.SIGKILL, -signal.SIGTERM, EXIT_NO_DESCRIPTOR)

    @property
    def lacked_descriptor(self) -> bool:
        """Whether it had no descriptor left, which a fresh worker has."""
        return self.cause == "exited" and self.exit_code == EXIT_NO_DESCRIPTOR


class Fault(NamedTuple):
    """The end of a worker that was at a batch.

    Attributes:
        kind: "WorkerCrashed", "BatchTimeout", or "unstarted" where nothing shows that the batch was the cause.
        position: of the sample that is blamed; None: the batch as a whole.
        text: what happened.
    """

    kind: str
    position: int | None
    text: str


class SampleNames:
    """Tells a request's sample by its position, without the arrays of the source."""

    def __init__(self, loader: Loader) -> None:
        self._stage = "source"
        self._indexer: SampleLoader | None = None
        self._are_numbered = loader.has_numbered_samples if isinstance(loader, SampleLoader) else True
        if isinstance(loader, SampleLoader) and loader.on_error != "raise":
            items = loader.source if type(loader.source) in (list, tuple) else range(len(loader.source))
            self._indexer = SampleLoader(items if loader.has_numbered_samples else (), seed=loader.seed)
            self._stage = "source" if loader.transform is None else "transform"

    @property
    def may_be_left_out(self) -> bool:
        """Whether a batch may be made without a sample that fails."""
        return self._indexer is not None

    def index_at(self, request: Request, position: int) -> int | None:
        """Source index of a request's sample, or None if it cannot be told."""
        if position < 0 or not self._are_numbered:
            return None
        if position < len(request.samples):
            return int(request.samples[position])
        return None if self._indexer is None else self._indexer.index_at(request, position)

    def failure(self, request: Request, position: int, kind: str, message: str) -> SampleFailure:
        """The record of a sample that no worker survives, or that none has the time for."""
        index = self.index_at(request, position)
        items = () if self._indexer is None or isinstance(self._indexer.source, range) else self._indexer.source
        item = items[index] if index is not None and index < len(items) else None
        return SampleFailure(
            stage=self._stage,
            index=index,
            item=short_repr(item) if _is_plain(item) else "not read",
            epoch=request.epoch,
            batch=request.batch,
            type=kind,
            message=message,
            traceback="(none: the worker was ended; what compiled code said of a crash is on stderr)\n",
            where="the training process",
        )


def _is_plain(item: Any) -> bool:
    return type(item) in _PLAIN_TYPES or (type(item) in (tuple, list) and all(map(_is_plain, item)))
