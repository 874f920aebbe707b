"""What the commands have in common in what they print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keras_mp.commands.errors import CommandError
from keras_mp.report import words


def seconds_in_words(seconds: float) -> str:
    """A time with a unit that suits it and three digits."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    return words.seconds(seconds)


def rate_in_words(rate: float) -> str:
    """So many a second, with about three digits."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes what was found to a file, if there is to be one.

    Raises:
        CommandError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from error
