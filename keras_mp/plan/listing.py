"""The files of a directory, their labels, and which of them are for training: the choice that `keras.utils` makes.

For the same seed the same files stand in the same order as with Keras, and the same ones are for validation: both
lists are shuffled by `numpy.random.RandomState(seed)` and the end of them is cut off. Nothing is read but the names.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_mp.checks import check_choice, check_count
from keras_mp.errors import short_repr

LabelMode = Literal["int", "categorical", "binary"]
Subset = Literal["training", "validation", "both"]

_MAX_SEED = 2**32 - 1  # of numpy.random.RandomState


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files and their labels: a source whose `[i]` is `(path, label)`, or the path alone.

    Attributes:
        paths: the files, in the order of the source.
        labels: one a file: an int32 array of shape (files,), a float32 array of shape (files, 1) for "binary" or
            (files, classes) for "categorical"; None: no labels.
        class_names: the classes in the order of their numbers; None without labels.
    """

    paths: Sequence[str]
    labels: np.ndarray[Any, Any] | None
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.paths[index] if self.labels is None else (self.paths[index], self.labels[index])

    def part(self, part: slice) -> Listing:
        """Some of the files, with their labels."""
        return Listing(self.paths[part], None if self.labels is None else self.labels[part], self.class_names)


def list_directory(
    directory: Any,
    labels: Any,
    label_mode: Any,
    class_names: Sequence[str] | None,
    formats: tuple[str, ...],
    shuffle: bool,
    seed: int | None,
    follow_links: bool,
) -> Listing:
    """Lists the files of a directory with one of `formats`, in alphabetical order or shuffled by `seed`.

    Args:
        directory: where the files are; with labels="inferred", in a folder for each class.
        labels: "inferred", None, or the files' labels in their alphabetical order.
        label_mode: "int", "categorical", "binary" or None.
        class_names: with labels="inferred", the classes to take, in the order of their numbers.
        formats: endings of file names, in lower case.
        shuffle: whether to shuffle the files. Without a seed they stay in order.
        seed: for the shuffle.
        follow_links: whether to go into directories that are links.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
        TypeError, ValueError: an argument is of the wrong kind or does not fit the directory.
    """
    _check_labels(labels, label_mode, class_names)
    root = _check_directory(directory)
    if label_mode is None:
        labels = None
    numbers: list[int] | None
    if isinstance(labels, str):
        names = _class_folders(root, class_names)
        files = [_files_below(os.path.join(root, name), formats, follow_links) for name in names]
        paths = [path for found in files for path in found]
        numbers = [number for number, found in enumerate(files) for _ in found]
    else:
        paths = _files_below(root, formats, follow_links)
        numbers = None if labels is None else _check_numbers(labels, len(paths), root)
        names = [] if numbers is None else [str(number) for number in sorted(set(numbers))]
    if not paths:
        inside = " in its folders, one for each class; pass labels=None for files without" if labels is not None else ""
        raise ValueError(f"directory={root!r} has no file that ends in {', '.join(formats)}{inside}")
    if shuffle and seed is not None:
        # Two generators of the same state, as the shuffles of two lists of one length draw the same numbers.
        np.random.RandomState(seed).shuffle(paths)
        if numbers is not None:
            np.random.RandomState(seed).shuffle(numbers)
    if numbers is None:
        return Listing(paths, None, None)
    return Listing(paths, _encoded(numbers, label_mode, names), names)


def split_listing(listing: Listing, validation_split: float | None, subset: Subset | None) -> list[Listing]:
    """The part that `subset` names, or both; the last `validation_split` of the files are for validation.

    Raises:
        ValueError: one of the parts would be empty.
    """
    if not validation_split:
        return [listing]
    count = int(validation_split * len(listing))
    if not 0 < count < len(listing):
        raise ValueError(
            f"validation_split={validation_split} of {len(listing)} files leaves {count} for validation and "
            f"{len(listing) - count} for training; there must be at least one file in each"
        )
    parts = {"training": listing.part(slice(-count)), "validation": listing.part(slice(-count, None))}
    return list(parts.values()) if subset == "both" else [parts[str(subset)]]


def check_split(validation_split: Any, subset: Any, shuffle: bool, seed: Any) -> None:
    """Checks the arguments that say which files are for validation.

    Raises:
        TypeError, ValueError: they do not fit together.
    """
    if validation_split is not None and (
        isinstance(validation_split, bool) or not isinstance(validation_split, int | float)
    ):
        raise TypeError(f"validation_split must be a float or None, got {short_repr(validation_split, 80)}")
    if validation_split and not 0 < validation_split < 1:
        raise ValueError(f"validation_split must be between 0 and 1, got {validation_split!r}")
    if subset is not None:
        check_choice(subset, "subset", ("training", "validation", "both"))
    if bool(validation_split) != bool(subset):
        raise ValueError(
            f"validation_split and subset go together, got validation_split={validation_split!r} and "
            f"subset={subset!r}; pass both or none"
        )
    if validation_split and shuffle and seed is None:
        raise ValueError(
            "validation_split with shuffle=True needs a seed=, so that the files for training and for validation do "
            "not overlap; pass the same seed for both, or shuffle=False"
        )
    if seed is not None and check_count(seed, "seed", 0) > _MAX_SEED:
        raise ValueError(f"seed must be at most {_MAX_SEED}, got {seed}; the shuffle of files takes no more")


def _check_directory(directory: Any) -> str:
    try:
        root = os.fsdecode(directory)
    except TypeError:
        raise TypeError(f"directory must be a path, got {short_repr(directory, 80)}") from None
    if not os.path.exists(root):
        raise FileNotFoundError(f"directory={root!r} does not exist (from {os.getcwd()!r})")
    if not os.path.isdir(root):
        raise NotADirectoryError(f"directory={root!r} is a file; pass the folder that holds the files")
    return root


def _check_labels(labels: Any, label_mode: Any, class_names: Any) -> None:
    if label_mode is not None:
        check_choice(label_mode, "label_mode", ("int", "categorical", "binary"))
    if isinstance(labels, bytes) or (isinstance(labels, str) and labels != "inferred"):
        raise ValueError(f"labels must be 'inferred', None or a list of numbers, got {labels!r}")
    if not isinstance(labels, str | Sequence | np.ndarray | None):
        raise TypeError(f"labels must be 'inferred', None or a list of numbers, got {short_repr(labels, 80)}")
    if class_names is None:
        return
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        raise TypeError(f"class_names must be a list of folder names, got {short_repr(class_names, 80)}")
    if not isinstance(labels, str):
        raise ValueError(
            f"class_names goes with labels='inferred' only, got labels={short_repr(labels, 80)} and "
            f"class_names={short_repr(class_names, 80)}; leave class_names out"
        )


def _class_folders(root: str, class_names: Sequence[str] | None) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(
            f"directory={root!r} has no folders to infer labels from; pass labels=None, or a list with a label a file"
        )
    if class_names is None:
        return found
    names = list(class_names)
    if unknown := [name for name in names if name not in found]:
        raise ValueError(
            f"class_names has {unknown}, but the folders of directory={root!r} are {short_repr(found, 200)}; pass "
            "these, or some of them"
        )
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"class_names must name each folder once, got {names}")
    return names


def _files_below(directory: str, formats: tuple[str, ...], follow_links: bool) -> list[str]:
    """Paths of the files in a directory and in those below it, in the order in which Keras lists them."""
    walk = sorted(os.walk(directory, followlinks=follow_links), key=lambda entry: entry[0])
    return [
        os.path.join(folder, name) for folder, _, names in walk for name in sorted(names) if _ends_in(name, formats)
    ]


def _ends_in(name: str, formats: tuple[str, ...]) -> bool:
    return name.lower().endswith(formats)


def _check_numbers(labels: Sequence[int], count: int, root: str) -> list[int]:
    if len(labels) != count:
        raise ValueError(
            f"labels has {len(labels)} entries, but directory={root!r} has {count} files; pass one for each, in the "
            "alphabetical order of their paths"
        )
    return [check_count(label, f"labels[{number}]", 0) for number, label in enumerate(labels)]


def _encoded(numbers: list[int], label_mode: Any, names: list[str]) -> np.ndarray[Any, Any]:
    if label_mode == "int":
        return np.array(numbers, np.int32)
    if label_mode == "binary" and len(names) != 2:
        raise ValueError(f"label_mode='binary' needs exactly two classes, got {len(names)}: {short_repr(names, 200)}")
    if numbers and max(numbers) >= len(names):
        raise ValueError(
            f"label_mode={label_mode!r} needs labels from 0 to {len(names) - 1} for {len(names)} classes, got "
            f"{max(numbers)}; number them from 0 without gaps"
        )
    if label_mode == "binary":
        return np.array(numbers, np.float32)[:, None]
    return np.eye(len(names), dtype=np.float32)[numbers]
