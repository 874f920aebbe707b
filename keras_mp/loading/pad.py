"""`pad`: samples whose arrays differ in length become one array, written straight into the slot.

Every leaf keeps its number of axes. An axis is as long as the longest sample of the batch, rounded up to a multiple or
to a fixed length where that was asked for; what a sample does not fill is the padding value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_mp.checks import check_count
from keras_mp.errors import short_repr
from keras_mp.loading.padded_rows import PaddedRows
from keras_mp.loading.padding import Padding


def pad(
    value: Any = 0,
    *,
    multiple_of: Any = None,
    max_length: Any = None,
    mask: str | Mapping[str, Any] | None = None,
) -> Pad:
    """A `collate=` for samples that differ in length: each leaf is padded at the end of its axes to the longest.

    Wherever one of these is given by leaf, it is a dict of paths: a key of a dict sample (`"ids"`), a position in a
    tuple (`0`), or several of them (`(0, "ids")` or `"0/ids"`); a path holds for all that is below it. Leaves that such
    a dict leaves out have the default.

    An int as `multiple_of` or `max_length` is for the axes that are lengths: the only axis of a leaf, or all but the
    last of several (the last are features, or channels). A tuple says it for each axis, `(32, 32, None)`, of the leaves
    that have as many.

    Args:
        value: what is filled in: a number, or for leaves of strings a string; by leaf: a dict of paths. Zero stands for
            the empty string, too.
        multiple_of: lengths are rounded up to a multiple of it, which bounds the number of shapes.
        max_length: lengths are this, in every batch; together with `multiple_of`: at most this. A longer sample has
            failed (see `on_error`).
        mask: name of a boolean leaf that is added where samples are dicts, or (dict, ...): True where the batch holds
            data. It is of the lengths of the first leaf that has an axis; a dict says of which: `{"mask": "ids"}`.

    Returns:
        A function from a list of samples to a batch, for `PoolDataset(collate=...)`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    for name, given in (("multiple_of", multiple_of), ("max_length", max_length)):
        for part in given.values() if isinstance(given, Mapping) else (given,):
            _check_lengths(part, name)
    for part in value.values() if isinstance(value, Mapping) else (value,):
        if not isinstance(part, int | float | complex | str | bytes | np.generic):
            raise TypeError(f"value must be a number, a string, or a dict of them, got {short_repr(part, 80)}")
    names = mask if isinstance(mask, Mapping) else () if mask is None else (mask,)
    if not all(isinstance(name, str) and name for name in names) or mask == {}:
        raise TypeError(
            f"mask must be the name of a leaf, or a dict such as {{'mask': 'ids'}}, got {short_repr(mask, 80)}"
        )
    return Pad(value, multiple_of, max_length, mask)


def _check_lengths(lengths: Any, name: str) -> None:
    if isinstance(lengths, tuple):
        for length in lengths:
            if length is not None:
                check_count(length, f"{name}[i]")
    elif lengths is not None:
        check_count(lengths, name)


class Pad(Padding):
    """What `pad` returns."""

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of these samples."""
        rows = PaddedRows(len(samples), self)
        for row, sample in enumerate(samples):
            rows.put(row, sample)
        return rows.finish(len(samples))
