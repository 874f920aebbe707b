"""What is wrong with what was inspected: failed, not finite, not like the others; and what was slow. Pure bookkeeping.

What most are like counts as right. What is kept grows with the number of samples by eight bytes each only, and by what
is wrong, of each kind of difference the first thousand.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal

from keras_mp.loading.inspection import Inspected, Leaf, Likeness

SLOWEST_KEPT = 5
_MEMBERS_KEPT = 1000  # of each group of things that are alike; the others of it are counted

Kind = Literal["failed", "not finite", "different"]
_Unit = Literal["sample", "batch"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with one sample or batch.

    Attributes:
        kind: what is wrong.
        unit, index, item: with which sample or batch.
        epochs: in which epochs.
        text: in words.
        traceback: of what was raised, if anything was.
    """

    kind: Kind
    unit: _Unit
    index: int
    item: str
    epochs: tuple[int, ...]
    text: str
    traceback: str = ""


@dataclasses.dataclass(frozen=True)
class Slow:
    """One of the slowest samples or batches.

    Attributes:
        seconds: what it took in a worker.
        unit, index, item, epoch: which it was.
    """

    seconds: float
    unit: _Unit
    index: int
    item: str
    epoch: int


Axes = tuple[int | None, ...]  # of a shape; None: of any length


class _Group:
    """Things whose arrays are alike in what they must be alike in.

    Attributes:
        likeness: what that is.
        kinds: by path of each array, its dtype and the axes that must be alike; no axes: it is no array.
        axes: by path, those that have been alike so far.
        count: how many they are.
        members: index, item and epoch of the first thousand.
    """

    def __init__(self, found: Inspected) -> None:
        self.likeness = found.likeness
        self.kinds = {leaf.path: (leaf.dtype, _required(leaf.shape, found.likeness)) for leaf in found.leaves}
        self.axes: dict[str, Axes | None] = {leaf.path: leaf.shape for leaf in found.leaves}
        self.count = 0
        self.members: list[tuple[int, str, int]] = []

    def add(self, found: Inspected, epoch: int) -> None:
        self.count += 1
        if len(self.members) < _MEMBERS_KEPT:
            self.members.append((found.index, found.item, epoch))
        self.axes = _merged(self.axes, {leaf.path: leaf.shape for leaf in found.leaves})

    @property
    def rank(self) -> Hashable:
        """Structure, dtypes and numbers of axes."""
        return frozenset((path, dtype, axes and len(axes)) for path, (dtype, axes) in self.kinds.items())

    @property
    def key(self) -> Hashable:
        """All that must be alike."""
        return frozenset(self.kinds.items())


class Findings:
    """Collects what was inspected.

    Args:
        unit: what is counted and timed; what is found in batches of samples counts as problems only.

    Attributes:
        checked: how many were inspected, in all epochs.
        failed: how many things failed, each counted once.
        seconds: what each of those took that did not fail.
    """

    def __init__(self, unit: _Unit) -> None:
        self.unit = unit
        self.checked = self.failed = 0
        self.seconds = array.array("d")
        self._slowest: list[Slow] = []
        self._problems: dict[tuple[Kind, str, int], Problem] = {}
        self._groups: dict[tuple[str, Hashable], _Group] = {}

    def add(self, found: Inspected, epoch: int) -> None:
        """Takes one sample or batch into account."""
        self.checked += found.unit == self.unit
        if found.failure is not None:
            failure = found.failure
            text = f"{failure.stage} failed: {failure.type}: {failure.message}".removesuffix(": ")
            self._add_problem("failed", found, epoch, text, failure.traceback)
            return
        if found.unit == self.unit:
            self.seconds.append(found.seconds)
            if len(self._slowest) < SLOWEST_KEPT or found.seconds > self._slowest[-1].seconds:
                slow = Slow(found.seconds, found.unit, found.index, found.item, epoch)
                self._slowest = sorted([*self._slowest, slow], key=lambda each: -each.seconds)[:SLOWEST_KEPT]
        if text := "; ".join(_odd_numbers(leaf) for leaf in found.leaves if leaf.nans or leaf.infs):
            self._add_problem("not finite", found, epoch, text)
        group = _Group(found)
        self._groups.setdefault((found.unit, group.key), group).add(found, epoch)

    def add_failure(self, index: int, item: str, epoch: int, text: str, counted: int) -> None:
        """Takes a batch into account that came to nothing, with `counted` samples or batches in it."""
        self.checked += counted
        before = self._problems.get(("failed", "batch", index))
        self.failed += before is None
        epochs = (epoch,) if before is None else (*before.epochs, epoch)
        self._problems["failed", "batch", index] = Problem("failed", "batch", index, item, epochs, text)

    def problems(self) -> list[Problem]:
        """All that is wrong: what failed first, then by index."""
        problems = [*self._problems.values()]
        for unit in ("sample", "batch"):
            problems += self._different(unit)
        order = ("failed", "not finite", "different")
        return sorted(problems, key=lambda each: (order.index(each.kind), each.unit != self.unit, each.index))

    def slowest(self) -> list[Slow]:
        """The slowest, slowest first."""
        return list(self._slowest)

    @property
    def median_s(self) -> float:
        """Seconds that half of them took less than; 0 if there are none."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    def leaves(self) -> list[dict[str, Any]]:
        """Path, dtype and shape of each array in most of what is counted; an axis is None if its length varies."""
        most, alike, _ = self._split(self.unit)
        if most is None:
            return []
        axes: dict[str, Axes | None] = dict(most.axes)
        for group in alike:
            axes = _merged(axes, group.axes)
        return [
            {"path": path, "dtype": dtype, "shape": None if axes[path] is None else list(axes[path] or ())}
            for path, (dtype, _) in most.kinds.items()
        ]

    def _split(self, unit: _Unit) -> tuple[_Group | None, list[_Group], list[_Group]]:
        """The largest group, all that are as they should be, and the others."""
        groups = [group for (of, _), group in self._groups.items() if of == unit]
        if not groups:
            return None, [], []
        most, alike, different = _majority(groups, lambda group: group.rank)
        best, equal, others = _majority(alike, lambda group: group.key)
        # Batches of an object of the user's may be meant to have many lengths; a few unlike most of them are not.
        few = sum(group.count for group in others) < sum(group.count for group in alike) / 2
        if most.likeness == "equal" or few:
            return best, equal, different + others
        return most, alike, different

    def _different(self, unit: _Unit) -> Iterator[Problem]:
        most, alike, different = self._split(unit)
        if most is None:
            return
        found: dict[int, Problem] = {}
        count = sum(group.count for group in alike)
        for group in different:
            text = _difference(group, most, count)
            for index, item, epoch in group.members:
                before = found.get(index)
                epochs = (epoch,) if before is None else (*before.epochs, epoch)
                found[index] = Problem("different", unit, index, item, epochs, text)
        yield from found.values()

    def _add_problem(self, kind: Kind, found: Inspected, epoch: int, text: str, traceback: str = "") -> None:
        key = kind, found.unit, found.index
        before = self._problems.get(key)
        if before is None:
            self.failed += kind == "failed"
            text = " ".join(text.split())
            self._problems[key] = Problem(kind, found.unit, found.index, found.item, (epoch,), text, traceback)
        elif epoch not in before.epochs:
            self._problems[key] = dataclasses.replace(before, epochs=(*before.epochs, epoch))


def _majority(groups: list[_Group], rule: Callable[[_Group], Hashable]) -> tuple[_Group, list[_Group], list[_Group]]:
    """The largest group of those that most are like, by `rule`; all of those; and the groups that are not."""
    counts: collections.Counter[Hashable] = collections.Counter()
    for group in groups:
        counts[rule(group)] += group.count
    most = counts.most_common(1)[0][0]
    alike = [group for group in groups if rule(group) == most]
    return max(alike, key=lambda group: group.count), alike, [group for group in groups if rule(group) != most]


def _merged(some: Mapping[str, Axes | None], others: Mapping[str, Axes | None]) -> dict[str, Axes | None]:
    """The shapes that both are, with None for each axis whose length differs."""
    return {path: _merged_axes(axes, others[path]) for path, axes in some.items()}


def _merged_axes(some: Axes | None, others: Axes | None) -> Axes | None:
    if some is None or others is None or some == others:
        return some
    return tuple(a if a == b else None for a, b in zip(some, others, strict=True))


def _required(shape: tuple[int, ...] | None, likeness: Likeness) -> Axes | None:
    if shape is None or likeness == "equal":
        return shape
    return (None,) * len(shape) if likeness == "lengths" else (None, *shape[1:])[: len(shape)]


def _odd_numbers(leaf: Leaf) -> str:
    parts = [f"{count} {name}" for count, name in ((leaf.nans, "NaN"), (leaf.infs, "Inf")) if count]
    return f"{leaf.path} has {' and '.join(parts)}"


def _difference(group: _Group, most: _Group, count: int) -> str:
    if group.kinds.keys() != most.kinds.keys():
        return f"has {_names(group)}, where {count} others have {_names(most)}"
    parts = []
    for path, (dtype, axes) in group.kinds.items():
        other_dtype, other_axes = most.kinds[path]
        if dtype != other_dtype:
            parts.append(f"{path} is {dtype}, {other_dtype} in {count} others")
        if axes != other_axes:
            parts.append(
                f"{path} has shape {in_words(group.axes[path])}, {in_words(most.axes[path])} in {count} others"
            )
    return "; ".join(parts)


def _names(group: _Group) -> str:
    return ", ".join(group.kinds) or "no array"


def in_words(axes: Axes | None) -> str:
    """A shape, with a question mark for each axis whose length varies."""
    if axes is None:
        return "no array"
    return f"({', '.join('?' if axis is None else str(axis) for axis in axes)}{',' * (len(axes) == 1)})"
