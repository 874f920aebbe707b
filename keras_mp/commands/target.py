"""From `package.module:name` to a dataset; what stands in the way is said in one line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from types import ModuleType
from typing import Any

import keras

from keras_mp.commands.errors import CommandError
from keras_mp.dataset import parallelize
from keras_mp.errors import short_repr
from keras_mp.loaded import LoadedDataset

_KINDS = "a keras_mp.PoolDataset, a keras.utils.PyDataset, or a function without arguments that returns one"


def load_dataset(target: str) -> LoadedDataset:
    """The dataset that `target` names, with the current folder on the path.

    Args:
        target: "package.module:name", where the name may have dots; what it names is a dataset, or is called for one.
            A `PyDataset` that is none of ours gets workers by `parallelize`.

    Raises:
        CommandError: there is none; the message says what to do.
    """
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise CommandError(f"{target!r} must name a module and a dataset in it, such as mymodule:train")
    if module_name.endswith(".py") or os.sep in module_name:
        module_name = module_name.removesuffix(".py").removeprefix("./").replace(os.sep, ".").strip(".")
        raise CommandError(f"{target!r} names a file; name the module: {module_name}:{path}")
    module = _import(module_name)
    value = _look_up(module, path)
    if callable(value) and not isinstance(value, keras.utils.PyDataset):
        value = _call(value, target)
    if isinstance(value, LoadedDataset):
        return value
    if isinstance(value, keras.utils.PyDataset):
        try:
            return parallelize(value)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{target}: {error}") from error
    raise CommandError(f"{target} is {short_repr(value, 60)}, a {type(value).__name__}; name {_KINDS}")


def _import(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise CommandError(f"{name} cannot be imported: {_describe(error)}") from error
        raise CommandError(
            f"no module {error.name!r} here; run this in the folder that {error.name.partition('.')[0]} is in, or "
            f"install it (this folder is {here})"
        ) from error
    except (Exception, SystemExit) as error:
        raise CommandError(f"{name} cannot be imported: {_describe(error)}") from error


def _look_up(module: ModuleType, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError as error:
            found = sorted(
                other for other, at in vars(module).items() if isinstance(at, keras.utils.PyDataset) or _makes_one(at)
            )
            hint = f"it has {', '.join(found)}" if found else f"define {_KINDS} there"
            raise CommandError(f"{module.__name__} has no {path!r}; {hint}") from error
    return value


def _makes_one(value: Any) -> bool:
    """Whether a function says that it returns a dataset."""
    if not inspect.isfunction(value):
        return False
    returned = value.__annotations__.get("return", "")
    return "Dataset" in (returned if isinstance(returned, str) else getattr(returned, "__name__", ""))


def _call(factory: Any, target: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise CommandError(f"{target} cannot be called without arguments ({error}); name {_KINDS}") from error
    except ValueError:
        pass  # built-in functions without a signature
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise CommandError(f"{target}() failed: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
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
