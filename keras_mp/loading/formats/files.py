"""A file becomes a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

Reader = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Read:
    """A `load` for a source of paths: (path, label) -> (what the file holds, label), or path -> what it holds.

    Attributes:
        reader: path -> array, or bytes.
    """

    reader: Reader

    def __call__(self, item: Any) -> Any:
        if isinstance(item, tuple):
            path, label = item
            return self.reader(path), label
        return self.reader(item)


def only_sample(samples: list[Any]) -> Any:
    """A collate for batches that are one sample, without a batch axis."""
    (sample,) = samples
    return sample
