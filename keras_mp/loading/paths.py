"""Paths: where a leaf is in a sample, and how users name it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[Any, ...]  # keys of dicts and positions in tuples, from the outermost


def describe_path(path: Path) -> str:
    """Such as "sample['x'][0]"."""
    return "sample" + "".join(f"[{key!r}]" for key in path)


def readings(key: Any) -> list[Path]:
    """What a user's path may mean: a key, a tuple of them, or keys with slashes between them."""
    if isinstance(key, tuple):
        return [key]
    if isinstance(key, str) and "/" in key:
        return [(key,), tuple(int(part) if part.isdecimal() else part for part in key.split("/"))]
    return [(key,)]


def pick(given: Any, path: Path, default: Any) -> Any:
    """What was given for the leaf at `path`: all leaves' value, or a dict's for the longest path that leads there."""
    if not isinstance(given, Mapping):
        return given
    best, chosen = -1, default
    for key, value in given.items():
        for reading in readings(key):
            if len(reading) > best and path[: len(reading)] == reading:
                best, chosen = len(reading), value
    return chosen


def unused_keys(given: Any, paths: Iterable[Path]) -> list[Any]:
    """The keys of a dict of paths that lead to none of `paths`."""
    if not isinstance(given, Mapping):
        return []
    known = list(paths)
    return [
        key for key in given if not any(path[: len(reading)] == reading for reading in readings(key) for path in known)
    ]
