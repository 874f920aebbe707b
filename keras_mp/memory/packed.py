"""Long lists of plain values, packed into two arrays: those are shared by all workers, and unpickled item by item.

As a list, a million tuples would be unpickled by every worker before its first batch, and be in memory in each of them.
"""

from __future__ import annotations

import io
import itertools
import operator
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_LEAST_ITEMS = 20_000  # shorter lists are quickly unpickled, and then read faster
_MOST_ITEM_BYTES = 16 << 10  # on average; larger items hold arrays, which travel without a copy as they are
_SMALL_ITEM_BYTES = 256
_LOOKED_AT = 500
_MOST_SHARED = 3  # how much larger others may become, as each has its own copy of what they have in common

_IMMUTABLE = {int, float, complex, bool, str, bytes, type(None)}
# Whose objects are plain values too, and immutable; by name, as a worker need not import them.
_VALUE_MODULES = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
_WELL_KNOWN = {"numpy", *sys.stdlib_module_names} - {"__main__"}


class PackedList(Sequence[Any]):
    """The items of a list, each pickled by itself.

    Attributes:
        data: the pickles, one after the other: uint8, shape (bytes,).
        ends: where each begins, and the last ends: int64, shape (items + 1,).
        kind: list or tuple.
    """

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64], kind: type = list) -> None:
        self.data = data
        self.ends = ends
        self.kind = kind

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.kind(self[number] for number in range(*index.indices(len(self))))
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"{self.kind.__name__} index out of range")
        return pickle.loads(self.data[self.ends[number] : self.ends[number + 1]].data)


class ListPacker:
    """Packs the lists of one loader, and remembers what it has packed as long as they stay as they are.

    Pickled, it remembers nothing.
    """

    def __init__(self) -> None:
        self._packed: dict[int, tuple[Sequence[Any], PackedList]] = {}  # by the list's id: its items, which live so

    def __reduce__(self) -> Any:
        return ListPacker, ()

    def pack(self, items: Any) -> PackedList | None:
        """The items, packed; None where that has no advantage, or cannot be done: then they travel as they are."""
        if type(items) not in (list, tuple) or len(items) < _LEAST_ITEMS:
            return None
        if id(items) in self._packed:
            before, packed = self._packed.pop(id(items))
            if len(before) == len(items) and all(map(operator.is_, before, items)):
                self._packed[id(items)] = before, packed
                return packed
        new = _pack(items) if _pays(items) else None
        if new is not None and _are_immutable(items):  # else they may have changed in themselves
            self._packed[id(items)] = tuple(items), new
        return new

    def share(self, shared: Callable[[npt.NDArray[Any]], npt.NDArray[Any] | None]) -> None:
        """Uses what `shared` gives for an array, the same in other memory, in its place; unless that is None."""
        for key, (items, packed) in list(self._packed.items()):
            data, ends = shared(packed.data), shared(packed.ends)
            other = PackedList(
                packed.data if data is None else data, packed.ends if ends is None else ends, packed.kind
            )
            self._packed[key] = items, other


class _NotPlain(Exception):
    pass


class _ItemPickler(pickle.Pickler):
    """Pickles what is the same wherever it is unpickled, and however often."""

    def reducer_override(self, obj: Any) -> Any:  # not called for numbers, strings, tuples, lists, dicts and sets
        if isinstance(obj, np.ndarray):
            plain = type(obj) is np.ndarray and not obj.dtype.hasobject
        elif isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType):  # what makes a value again
            plain = (obj.__module__ or "").partition(".")[0] in _WELL_KNOWN
        else:
            plain = isinstance(obj, np.generic | np.dtype | complex | range | slice) or _is_value(type(obj))
        if not plain:
            raise _NotPlain
        return NotImplemented


def _is_value(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _VALUE_MODULES


def _pack(items: Sequence[Any]) -> PackedList | None:
    stream = io.BytesIO()
    pickler = _ItemPickler(stream, 5)
    dump, forget, position = pickler.dump, pickler.clear_memo, stream.tell
    ends = [0]
    try:
        for item in items:
            dump(item)
            forget()
            ends.append(position())
    except Exception:  # of an item that cannot be pickled, too: it will be named where the source is
        return None
    return PackedList(np.frombuffer(stream.getbuffer(), np.uint8), np.array(ends, np.int64), type(items))


def _pays(items: Sequence[Any]) -> bool:
    """Whether some of the items, packed, are small, and not much larger than where they share what they can."""
    some = items[:: max(1, len(items) // _LOOKED_AT)]
    packed = _pack(some)
    if packed is None or len(packed.data) > _MOST_ITEM_BYTES * len(some):
        return False
    return len(packed.data) <= max(_SMALL_ITEM_BYTES * len(some), _MOST_SHARED * len(pickle.dumps(some, 5)))


def _are_immutable(items: Sequence[Any]) -> bool:
    """Whether the items can only be replaced, not changed."""
    while items:
        kinds = set(map(type, items))
        if not all(kind in _IMMUTABLE or _is_value(kind) for kind in kinds - {tuple}):
            return False
        if tuple not in kinds:
            return True
        items = list(itertools.chain.from_iterable(item for item in items if type(item) is tuple))
    return True
