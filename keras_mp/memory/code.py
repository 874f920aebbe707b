"""How code of the user's travels: cloudpickle, for workers that are fresh interpreters with this one's search path.

What such an interpreter can import travels by name. What it cannot travels by value: functions and classes of
`__main__`, of modules loaded from a path or made at run time, and of the `__mp_main__` of a multiprocessing child.

Code that travels by value keeps its file name, which cloudpickle drops, so that a traceback shows the user's file, line
and source. Source that is in no file (a notebook's cell, `python -c`) travels along and is put into `linecache`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import os
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from pickle import PickleBuffer
from typing import Any, TypeVar

import cloudpickle

_CODE = (types.FunctionType, type, types.ModuleType, types.CodeType, TypeVar)
_COMMAND_LINE = "<command line>"
# cloudpickle takes the modules whose content travels by value from a registry of its own, which others use as well: a
# module is in it only while one of its objects is reduced.
_registry_lock = threading.Lock()


class CodePickler(cloudpickle.Pickler):
    """Pickles functions and classes so that a worker can unpickle them."""

    def __init__(self, stream: io.BytesIO, buffer_callback: Callable[[PickleBuffer], Any] | None = None) -> None:
        super().__init__(stream, protocol=5, buffer_callback=buffer_callback)
        self._importable: dict[str, bool] = {}
        self._sources: dict[str, tuple[str, str | None]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _CODE):
            return super().reducer_override(obj)
        if isinstance(obj, types.CodeType):
            return self._reduce_code(obj)
        module = obj if isinstance(obj, types.ModuleType) else sys.modules.get(getattr(obj, "__module__", None) or "")
        if type(module) is not types.ModuleType or self._is_importable(module):
            return super().reducer_override(obj)
        with _registered(module):
            if isinstance(obj, types.ModuleType | TypeVar):
                return self.dispatch_table[type(obj)](obj)
            return super().reducer_override(obj)

    def _is_importable(self, module: types.ModuleType) -> bool:
        name = module.__name__
        if name not in self._importable:
            # What is in `__main__` travels by value anyway, and `import __main__` gives a worker its own.
            self._importable[name] = name == "__main__" or sys.modules.get(name) is not module or _finds(module)
        return self._importable[name]

    def _reduce_code(self, code: types.CodeType) -> tuple[Any, ...]:
        name = _COMMAND_LINE if _is_command_line(code) else code.co_filename
        if name not in self._sources:  # the same two strings for each function of a file, so that they are sent once
            self._sources[name] = name, _source_in_memory(name)
        make, parts = self.dispatch_table[types.CodeType](code)
        return _code, (make, parts, *self._sources[name])


def _code(make: Callable[..., types.CodeType], parts: tuple[Any, ...], filename: str, source: str | None) -> Any:
    if source is not None:
        # Without a time of change, so that `linecache` keeps it though there is no such file.
        linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    return make(*parts).replace(co_filename=filename)


def _source_in_memory(filename: str) -> str | None:
    """The source of a file that is known here, but cannot be read from disk by that name."""
    if filename == _COMMAND_LINE:
        return _command_line()[0]
    if os.path.isabs(filename) and os.path.isfile(filename):
        return None
    if filename == "<string>":  # of `exec` and others; Python 3.13 has the source of `python -c` by this name
        return None
    return "".join(linecache.getlines(filename)) or None


def _is_command_line(code: types.CodeType) -> bool:
    """Whether `code` is of `python -c`: what `exec` and dataclasses compile has the same file name."""
    return code.co_filename == "<string>" and code in _command_line()[1]


@functools.cache
def _command_line() -> tuple[str, list[types.CodeType]]:
    """The source of `python -c`, and the code objects in it."""
    option = len(sys.orig_argv) - len(sys.argv) - 1
    if sys.argv[:1] != ["-c"] or option < 1 or not sys.orig_argv[option].endswith("c"):
        return "", []
    source = textwrap.dedent(sys.orig_argv[option + 1])  # as newer Pythons do
    try:
        codes = [compile(source, "<string>", "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return "", []
    for code in codes:  # which grows
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return source, codes


@contextlib.contextmanager
def _registered(module: types.ModuleType) -> Iterator[None]:
    """While this lasts, cloudpickle pickles what is in `module` by value."""
    with _registry_lock:
        if module.__name__ in cloudpickle.list_registry_pickle_by_value():
            yield
            return
        cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(module)


def _finds(module: types.ModuleType) -> bool:
    """Whether an import of the module's name in a fresh interpreter gives this module, going by its file.

    The import itself is not tried: the finders that it would ask are.
    """
    name, file = module.__name__, getattr(module, "__file__", None)
    parent_name, path = name.rpartition(".")[0], None
    try:
        if parent_name:
            parent = sys.modules.get(parent_name)
            if parent is None or not _finds(parent):
                return False
            path = getattr(parent, "__path__", ())
        specs = (finder.find_spec(name, path, None) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
    except Exception:  # of a finder, or of an object that stands for a module: this shows nothing
        return True
    if spec is None:
        return bool(parent_name)  # then it is its parent's making, and importing that makes it again
    if spec.origin in ("built-in", "frozen"):
        return True
    if file is None:  # as of a folder without `__init__.py`; but also of a module that was made at run time
        return not spec.has_location and module.__spec__ is not None
    if "-packages" in file:  # Ray puts copies of installed packages before them on the path: either will do
        return True
    places = (place for place in (spec.origin, spec.cached) if place)
    return file == spec.origin or os.path.realpath(file) in map(os.path.realpath, places)


def _after_fork_in_child() -> None:
    global _registry_lock
    _registry_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
