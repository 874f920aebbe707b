"""The `*_from_directory` functions as users call them: workers, training, truncated files, bad arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import keras_mp
from tests.support import run_script
from tests.transforms import flipped_or_not

_FUNCTIONS = [
    "image_dataset_from_directory",
    "text_dataset_from_directory",
    "audio_dataset_from_directory",
    "timeseries_dataset_from_array",
]


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_arguments_and_defaults_are_those_of_keras(name: str) -> None:
    theirs = inspect.signature(getattr(keras.utils, name)).parameters
    ours = inspect.signature(getattr(keras_mp, name)).parameters
    shared = {key: value for key, value in ours.items() if value.kind is value.POSITIONAL_OR_KEYWORD}
    shared = {key: value for key, value in shared.items() if key != "format" or key in theirs}  # new in Keras 3.13
    assert [(key, value.default) for key, value in shared.items()] == [(k, v.default) for k, v in theirs.items()]
    assert ours["transform"].default is None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photographs of two classes, one bright and one dark; the last but one of each is truncated."""
    for number in range(12):
        name, level = ("bright", 190) if number % 2 else ("dark", 60)
        (tmp_path / name).mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).normal(level, 25, (60, 80, 3))
        path = tmp_path / name / f"{number:02}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        if number in (8, 9):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return tmp_path


def _model() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((32, 24, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_truncated_files_are_skipped_and_named(photos: Path, running_pool: keras_mp.WorkerPool) -> None:
    with pytest.raises(tf.errors.OpError):  # Keras's function gives up
        list(keras.utils.image_dataset_from_directory(photos, image_size=(32, 24), verbose=False))
    dataset = keras_mp.image_dataset_from_directory(
        photos, image_size=(32, 24), batch_size=4, on_error="skip", pool=running_pool, seed=0, verbose=False
    )
    with pytest.warns(RuntimeWarning, match="2 of 12 samples failed in epoch 0 and were left out"), dataset:
        history = _model().fit(dataset, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert len(dataset.failures) == 2
    for failure, name in zip(sorted(dataset.failures, key=lambda f: f.item), ["09.jpg", "08.jpg"], strict=True):
        assert name in failure.item
        assert "truncated" in failure.message
        assert failure.type == "OSError"


def test_a_truncated_file_is_an_error_that_names_it(photos: Path, running_pool: keras_mp.WorkerPool) -> None:
    options: dict[str, Any] = {"class_names": ["dark"], "shuffle": False, "verbose": False, "pool": running_pool}
    with keras_mp.image_dataset_from_directory(photos, **options) as dataset:
        with pytest.raises(OSError, match=r"08\.jpg.*truncated") as caught:
            list(dataset)
    assert isinstance(caught.value, keras_mp.SampleError)


def test_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with keras_mp.image_dataset_from_directory(tmp_path, labels=None, workers=0, verbose=False) as dataset:
        with pytest.raises(OSError, match=r"cannot identify image file .*a\.png"):
            list(dataset)


_FLIPPED: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 5,
    "seed": 7,
    "transform": flipped_or_not,
    "on_error": "skip",
    "verbose": False,
}


def test_the_same_batches_wherever_they_are_loaded(photos: Path, running_pool: keras_mp.WorkerPool) -> None:
    """P2, with random numbers in the transform."""
    epochs = []
    for where in ({"workers": 0}, {"pool": running_pool}, {"workers": 2, "use_multiprocessing": False}):
        with (
            pytest.warns(RuntimeWarning, match="2 of 12"),
            keras_mp.image_dataset_from_directory(photos, **_FLIPPED, **where) as dataset,
        ):
            epochs.append([*dataset, *dataset])
    for epoch in epochs[1:]:
        for batch, other in zip(epoch, epochs[0], strict=True):
            for leaf, expected in zip(batch, other, strict=True):
                np.testing.assert_array_equal(leaf, expected)
    images, labels, weights = epochs[0][0]
    assert images.max() <= 1
    assert labels.dtype == np.int32
    assert (weights == 2).all()


def test_a_cache_keeps_what_was_decoded_and_changes_nothing(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    epochs = []
    for cache in (None, "ram", folder, folder):
        with (
            pytest.warns(RuntimeWarning, match="2 of 12"),
            keras_mp.image_dataset_from_directory(photos, workers=1, cache=cache, **_FLIPPED) as dataset,
        ):
            epochs.append([*dataset, *dataset])
            hits = dataset.stats().cache_hits
            assert hits == {0: 0, 1: 10, 2: 10, 3: 20}[len(epochs) - 1]  # two of the twelve cannot be decoded
    for epoch in epochs[1:]:
        for batch, other in zip(epoch, epochs[0], strict=True):
            for leaf, expected in zip(batch, other, strict=True):
                np.testing.assert_array_equal(leaf, expected)


def test_options_of_the_pool_dataset_go_through(photos: Path) -> None:
    dataset = keras_mp.image_dataset_from_directory(
        photos,
        class_names=["dark"],
        batch_size=2,
        drop_remainder=True,
        order=lambda epoch, rng: [0, 1, 2, 0, 1],
        workers=0,
        verbose=False,
    )
    with dataset:
        assert len(dataset) == 2
        labels = np.concatenate([batch[1] for batch in dataset])
    assert labels.tolist() == [0] * 4
    part = keras_mp.image_dataset_from_directory(photos, workers=0, verbose=False, batch_size=3).shard(2, 1)
    assert part.class_names == ["bright", "dark"]
    assert len(part) == 2


def test_both_parts_train_and_validate(photos: Path, running_pool: keras_mp.WorkerPool) -> None:
    train, validation = keras_mp.image_dataset_from_directory(
        photos,
        image_size=(32, 24),
        batch_size=4,
        validation_split=0.25,
        subset="both",
        seed=3,
        on_error="replace",
        pool=running_pool,
        verbose=False,
    )
    assert not set(train.file_paths) & set(validation.file_paths)
    with pytest.warns(RuntimeWarning, match="samples failed"), train, validation:
        history = _model().fit(train, validation_data=validation, epochs=2, verbose=0).history
        exported = [batch[0].shape for batch in train.to_tf_dataset()]
    assert len(history["val_loss"]) == 2
    assert [tuple(shape) for shape in exported] == [(4, 32, 24, 3), (4, 32, 24, 3), (1, 32, 24, 3)]


_TEXTS = ["good \u00fcmlaut", "bad", "", "nul \0 at the end\0", "good good", "bad bad"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number, text in enumerate(_TEXTS):
        place = tmp_path / ("bad" if text.startswith("bad") else "good")
        place.mkdir(exist_ok=True)
        (place / f"{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("max_length", [None, 0, 6])
def test_texts_are_the_strings_of_keras(texts: Path, running_pool: keras_mp.WorkerPool, max_length: int | None) -> None:
    options: dict[str, Any] = {"max_length": max_length, "shuffle": False, "verbose": False}
    ((expected, labels),) = keras.utils.text_dataset_from_directory(texts, **options)
    with keras_mp.text_dataset_from_directory(texts, pool=running_pool, **options) as dataset:
        ((batch, our_labels),) = dataset
        ((tensor, _),) = dataset.to_tf_dataset()
    assert batch.tolist() == expected.numpy().tolist() == tensor.numpy().tolist()
    assert tensor.dtype == tf.string
    np.testing.assert_array_equal(our_labels, labels)


def test_a_model_with_a_text_layer_trains(texts: Path, running_pool: keras_mp.WorkerPool) -> None:
    layer = keras.layers.TextVectorization(max_tokens=9, output_sequence_length=4)
    layer.adapt(_TEXTS)
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            layer,
            keras.layers.Embedding(9, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    with keras_mp.text_dataset_from_directory(texts, batch_size=2, pool=running_pool, verbose=False) as dataset:
        model.fit(dataset, epochs=2, verbose=0)
        model.evaluate(dataset, verbose=0)
        assert model.predict(dataset, verbose=0).shape == (6, 1)


def test_a_transform_makes_numbers_of_texts(texts: Path) -> None:
    with keras_mp.text_dataset_from_directory(
        texts, shuffle=False, workers=0, verbose=False, transform=lambda sample: (len(sample[0].decode()), sample[1])
    ) as dataset:
        ((lengths, labels),) = dataset
    assert lengths.tolist() == [3, 7, 11, 0, 17, 9]
    assert labels.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("strings", [["a", "\u00fc"], [b"a", b"\xff\0"], [np.array(["x", "yy"]), np.array(["z", ""])]])
def test_strings_of_any_dataset_are_string_tensors_for_keras(strings: list[Any]) -> None:
    class Count(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            lengths = tf.strings.length(x)
            return tf.cast(tf.reshape(lengths, (tf.shape(x)[0], -1))[:, :1], tf.float32)

    shape = np.shape(strings[0])
    inputs = keras.Input(shape, dtype="string")
    model = keras.Model(inputs, Count()(inputs))
    with keras_mp.PoolDataset(strings * 2, batch_size=2, workers=0) as dataset:
        lengths = model.predict(dataset, verbose=0)
        exported = model.predict(dataset.to_tf_dataset(), verbose=0)
    first = [np.ravel(np.asarray(text))[0] if shape else text for text in strings * 2]
    expected = [[len(text if isinstance(text, bytes) else str(text).encode())] for text in first]
    assert lengths.tolist() == exported.tolist() == expected


def test_no_tensorflow_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / "b.png")
    code = f"""
        import sys
        import keras_mp

        if __name__ == "__main__":
            for function in (keras_mp.text_dataset_from_directory, keras_mp.image_dataset_from_directory):
                def transform(sample):
                    return sample, "tensorflow" in sys.modules or "keras" in sys.modules
                with function({str(tmp_path)!r}, labels=None, workers=1, transform=transform) as dataset:
                    ((batch, loaded),) = dataset
                    print(batch.shape, loaded.tolist(), "tensorflow" in sys.modules)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    output = run_script(tmp_path / "script.py", lines, KERAS_BACKEND="jax")
    assert "(1,) [False] False\n" in output
    assert "(1, 256, 256, 3) [False] False\n" in output


def test_without_pillow_the_extra_is_named(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["PIL"] = None
import keras_mp
try:
    keras_mp.image_dataset_from_directory({str(tmp_path)!r})
except ImportError as error:
    print(error)
"""
    assert "pip install 'keras-mp[images]'" in run_script(tmp_path / "script.py", code, KERAS_BACKEND="jax")


Case = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]
_images = keras_mp.image_dataset_from_directory
_texts = keras_mp.text_dataset_from_directory
_audio = keras_mp.audio_dataset_from_directory

_BAD: dict[str, Case] = {
    "directory": (_texts, {"directory": 5}, TypeError, "directory must be a path, got 5"),
    "no directory": (
        _texts,
        {"directory": "no/such"},
        FileNotFoundError,
        r"directory='no/such' does not exist \(from '",
    ),
    "a file": (_texts, {"directory": __file__}, NotADirectoryError, "is a file; pass the folder that holds the files"),
    "no folders": (
        _texts,
        {"directory": "{texts}/bad"},
        ValueError,
        "has no folders to infer labels from; pass labels=",
    ),
    "no files": (_images, {}, ValueError, r"has no file that ends in \.bmp, .* in its folders.*pass labels=None"),
    "no files at all": (_audio, {"labels": None}, ValueError, r"has no file that ends in \.wav$"),
    "labels": (
        _texts,
        {"labels": "infer"},
        ValueError,
        "labels must be 'inferred', None or a list of numbers, got 'inf",
    ),
    "labels number": (_texts, {"labels": 3}, TypeError, "labels must be 'inferred', None or a list of numbers, got 3"),
    "labels few": (
        _texts,
        {"labels": [1, 2]},
        ValueError,
        "labels has 2 entries, but directory=.* has 6 files; pass one",
    ),
    "labels float": (_texts, {"labels": [0.5] * 6}, TypeError, r"labels\[0\] must be an int, got 0.5"),
    "labels negative": (_texts, {"labels": [0, -1, 0, 0, 0, 0]}, ValueError, r"labels\[1\] must be at least 0, got -1"),
    "labels with gaps": (
        _texts,
        {"labels": [0, 2, 0, 2, 0, 0], "label_mode": "categorical"},
        ValueError,
        "label_mode='categorical' needs labels from 0 to 1 for 2 classes, got 2; number them",
    ),
    "label_mode": (_texts, {"label_mode": "float"}, ValueError, "label_mode must be one of 'int', .* got 'float'"),
    "binary": (
        _texts,
        {"label_mode": "binary", "class_names": ["bad"]},
        ValueError,
        r"label_mode='binary' needs exactly two classes, got 1: \['bad'\]",
    ),
    "class_names": (_texts, {"class_names": "bad"}, TypeError, "class_names must be a list of folder names, got 'bad'"),
    "class_names unknown": (
        _texts,
        {"class_names": ["bad", "x"]},
        ValueError,
        r"class_names has \['x'\], but the folders",
    ),
    "class_names twice": (
        _texts,
        {"class_names": ["bad", "bad"]},
        ValueError,
        "class_names must name each folder once",
    ),
    "class_names empty": (_texts, {"class_names": []}, ValueError, r"class_names must name each folder once, got \[\]"),
    "class_names without": (
        _texts,
        {"class_names": ["bad"], "labels": None},
        ValueError,
        "class_names goes with labels='inferred' only, got labels=None",
    ),
    "split": (_texts, {"validation_split": 1.5, "subset": "both"}, ValueError, "must be between 0 and 1, got 1.5"),
    "split negative": (_texts, {"validation_split": -1, "subset": "both"}, ValueError, "between 0 and 1, got -1"),
    "split str": (
        _texts,
        {"validation_split": "0.5"},
        TypeError,
        "validation_split must be a float or None, got '0.5'",
    ),
    "split alone": (_texts, {"validation_split": 0.5}, ValueError, "validation_split and subset go together"),
    "subset alone": (_texts, {"subset": "training"}, ValueError, "validation_split=None and subset='training'"),
    "subset": (_texts, {"validation_split": 0.5, "subset": "test"}, ValueError, "subset must be one of .* got 'test'"),
    "split without seed": (
        _texts,
        {"validation_split": 0.5, "subset": "both"},
        ValueError,
        "validation_split with shuffle=True needs a seed=",
    ),
    "split that leaves none": (
        _texts,
        {"validation_split": 0.1, "subset": "training", "seed": 1},
        ValueError,
        "validation_split=0.1 of 6 files leaves 0 for validation and 6 for training",
    ),
    "seed": (_texts, {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    "seed great": (_texts, {"seed": 2**32}, ValueError, "seed must be at most 4294967295, got 4294967296"),
    "batch_size": (_texts, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    "collate": (
        _texts,
        {"batch_size": None, "collate": len},
        ValueError,
        "collate=.* but batch_size=None asks for single",
    ),
    "format": (_texts, {"format": "torch"}, ValueError, "format must be one of 'tf', 'grain', got 'torch'"),
    "max_length": (_texts, {"max_length": -1}, ValueError, "max_length must be at least 0, got -1"),
    "transform": (_texts, {"transform": "x"}, TypeError, "transform must be callable or None, got 'x'"),
    "load": (_texts, {"load": len}, TypeError, "load= is what reads the files here; pass your function as transform="),
    "option": (_texts, {"on_error": "ignore"}, ValueError, "on_error must be one of"),
    "no such option": (_texts, {"wokers": 2}, TypeError, "unexpected keyword argument 'wokers'"),
    "color_mode": (_images, {"color_mode": "bgr"}, ValueError, "color_mode must be one of 'grayscale', .* got 'bgr'"),
    "interpolation": (_images, {"interpolation": "cubic"}, ValueError, "interpolation must be one of .* got 'cubic'"),
    "data_format": (_images, {"data_format": "NCHW"}, ValueError, "data_format must be one of .* got 'NCHW'"),
    "image_size": (_images, {"image_size": (3,)}, ValueError, r"image_size must be \(height, width\), got \(3,\)"),
    "image_size str": (_images, {"image_size": "3"}, TypeError, "image_size must be an int, got '3'"),
    "image_size 0": (_images, {"image_size": (3, 0)}, ValueError, r"image_size\[1\] must be at least 1, got 0"),
    "crop and pad": (
        _images,
        {"crop_to_aspect_ratio": True, "pad_to_aspect_ratio": True},
        ValueError,
        "crop_to_aspect_ratio and pad_to_aspect_ratio exclude each other",
    ),
    "ragged": (
        _audio,
        {"ragged": True},
        ValueError,
        "ragged=True makes ragged tensors, which exist in TensorFlow only",
    ),
    "sampling_rate": (_audio, {"sampling_rate": 0}, ValueError, "sampling_rate must be at least 1, got 0"),
    "sampling_rate float": (_audio, {"sampling_rate": 8e3}, TypeError, "sampling_rate must be an int, got 8000.0"),
    "length": (_audio, {"output_sequence_length": 0}, ValueError, "output_sequence_length must be at least 1, got 0"),
}


@pytest.mark.parametrize(("function", "options", "kind", "words"), _BAD.values(), ids=_BAD.keys())
def test_bad_arguments(
    texts: Path, function: Callable[..., Any], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    arguments = {"directory": texts, "verbose": False, **options}
    if isinstance(arguments["directory"], str):
        arguments["directory"] = arguments["directory"].replace("{texts}", str(texts))
    with pytest.raises(kind, match=words):
        function(**arguments)
