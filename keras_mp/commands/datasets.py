"""From `package.module:name` to a dataset; what stands in the way is said in one line."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import keras

from keras_mp.commands.errors import CommandError
from keras_mp.commands.target import describe_error, import_target
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
    module, path = import_target(target)
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
        raise CommandError(f"{target}() failed: {describe_error(error)}") from error
