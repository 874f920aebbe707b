"""Where a batch is loaded: what every such place can do. Rooms with the same door.

`submit` takes requests and returns a handle for each at once, `result` waits for that handle's batch. Which engine it
is makes no difference to the batch (P2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from keras_mp.loading.loader import Loaded, Loader, ignore_position
from keras_mp.loading.owned import owned
from keras_mp.plan.request import Request


class Engine(Protocol):
    """A place where batches are loaded."""

    @property
    def bundle_size(self) -> int:
        """How many requests had better travel together: more than one where a batch takes no longer than asking."""

    def submit(self, requests: Sequence[Request]) -> Sequence[Any]:
        """Asks for batches; returns a handle for each."""

    def is_ready(self, handle: Any) -> bool:
        """Whether `result` would return, or raise, at once."""

    def result(self, handle: Any) -> Loaded:
        """Waits for the batch of `handle`. Once for each handle."""

    def cancel(self, handle: Any) -> None:
        """Nobody will ask for the result of `handle`."""

    def update(self, loader: Loader) -> bool | None:
        """Uses `loader` for the requests that follow; whether it differs from the one before (None: not known)."""

    def close(self) -> None:
        """Gives up what the engine holds."""

    def stats(self) -> dict[str, Any]:
        """Numbers about the engine."""


def load_alone(loader: Loader, request: Request) -> Loaded:
    """Loads a batch in this thread, leaving the generators that it draws from as they were."""
    if not loader.runs_user_code:
        return loader.load(request, ignore_position, None)
    with loader.generators.restored():
        return owned(loader.load(request, ignore_position, loader.generators.seed), loader)[0]
