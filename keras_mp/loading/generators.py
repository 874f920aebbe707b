"""Finds the random generators that a dataset's code holds, so that they are seeded and repeat in no worker (P2).

A `numpy.random.Generator` in an attribute travels to every worker in the state it had, and each would draw the same
numbers from it. So the objects and functions of a loader are searched, once, for generators, and each of those is
seeded for every sample, like the global ones.

What is searched: attributes, containers, classes, closures, default arguments, and the globals that a function's code
names (also as an attribute of a module). A generator is known by the path to it and not by a count, so that finding one
more or less changes nothing for the others. Names are taken in sorted order, because a class that travels by value may
come with its attributes in another order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import dis
import functools
import hashlib
import importlib
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

# A search of this many objects takes some tens of milliseconds; of a container only the first elements are looked at.
_MAX_OBJECTS, _MAX_ELEMENTS = 4000, 1000

_LOAD_GLOBAL, _LOAD_NAME, _IMPORT_NAME = (dis.opmap[name] for name in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"))
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), range, np.ndarray, np.generic, np.dtype)
_GLOBAL_ONES = (random.random.__self__, np.random.rand.__self__)  # type: ignore[attr-defined]  # seeded by name

_REFERENCES: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__self__", "__func__"),
    types.BuiltinFunctionType: ("__self__",),  # a bound one, such as `rng.random`
    functools.partial: ("func", "args", "keywords"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset"),
}

# Whose code is not searched: it draws from the global generators, or from those it is given.
_SKIPPED = sys.stdlib_module_names - {"__main__"} | {
    *("numpy", "scipy", "pandas", "pyarrow", "PIL", "cv2", "keras", "tensorflow", "torch", "jax", "jaxlib"),
    *("cloudpickle", "keras_mp"),
}


class HeldGenerator(NamedTuple):
    """A generator that the user's code holds: how to seed it, and the number that stands for the path to it."""

    part: int
    seed: Callable[[np.random.SeedSequence], None]
    get_state: Callable[[], Any]
    set_state: Callable[[Any], None]


@dataclasses.dataclass
class _Search:
    found: list[HeldGenerator] = dataclasses.field(default_factory=list)
    names_torch: bool = False


def find_generators(roots: dict[str, Any]) -> tuple[list[HeldGenerator], bool]:
    """The generators that `roots` hold, and whether their code names torch.

    Code of the user's that imports torch as it runs has it imported here: its generator would not be seeded otherwise
    for the first sample.
    """
    search = _Search()
    queue = collections.deque(roots.items())
    later: collections.deque[tuple[str, Any]] = collections.deque()  # code of libraries, of which there may be much
    seen: dict[int, Any] = {}  # the objects too: an id must not be used again meanwhile
    while (queue or later) and len(seen) < _MAX_OBJECTS:
        postponed = not queue
        path, value = (later if postponed else queue).popleft()
        if issubclass(type(value), _LEAVES) or id(value) in seen:
            continue
        if not postponed and _is_installed(value):
            later.append((path, value))
            continue
        seen[id(value)] = value
        if issubclass(type(value), np.random.Generator | np.random.RandomState | random.Random):
            if found := _describe(path, value):
                search.found.append(found)
            continue
        queue.extend(_parts(path, value, search))
    return search.found, search.names_torch


def _is_installed(value: Any) -> bool:
    """Whether `value` is code, a function or class, of an installed package: in site-packages or dist-packages."""
    if type(value) is types.FunctionType:
        return "-packages" in value.__code__.co_filename
    if not issubclass(type(value), type):
        return False
    return "-packages" in (getattr(sys.modules.get(_text(value.__module__)), "__file__", None) or "")


def _describe(path: str, generator: Any) -> HeldGenerator | None:
    """How to seed it; None for the global ones, and for those that cannot be seeded."""
    if any(generator is one for one in _GLOBAL_ONES) or isinstance(generator, random.SystemRandom):
        return None
    part = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=4).digest(), "little") or 1
    get_state: Callable[[], Any]
    set_state: Callable[[Any], None]
    if isinstance(generator, random.Random):
        get_state, set_state = generator.getstate, generator.setstate

        def seed(root: np.random.SeedSequence) -> None:
            generator.seed(int.from_bytes(root.generate_state(4).tobytes(), "little"))

    elif isinstance(generator, np.random.RandomState):
        get_state, set_state = functools.partial(generator.get_state, legacy=False), generator.set_state
        kind = getattr(np.random, get_state()["bit_generator"], None)
        if kind is None:
            return None

        def seed(root: np.random.SeedSequence) -> None:
            set_state({**kind(root).state, "has_gauss": 0, "gauss": 0.0})

    else:
        bits = generator.bit_generator
        get_state, set_state = (lambda: bits.state), functools.partial(setattr, bits, "state")

        def seed(root: np.random.SeedSequence) -> None:
            set_state(type(bits)(root).state)

    return HeldGenerator(part, seed, get_state, set_state)


def _parts(path: str, value: Any, search: _Search) -> Iterator[tuple[str, Any]]:
    """What `value` refers to.

    Nothing of the user's is called for it: no property, no `__iter__`, and no `__class__`, as by `isinstance`.
    """
    kind = type(value)
    if issubclass(kind, types.FunctionType):
        yield from _function_parts(path, value, search)
    elif issubclass(kind, type):
        yield from _class_parts(path, value, search)
    elif issubclass(kind, tuple(_REFERENCES)):
        names = next(names for known, names in _REFERENCES.items() if issubclass(kind, known))
        yield from ((f"{path}.{name}", getattr(value, name)) for name in names)
    elif not issubclass(kind, types.ModuleType):
        yield from _elements(path, value)
        attributes = _attributes(value)
        yield from ((f"{path}.{name}", attributes[name]) for name in sorted(attributes))
        yield f"{path}.__class__", kind


def _elements(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    elements: Iterator[tuple[Any, Any]] = iter(())
    if issubclass(type(value), dict):
        elements = iter(dict.items(value))
    elif base := next((base for base in (list, tuple, collections.deque) if issubclass(type(value), base)), None):
        elements = enumerate(base.__iter__(value))
    for number, (key, part) in enumerate(itertools.islice(elements, _MAX_ELEMENTS)):
        if not issubclass(type(part), _LEAVES):
            yield f"{path}[{repr(key) if type(key) in (str, int) else number}]", part


def _attributes(value: Any) -> dict[str, Any]:
    try:
        attributes = {str(name): part for name, part in object.__getattribute__(value, "__dict__").items()}
    except (AttributeError, RuntimeError):  # it has none, or another thread is at it
        attributes = {}
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and kind.__module__ != "builtins":  # a slot
                try:
                    attributes[name] = member.__get__(value)
                except AttributeError:
                    continue
    return attributes


def _class_parts(path: str, value: type, search: _Search) -> Iterator[tuple[str, Any]]:
    for kind in value.__mro__:
        if _is_skipped(kind.__module__, search):
            continue
        members = vars(kind)
        for name in sorted(members):
            if name != "__annotations__":
                yield f"{path}.{kind.__qualname__}.{name}", members[name]


def _function_parts(path: str, function: types.FunctionType, search: _Search) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path}.__defaults__", part) for part in (function.__defaults__, function.__kwdefaults__))
    yield f"{path}.__dict__", function.__dict__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    if _is_skipped(function.__module__, search):
        return
    loaded, named, imported = _names(function.__code__)
    if "torch" in imported:
        search.names_torch = True
        if not _is_installed(function):
            with contextlib.suppress(Exception):  # the code's own import will fail, and say why
                importlib.import_module("torch")
    for name in sorted(loaded):
        if name in function.__globals__:
            yield from _global_parts(f"{function.__module__}:{name}", function.__globals__[name], named, search)


def _global_parts(path: str, value: Any, named: set[str], search: _Search) -> Iterator[tuple[str, Any]]:
    if not issubclass(type(value), types.ModuleType):
        yield path, value
    elif not _is_skipped(value.__name__, search):
        members = vars(value)
        for name in sorted(named & members.keys()):
            if members[name] is not value:
                yield from _global_parts(f"{path}.{name}", members[name], named - {name}, search)


def _names(code: types.CodeType) -> tuple[set[str], set[str], set[str]]:
    """The globals that code loads, all names in it, and the packages that it imports; inner functions' too.

    (`dis` would take a hundred times as long: it describes each instruction.)
    """
    loaded, named, imported = set(), set(code.co_names), set()
    argument = 0
    for opcode, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument = argument << 8 | low
        if opcode == _LOAD_GLOBAL:
            loaded.add(code.co_names[argument >> 1])  # the lowest bit is about something else
        elif opcode == _LOAD_NAME:
            loaded.add(code.co_names[argument])
        elif opcode == _IMPORT_NAME:
            imported.add(code.co_names[argument].partition(".")[0])
        if opcode != dis.EXTENDED_ARG:
            argument = 0
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            for names, more in zip((loaded, named, imported), _names(inner), strict=True):
                names |= more
    return loaded, named, imported


def _text(module: Any) -> str:
    """A `__module__` that is a name; empty for others, such as the descriptor of a class that Cython made."""
    return module if type(module) is str else ""


def _is_skipped(module: Any, search: _Search) -> bool:
    package = _text(module).partition(".")[0]
    code = sys.modules.get(_text(module))
    if package.startswith("torch") or (code is not None and "torch" in vars(code)):
        search.names_torch = True
    return package in _SKIPPED
