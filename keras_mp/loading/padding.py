"""How long the axes of a batch are whose samples differ in length, by what `keras_mp.pad` was told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_mp.loading.paths import Path, describe_path, pick

Lengths = int | tuple[int | None, ...] | None


@dataclasses.dataclass(frozen=True)
class Padding:
    """How samples are padded; the attributes are the arguments of `keras_mp.pad`."""

    value: Any = 0
    multiple_of: Any = None
    max_length: Any = None
    mask: str | Mapping[str, Any] | None = None

    def axes_of(self, path: Path, ndim: int) -> list[Axis]:
        """How the axes of the leaf at `path` are padded.

        Raises:
            ValueError: a tuple was given for this leaf, and not of its number of axes.
        """
        given = []
        for name, lengths in (("multiple_of", self.multiple_of), ("max_length", self.max_length)):
            chosen: Lengths = pick(lengths, path, None)
            if isinstance(lengths, tuple) and len(lengths) != ndim:
                chosen = None  # it is meant for others
            if not isinstance(chosen, tuple):
                chosen = (chosen,) * (1 if ndim == 1 else ndim - 1) + (None,) * (ndim > 1) if ndim else ()
            elif len(chosen) != ndim:
                raise ValueError(
                    f"{describe_path(path)} has {ndim} axes, but {name}={chosen!r} is for {len(chosen)}; give one "
                    "entry (an int or None) for each axis, by leaf in a dict of paths"
                )
            given.append(chosen)
        return [
            Axis(multiple, most, number < max(1, ndim - 1) or multiple is not None)
            for number, (multiple, most) in enumerate(zip(*given, strict=True))
        ]


@dataclasses.dataclass(frozen=True)
class Axis:
    """How one axis of a leaf is padded.

    Attributes:
        multiple: to a multiple of this, or None.
        most: to this length, or up to it where there is a multiple; or None.
        is_length: whether it varies from batch to batch; else it may be one of features or channels.
    """

    multiple: int | None
    most: int | None
    is_length: bool

    @property
    def is_fixed(self) -> bool:
        """Whether it has the same length in every batch."""
        return self.most is not None and (self.multiple is None or self.multiple >= self.most)

    def length(self, longest: int) -> int:
        """Its length in a batch whose longest sample has `longest` there."""
        if self.most is not None and self.is_fixed:
            return self.most
        unit = self.multiple or 1
        rounded = -(-longest // unit) * unit
        return rounded if self.most is None else min(rounded, self.most)

    def stretched(self, longest: int, varies: bool, stretch: int) -> int:
        """Its length where batches are looked at for their shapes; see `Request.stretch`."""
        length = self.length(longest)
        if self.is_fixed or not (stretch and (self.is_length or varies)):
            return length
        unit = self.multiple or 1
        units = -(-length // unit)
        return unit * (units + (units + stretch) % 2)
