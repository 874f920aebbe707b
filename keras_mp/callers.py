"""Who is calling: Keras or somebody else, and from which call of `fit`, `evaluate` or `predict`.

A dataset is told little: it is asked for numbers, for batches, and its hooks are called. A callback of the user's asks
for the same things in the middle of a pass. Whose code calls tells them apart, and so does, for two passes at once, the
public method of the model that each runs in. Should Keras's code be found nowhere, all callers count as one.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import multiprocessing
import sys
import threading
from collections.abc import Iterable
from types import CodeType, FrameType

import keras

from keras_mp.errors import SampleFailure, warn_user


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `fit`, `evaluate` or `predict`, told by where it stands on its thread's stack.

    Attributes:
        thread: its thread.
        frames: from the outermost to that of the method, the code and (but for the method's own, which goes on) the
            instruction that calls the next.
        at: the instruction of the method that it was at.
        shuffle: what the method was given as `shuffle`; False if it takes no such argument.
        steps: what it was given as `steps_per_epoch` or `steps`.
    """

    thread: int
    frames: tuple[tuple[CodeType, int], ...]
    at: int = dataclasses.field(compare=False)
    shuffle: bool = dataclasses.field(compare=False)
    steps: int | None = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.frames[-1][0].co_name

    @property
    def is_running(self) -> bool:
        """Whether the call has not returned."""
        frame = sys._current_frames().get(self.thread)
        stack: list[FrameType] = []
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        stack.reverse()
        if len(stack) < len(self.frames):
            return False
        *outer, (method, _) = self.frames
        same = all(f.f_code is code and f.f_lasti == at for f, (code, at) in zip(stack, outer, strict=False))
        return same and stack[len(outer)].f_code is method


def current_call() -> Call | None:
    """The innermost call of a model's method that this code runs in."""
    frame: FrameType | None = sys._getframe(1)
    methods = _methods()
    while frame is not None and frame.f_code not in methods:
        frame = frame.f_back
    if frame is None:
        return None
    arguments = frame.f_locals
    frames, at, shuffle = [(frame.f_code, 0)], frame.f_lasti, bool(arguments.get("shuffle", False))
    steps = arguments.get("steps_per_epoch", arguments.get("steps"))
    if isinstance(arguments, dict):  # before Python 3.13: a copy, which would keep what it holds (weights) for long
        arguments.clear()
    while (frame := frame.f_back) is not None:
        frames.append((frame.f_code, frame.f_lasti))
    return Call(threading.get_ident(), tuple(reversed(frames)), at, shuffle, steps)


def fixes_shapes(number: int) -> bool:
    """Whether Keras, asking for this batch outside of a pass on TensorFlow, may do so to fix a signature by it."""
    in_pool = multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread()
    return number in (0, 1) and not in_pool and current_call() is not None


def is_keras(frame: FrameType | None, called: object) -> bool:
    """Whether `frame` is of Keras's code; methods of `called` itself, as in a subclass, stand for who called them."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "keras":
            return True
        code = frame.f_code
        if not code.co_argcount or frame.f_locals.get(code.co_varnames[0]) is not called:
            return False
        frame = frame.f_back
    return False


def warn_of_keras_pool() -> None:
    """Tells the user where Keras's own pool does not give each batch once."""
    if keras.backend.backend() != "tensorflow":
        warn_user(
            f"keras_mp: pool='keras' on {keras.backend.backend()}: where Keras builds a model, or its metrics, from "
            "one batch, its own queue serves what it had read ahead for that in the next pass, so that batches are "
            "repeated and others left out in every epoch. Leave out pool= (each sample then comes once), or call fit() "
            "on data of the same shapes first"
        )


def warn_of_left_out(failures: Iterable[SampleFailure]) -> None:
    """Tells the user of failed samples in a process of Keras's, from which `failures` reaches nobody."""
    if multiprocessing.parent_process() is not None:
        for failure in failures:
            warn_user(f"keras_mp: left out or replaced: {failure.describe()}")


@functools.cache
def _methods() -> frozenset[CodeType]:
    methods = (getattr(keras.Model, name) for name in ("fit", "evaluate", "predict"))
    return frozenset(inspect.unwrap(method).__code__ for method in methods)
