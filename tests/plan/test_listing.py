"""Which files there are, in which order, with which labels, for training or validation: as Keras chooses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mp

_CLASSES = {"b_dogs": 7, "a_cats": 5, "C_birds": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files that hold their own names, some in folders below their class, some that do not count."""
    root = tmp_path_factory.mktemp("texts")
    for name, count in _CLASSES.items():
        for number in range(count):
            place = root / name / ("below" if number % 3 == 1 else "")
            place.mkdir(parents=True, exist_ok=True)
            path = place / f"{number:02}.{'TXT' if number % 4 == 2 else 'txt'}"
            path.write_text(str(path.relative_to(root)))
    (root / "a_cats" / "notes.md").write_text("no text file")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.txt").write_text("hidden")
    (root / "beside.txt").write_text("beside.txt")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "linked.txt").write_text("linked.txt")
    (root / "b_dogs" / "link").symlink_to(elsewhere)
    return root


def _pairs(dataset: Any) -> list[tuple[bytes, Any]]:
    """Each sample's text, which is its name, and its label as a list, over an epoch in its order."""
    pairs: list[tuple[bytes, Any]] = []
    for batch in dataset:
        texts, labels = batch if isinstance(batch, tuple) else (batch, [None] * len(batch))
        pairs += [
            (bytes(text), np.asarray(label).tolist()) for text, label in zip(np.asarray(texts), labels, strict=True)
        ]
    return pairs


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "seed": {"seed": 3},
    "in order": {"shuffle": False},
    "training": {"validation_split": 0.3, "subset": "training", "seed": 1337},
    "validation": {"validation_split": 0.3, "subset": "validation", "seed": 1337},
    "training, other seed": {"validation_split": 0.2, "subset": "training", "seed": 0},
    "validation in order": {"validation_split": 0.25, "subset": "validation", "shuffle": False},
    "both": {"validation_split": 0.3, "subset": "both", "seed": 42},
    "both in order": {"validation_split": 0.5, "subset": "both", "shuffle": False},
    "categorical": {"label_mode": "categorical", "seed": 5},
    "binary": {"label_mode": "binary", "class_names": ["b_dogs", "a_cats"], "seed": 5},
    "no label mode": {"label_mode": None, "seed": 5},
    "no labels": {"labels": None, "seed": 5},
    "some classes, in another order": {"class_names": ["b_dogs", "C_birds"], "seed": 9},
    "labels": {"labels": [number % 4 for number in range(23)], "seed": 2},
    "labels as a tuple, categorical": {"labels": (0, 1) * 11 + (0,), "label_mode": "categorical", "shuffle": False},
    "labels in training": {
        "labels": [7 * (number % 3) for number in range(23)],
        "seed": 8,
        "validation_split": 0.4,
        "subset": "training",
    },
    "links": {"follow_links": True, "seed": 4},
}


@pytest.mark.parametrize("arguments", _ARGUMENTS.values(), ids=_ARGUMENTS.keys())
def test_files_and_labels_are_those_of_keras(folder: Path, arguments: dict[str, Any]) -> None:
    # Keras shuffles a list of labels where it stands, and no tuple.
    copies = {name: list(value) if name == "labels" and value else value for name, value in arguments.items()}
    theirs = keras.utils.text_dataset_from_directory(folder, verbose=False, batch_size=4, **copies)
    ours = keras_mp.text_dataset_from_directory(folder, verbose=False, batch_size=4, workers=0, **arguments)
    both = arguments.get("subset") == "both"
    assert isinstance(ours, tuple) == both
    for part, (expected, dataset) in enumerate(zip(theirs, ours, strict=True) if both else [(theirs, ours)]):
        assert dataset.class_names == expected.class_names
        pairs, known = _pairs(dataset), _pairs(expected)
        if arguments.get("shuffle", True) and part == 0:
            assert sorted(pairs) == sorted(known)
        else:
            assert pairs == known


@pytest.mark.parametrize("seed", [0, 1, 1337, 2**32 - 1])
@pytest.mark.parametrize("subset", ["training", "validation"])
def test_the_order_of_files_is_that_of_keras(tmp_path: Path, seed: int, subset: str) -> None:
    for number in range(50):
        path = tmp_path / f"class_{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    options: dict[str, Any] = {"seed": seed, "subset": subset, "validation_split": 0.22, "verbose": False}
    theirs = keras.utils.image_dataset_from_directory(tmp_path, **options)
    assert keras_mp.image_dataset_from_directory(tmp_path, **options).file_paths == theirs.file_paths


def test_without_a_seed_the_files_are_in_order_and_the_epochs_are_not(folder: Path) -> None:
    with keras_mp.text_dataset_from_directory(folder, verbose=False, workers=0, batch_size=4) as dataset:
        assert dataset.file_paths == sorted(dataset.file_paths)
        first, second = _pairs(dataset), _pairs(dataset)
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_list_of_labels_is_left_as_it_is(folder: Path) -> None:
    labels = list(range(23))
    keras_mp.text_dataset_from_directory(folder, labels=labels, seed=1, verbose=False)
    assert labels == list(range(23))


def test_what_was_found_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"validation_split": 0.3, "subset": "both", "seed": 1}
    keras.utils.text_dataset_from_directory(folder, **options)
    theirs = capsys.readouterr().out
    keras_mp.text_dataset_from_directory(folder, **options)
    assert capsys.readouterr().out == theirs
    keras_mp.text_dataset_from_directory(folder, verbose=False)
    assert capsys.readouterr().out == ""
