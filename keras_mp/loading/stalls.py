"""What is said of a sample that has taken a minute and more: which it is, and where in its code it stands."""

from __future__ import annotations

import pathlib
import sys
import traceback

from keras_mp.loading.base import SAMPLES_DONE

STALL_S = 60.0  # at one sample
_HEADING = "(most recent call first):"  # faulthandler's, over each traceback
_OUR_CODE = str(pathlib.Path(__file__).resolve().parent)


def describe_stall(
    batch: str, position: int, index: int | None, seconds: float, where: str, remedy: str, stack: str
) -> str:
    """The warning.

    Args:
        batch: its name.
        position: of the sample in its request.
        index: of the sample in the source; None: that cannot be told.
        seconds: that it has taken so far.
        where: the process or thread.
        remedy: what would end it, in a sentence.
        stack: as faulthandler writes it: innermost call first; empty if that is not known.
    """
    if position == SAMPLES_DONE:
        at = "has been put together"
    else:
        at = "has been at a sample" if index is None else f"has been at sample {index}"
    stands = f" It stands here, innermost call first:\n{_of_the_users(stack)}" if stack else ""
    return f"keras_mp: {batch} {at} for {seconds:.0f} s, in {where}. {remedy}{stands}"


def stack_of(thread: int) -> str:
    """Where a thread of this process stands, in the form of faulthandler; empty if it has ended."""
    frame = sys._current_frames().get(thread)
    calls = reversed(traceback.extract_stack(frame)) if frame is not None else ()
    return "\n".join(f'  File "{call.filename}", line {call.lineno} in {call.name}' for call in calls)


def _of_the_users(stack: str) -> str:
    """A stack without what is ours and below."""
    lines = stack.rpartition(_HEADING)[2].strip().splitlines()  # one that was asked for before may stand above it
    ours = next((number for number, line in enumerate(lines) if _OUR_CODE in line), len(lines))
    return "\n".join(lines[:ours] or lines)
