"""What ends a command."""

from __future__ import annotations


class CommandError(Exception):
    """What the user is told in one line before the command ends with exit code 2; its cause, if they ask for it."""
