"""Checks of constructor arguments: each error names the argument, the value received and the fix."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import secrets
from collections.abc import Mapping
from typing import Any

from keras_mp.errors import short_repr


def check_source(source: Any, name: str = "source") -> int:
    """The length of a source.

    Raises:
        TypeError: it has no `len()` or no `[i]`.
        ValueError: it is empty.
    """
    if isinstance(source, str | bytes | Mapping | set | frozenset):
        raise TypeError(
            f"{name} must be a sequence of samples, got a {type(source).__name__}: {short_repr(source, 80)}; pass a "
            "list, such as sorted(directory.glob('*.npy')) or list(mapping.items()), or one value of a mapping"
        )
    _check_not_a_table(source, name)
    if isinstance(source, tuple) and _is_of_columns(source):
        raise TypeError(
            f"{name} must be a sequence of samples, got {short_repr(source, 120)}, which are {len(source)} arrays and "
            f"not their rows; pass keras_mp.zip({', '.join(['X', 'y', 'sample_weight'][: len(source)])}), or, if each "
            f"array is one sample, list({name})"
        )
    if not hasattr(source, "__getitem__"):
        raise TypeError(
            f"{name} must have len() and [i], got {short_repr(source, 80)}; pass list({name}) if it is iterable"
        )
    try:
        length = length_of(source)
    except TypeError as error:
        raise TypeError(f"{name} must have len() and [i], got {short_repr(source, 80)}: {error}") from None
    if length == 0:
        raise ValueError(f"{name} is empty, got {short_repr(source, 80)}; a dataset needs at least one sample")
    return length


def _check_not_a_table(source: Any, name: str) -> None:
    """Refuses what pandas, polars and Arrow have for tables and columns, whose `[i]` is no row.

    Raises:
        TypeError: it is one; the message says how to get its rows.
    """
    kind = type(source).__name__
    if hasattr(source, "iloc"):
        if getattr(source, "ndim", 2) == 1:
            reason = f"but a {kind} is asked by the labels of its index; pass {name}.to_numpy()"
        else:
            reason = f"but a {kind} gives columns; pass {name}.to_dict('records') or {name}.to_records(index=False)"
    elif hasattr(source, "iter_rows") and hasattr(source, "row"):
        reason = f"but a {kind} gives a {kind}; pass {name}.rows(named=True), or an object whose [i] is its row(i)"
    elif hasattr(source, "to_pylist") and hasattr(source, "column_names"):
        reason = f"but a {kind} gives columns; pass {name}.to_pylist(), or a datasets.Dataset of it"
    else:
        return
    raise TypeError(f"{name} must give a row for [i], {reason}. See docs/sources.md")


def length_of(source: Any) -> int:
    """How many samples a source has: its `len()`, or `shape[0]` of one that has none (SciPy's csr, Zarr 3).

    Raises:
        TypeError: it has neither.
    """
    try:
        return len(source)
    except TypeError:
        shape = getattr(source, "shape", None)
        if isinstance(shape, tuple) and shape and hasattr(shape[0], "__index__"):
            return operator.index(shape[0])
        raise


def _is_of_columns(source: tuple[Any, ...]) -> bool:
    """Whether a tuple looks like `(X, y)`: two or three things with rows, one of them an array at least."""
    if len(source) not in (2, 3) or any(isinstance(part, str | bytes) for part in source):
        return False
    shapes = [getattr(part, "shape", None) for part in source]
    have_rows = [bool(shape) or isinstance(part, list) for part, shape in zip(source, shapes, strict=True)]
    return any(shapes) and all(have_rows)


def check_count(value: Any, name: str, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        TypeError, ValueError: it is not.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {short_repr(value, 80)}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_count_or_none(value: Any, name: str) -> int | None:
    """A whole number of at least 1, or None.

    Raises:
        TypeError, ValueError: it is neither.
    """
    return None if value is None else check_count(value, name)


def check_callable(value: Any, name: str) -> Any:
    """A callable or None.

    Raises:
        TypeError: it is neither.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, got {short_repr(value, 80)}")
    return value


def check_seed(seed: int | None) -> int:
    """The seed, drawn now if there is none.

    Raises:
        TypeError, ValueError: it is not None or an int of at least 0.
    """
    return secrets.randbits(31) if seed is None else check_count(seed, "seed", 0)


def check_timeout(timeout: float | None) -> float | None:
    """Seconds, or None.

    Raises:
        TypeError, ValueError: it is not a positive number.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds or None, got {short_repr(timeout, 80)}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}; None waits without a limit")
    return float(timeout)


def check_max_failures(value: float | None) -> float | None:
    """A count (int), a share (float up to 1), or None.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"max_failures as a float is a share of the epoch from 0.0 to 1.0, got {value!r}; a count is an int"
            )
        return value
    return None if value is None else check_count(value, "max_failures", 0)


def check_choice(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    """One of `choices`.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {short_repr(value, 80)}")
    return value


_MAX_WORKERS = 4096
_UNKNOWN_MEMORY_BYTES = 4 << 30  # assumed where the system does not tell (Windows)


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its cgroup's CPU quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def available_memory() -> int:
    """Bytes of memory that this process may still take: what the system has available, within its cgroup's limit."""
    available = _UNKNOWN_MEMORY_BYTES
    if hasattr(os, "sysconf"):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo") as file:
            available = 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            available = min(available, max(0, int(limit.read()) - int(used.read())))
    return available


def check_workers(workers: int | None) -> int:
    """The number of workers that `workers` asks for.

    Raises:
        ValueError, TypeError: it is not None or a whole number from 0 to 4096.
    """
    if workers is None:
        return usable_cores()
    if isinstance(workers, bool) or not hasattr(workers, "__index__"):
        raise TypeError(f"workers must be an int or None, got {workers!r}")
    workers = operator.index(workers)
    if not 0 <= workers <= _MAX_WORKERS:
        raise ValueError(f"workers must be between 0 and {_MAX_WORKERS}, got {workers}; None takes the usable cores")
    return workers
