"""From `package.module:name` to that module; what stands in the way is said in one line. Imports nothing of Keras's."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType

from keras_mp.commands.errors import CommandError


def import_target(target: str) -> tuple[ModuleType, str]:
    """The module that `target` names, with the current folder on the path, and the name in it.

    Args:
        target: "package.module:name".

    Raises:
        CommandError: there is no such module, or it cannot be imported; the message says what to do.
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise CommandError(f"{target!r} must name a module and a dataset in it, such as mymodule:train")
    if module_name.endswith(".py") or os.sep in module_name:
        module_name = module_name.removesuffix(".py").removeprefix("./").replace(os.sep, ".").strip(".")
        raise CommandError(f"{target!r} names a file; name the module: {module_name}:{path}")
    return _import(module_name), path


def _import(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise CommandError(f"{name} cannot be imported: {describe_error(error)}") from error
        raise CommandError(
            f"no module {error.name!r} here; run this in the folder that {error.name.partition('.')[0]} is in, or "
            f"install it (this folder is {here})"
        ) from error
    except (Exception, SystemExit) as error:
        raise CommandError(f"{name} cannot be imported: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """What was raised, and where in the user's code; on one line."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__]
        own = [frame for frame in theirs if frame.filename.startswith(os.getcwd())]
        frame = (own or theirs or list(frames))[-1]
        where = f"{frame.filename}, line {frame.lineno}"
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:300]} ({where})" if text else f"{kind} ({where})"
