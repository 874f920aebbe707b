"""Fingerprints: digests that are the same in every process and run for equal values and equal code.

A pickle of a function is not: its bytes depend on which strings are one object. So code is taken apart: its bytes, its
constants, its defaults, what it closes over, and the globals that it names, which are followed into the user's own
modules. Of installed packages and the standard library name and version count. What is seen of a file is its size and
its time of change, wherever a value names one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import pickle
import struct
import sys
import sysconfig
import types
from typing import Any

import numpy as np

from keras_mp.errors import KerasMPError
from keras_mp.memory.pickling import memmap_place

_DIGEST_BYTES = 16
_MOST_DEPTH = 60
_PLAIN = (bool, int, float, complex, bytes, type(None), type(Ellipsis), range, slice)


def fingerprint(value: Any) -> bytes:
    """The digest of a value, 16 bytes.

    Raises:
        KerasMPError: it holds something that cannot be told apart, such as an open file or a lock.
    """
    digest = _Digest()
    try:
        digest.add(value)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise KerasMPError(f"{type(value).__name__} has no fingerprint: {type(error).__name__}: {error}") from error
    return digest.result()


def combined(*parts: bytes) -> bytes:
    """One digest of several."""
    return hashlib.blake2b(
        b"".join(struct.pack("<q", len(part)) + part for part in parts), digest_size=_DIGEST_BYTES
    ).digest()


class _Digest:
    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._seen: dict[int, tuple[int, Any]] = {}  # the objects too: an id must not be used again meanwhile
        self._depth = 0

    def result(self) -> bytes:
        return self._hash.digest()

    def add(self, value: Any) -> None:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise TypeError(f"it is nested deeper than {_MOST_DEPTH} levels")
        self._add(value)
        self._depth -= 1

    def _tag(self, *parts: Any) -> None:
        for part in parts:
            data = part if isinstance(part, bytes | memoryview) else str(part).encode("utf-8", "surrogatepass")
            self._hash.update(struct.pack("<q", memoryview(data).nbytes))
            self._hash.update(data)

    def _add(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._tag(kind.__name__, repr(value))
        elif kind is str or isinstance(value, os.PathLike):
            self._tag("str", os.fspath(value), *_file_state(value))
        elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            self._add_array(value)
        elif id(value) in self._seen:
            self._tag("again", self._seen[id(value)][0])
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_object(kind, value)

    def _add_array(self, value: Any) -> None:
        dtype = value.dtype.descr if value.dtype.names else value.dtype.str
        if isinstance(value, np.memmap) and (place := memmap_place(value)) is not None:
            path, start, *_ = place
            self._tag("memmap", path, start, dtype, value.shape, value.strides, *_file_state(path))
            return
        self._tag("array", dtype, value.shape)
        self._tag(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")

    def _add_object(self, kind: type, value: Any) -> None:
        if kind in (list, tuple):
            self._tag(kind.__name__, len(value))
            for part in value:
                self.add(part)
        elif kind is dict:
            self._tag("dict", len(value))
            for key, part in value.items():
                self.add(key)
                self.add(part)
        elif kind in (set, frozenset):
            self._tag("set", *sorted(fingerprint(part) for part in value))
        elif isinstance(value, types.ModuleType):
            self._tag("module", value.__name__, getattr(value, "__version__", ""))
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.MethodType):
            self._tag("method")
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, property | classmethod | staticmethod):
            self._tag(kind.__name__)
            for part in (value.fget, value.fset) if isinstance(value, property) else (value.__func__,):
                self.add(part)
        else:
            self._add_by_reduction(value)

    def _add_by_reduction(self, value: Any) -> None:
        """Any other object: as `pickle` would take it apart."""
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):  # a global
            self._tag("global", getattr(value, "__module__", ""), reduced)
            return
        self._tag("object")
        for part in reduced[:3]:
            self.add(part)
        for items in reduced[3:5]:
            for item in items or ():
                self.add(item)

    def _add_function(self, function: types.FunctionType) -> None:
        if _is_installed(function.__module__):
            self._tag("function", function.__module__, function.__qualname__, _version_of(function.__module__))
            return
        self._tag("function", function.__qualname__)
        self.add(function.__code__)
        self.add((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # it is empty
                self._tag("empty")
        names = sorted(_names_in(function.__code__))
        for name in names:
            if name in function.__globals__ and name != "__builtins__":
                self._add_global(name, function.__globals__[name], names)

    def _add_global(self, name: str, value: Any, names: list[str]) -> None:
        self._tag("global", name)
        if isinstance(value, types.ModuleType) and not _is_installed(value.__name__):
            for attribute in names:  # of a module of the user's, what this code may mean of it
                if isinstance(found := vars(value).get(attribute), types.FunctionType | type):
                    self._tag(attribute)
                    self.add(found)
        else:
            self.add(value)

    def _add_code(self, code: types.CodeType) -> None:
        self._tag("code", sys.version_info[:2], code.co_code, code.co_names, code.co_varnames, code.co_flags)
        for constant in code.co_consts:
            self.add(constant)

    def _add_class(self, kind: type) -> None:
        self._tag("class", kind.__module__ if _is_installed(kind.__module__) else "", kind.__qualname__)
        if _is_installed(kind.__module__):
            self._tag(_version_of(kind.__module__))
            return
        for base in kind.__bases__:
            self.add(base)
        for name, part in sorted(vars(kind).items()):
            if isinstance(part, types.FunctionType | property | classmethod | staticmethod):
                self._tag(name)
                self.add(part)
            elif not name.startswith("__") and isinstance(part, (*_PLAIN, str, tuple, list, dict)):
                self._tag(name)
                self.add(part)


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _file_state(name: Any) -> tuple[int, ...]:
    """Size and time of change of the file of that name, if there is one."""
    try:
        state = os.stat(name)
    except (OSError, ValueError):
        return ()
    return (state.st_size, state.st_mtime_ns) if not os.path.isdir(name) else ()


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str | None) -> bool:
    """Whether a module is of the standard library or an installed package."""
    found = sys.modules.get(module or "")
    if module in (None, "builtins") or (module or "").partition(".")[0] in ("keras_mp", *sys.stdlib_module_names):
        return module != "__main__"
    file = getattr(found, "__file__", None)
    if found is None or file is None:
        return False
    roots = {pathlib.Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")}
    path = pathlib.Path(file).resolve()
    return "-packages" in str(path) or any(root in path.parents for root in roots)


def _version_of(module: str) -> str:
    return str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", ""))
