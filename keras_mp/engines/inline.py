"""Loading in the thread that asks for a batch, when it asks; nothing runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_mp.loading.base import Loaded, Loader
from keras_mp.loading.in_process import load_in_process
from keras_mp.plan.request import Request


class InlineEngine:
    """Loads a batch in `result`; a request is its own handle."""

    bundle_size = 1
    batch_bytes = None  # nothing is ever in flight

    def __init__(self, loader: Loader) -> None:
        self.update(loader)

    def submit(self, requests: Sequence[Request]) -> Sequence[Request]:
        return requests

    def is_ready(self, handle: Request) -> bool:
        return False

    def result(self, handle: Request) -> Loaded:
        return load_in_process(self._loader, handle)

    def cancel(self, handle: Request) -> None:
        pass

    def update(self, loader: Loader) -> None:
        self._loader = loader.renewed()

    def close(self) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        return {"engine": "in-process"}
