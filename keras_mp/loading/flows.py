"""Iterators of Keras's old `ImageDataGenerator` (`flow`, `flow_from_directory`), whose batches are loaded by number."""

from __future__ import annotations

import copy
import types
from typing import Any


def is_flow(batches: Any) -> bool:
    """Whether `batches` is such an iterator."""
    return isinstance(getattr(batches, "index_generator", None), types.GeneratorType) and hasattr(
        batches, "index_array"
    )


class FlowBatches:
    """The batches of one, as workers can have them.

    What only `next()` uses, a generator, stays here. So does the iterator's seed: it seeds by how many batches this
    copy has loaded before, which in each worker is another number; the batches are seeded like any others (P2).

    Args:
        flow: the iterator; its order is drawn now, unless it has one, so that all workers have the same (P1).
    """

    def __init__(self, flow: Any) -> None:
        if flow.index_array is None:
            flow.on_epoch_end()
        self._flow = flow

    def __len__(self) -> int:
        return len(self._flow)

    def __getitem__(self, index: int) -> Any:
        return self._view()[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"_flow": self._view()}

    def _view(self) -> Any:
        view = copy.copy(self._flow)
        view.index_generator = view.seed = None
        return view
