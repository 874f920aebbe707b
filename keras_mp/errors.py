"""The exception tree, and the record of a sample that failed.

Everything keras_mp raises on purpose derives from `KerasMPError`. A message must say all there is to say: `fit` on the
TensorFlow backend hands the user nothing but its text.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import warnings
from typing import Any, cast

import numpy as np

__all__ = [
    "BatchTimeout",
    "KerasMPError",
    "PoolClosed",
    "SampleError",
    "SampleFailure",
    "TooManyFailures",
    "WorkerCrashed",
]


class KerasMPError(Exception):
    """Base of every error raised by keras_mp."""


class SampleError(KerasMPError):
    """User code (source, transform, collate or batch_transform) failed.

    Raised as an instance of the original type too, where Python allows that, so `except ValueError` keeps working;
    the original is the `__cause__` and the worker's traceback is in the text.

    Attributes:
        failure: the `SampleFailure` that says what failed and where.
    """

    failure: SampleFailure
    note: str = ""


class WorkerCrashed(KerasMPError):
    """Worker processes died on the same batch twice, or cannot start at all."""


class BatchTimeout(KerasMPError):
    """A batch took longer than `timeout` seconds, twice, or its worker stayed stopped."""


class TooManyFailures(KerasMPError):
    """More samples of an epoch failed than `max_failures` allows."""


class StreamEnded(KerasMPError, IndexError):
    """There is no such batch: the epoch of the stream has ended before it.

    Attributes:
        failures: what failed behind the last batch.
    """

    failures: tuple[SampleFailure, ...] = ()


class PoolClosed(KerasMPError):
    """The dataset or pool was used after `close()`."""


@dataclasses.dataclass(frozen=True)
class SampleFailure:
    """One failed sample (or, with `index=None`, a failure of the whole batch).

    Attributes:
        stage: the user code that failed: "source", "read" (of a stream), "load", "cache" (what `load` gave cannot be
            kept), "transform", "collate", "batch_transform", or a bucket's "lengths".
        index: position of the sample in the source, of a stream's that of its shard; None when the batch as a whole
            failed.
        item: shortened `repr` of what the source held there.
        epoch: epoch number, from 0.
        batch: batch number within the epoch, from 0.
        type: name of the exception's class.
        message: the exception's text.
        traceback: the formatted traceback, from the process that ran the code.
        where: that process, in words.
        replaced_by: position in the source of the sample that was served in its place; None where it was left out.
        offset: of a stream: how many samples stand before it in its shard.
    """

    stage: str
    index: int | None
    item: str
    epoch: int
    batch: int
    type: str
    message: str
    traceback: str
    where: str
    replaced_by: int | None = None
    offset: int | None = None

    def describe(self) -> str:
        """One line: what failed, on which sample of which batch, and how."""
        sample = "" if self.index is None else f"sample {self.index} ({self.item}), "
        if self.offset is not None:
            sample = f"sample {self.offset} of shard {self.index} ({self.item}), "
        reason = f"{self.type}: {self.message}" if self.message else self.type
        return f"{self.stage} failed on {sample}batch {self.batch} of epoch {self.epoch}: {reason}"

    @classmethod
    def of(cls, error: BaseException, **where: Any) -> SampleFailure:
        """Records `error`; `where` gives the remaining fields."""
        text = "".join(traceback.format_exception(error))
        try:
            message = "".join([str(error)])  # a plain str, whatever `__str__` returned: it travels by pickle
        except Exception as failed:
            message = f"<its __str__ raised {type(failed).__name__}>"
        return cls(type=type(error).__qualname__, message=message, traceback=text, **where)


def sample_error(failure: SampleFailure, cause: BaseException | None, note: str = "") -> SampleError:
    """Builds the `SampleError` for `failure`, of the type of `cause` too where Python allows that combination."""
    text = f"{failure.describe()}{note}\n\nTraceback from {failure.where}:\n{failure.traceback}"
    error: Any = None
    if isinstance(cause, Exception) and not isinstance(cause, KerasMPError | StopIteration | StopAsyncIteration):
        for bases in ((SampleError, type(cause)), (type(cause), SampleError)):  # MemoryError must come first
            try:
                both: Any = type("SampleError", bases, {"__reduce__": _reduce, "__str__": _text})
                error = both.__new__(both, text)  # not __init__: the original's may want other arguments
                error.args = (text,)
                break
            except Exception:  # some types cannot be subclassed, or have a layout of their own
                error = None
    if error is None:
        error = SampleError(text)
    error.failure = failure
    error.note = note
    error.__cause__ = cause
    return cast(SampleError, error)


def _text(self: SampleError) -> str:
    # KeyError and others print the repr of their argument, which would squeeze the traceback into one line.
    return str(self.args[0])


def _reduce(self: SampleError) -> tuple[Any, ...]:
    return sample_error, (self.failure, self.__cause__, self.note)


def warn_user(text: str) -> None:
    """Warns (RuntimeWarning), and names as its place the line of the user's own that led here, past Keras's code."""
    packages = [module for name in ("keras_mp", "keras", "tensorflow") if (module := sys.modules.get(name))]
    inside = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in packages)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def short_repr(value: Any, limit: int = 200) -> str:
    """`repr` on one line of at most `limit` characters, with an array's shape and dtype in its place; never fails."""
    try:
        text = _describe(value, nested=False)
    except Exception as error:  # a repr of the user's that fails must not hide the failure being reported
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _describe(value: Any, nested: bool) -> str:
    if hasattr(type(value), "__array__") and not isinstance(value, np.generic):
        name = "array" if isinstance(value, np.ndarray) else type(value).__name__
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"{name} of shape {tuple(shape)}, dtype {getattr(value, 'dtype', None)}"
    if nested:
        return repr(value)
    if type(value) is dict:
        return f"{{{', '.join(f'{key!r}: {_describe(part, True)}' for key, part in value.items())}}}"
    if type(value) is list:
        return f"[{', '.join(_describe(part, True) for part in value)}]"
    if type(value) is tuple:
        return f"({', '.join(_describe(part, True) for part in value)}{',' * (len(value) == 1)})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=False)
        return f"{type(value).__name__}({', '.join(f'{name}={_describe(part, True)}' for name, part in parts)})"
    return repr(value)
