"""Images: the pixels of Keras's function, as near as the decoders are to each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import keras_mp
from keras_mp.loading.formats.images import cropped, decode, resized_with_pad
from tests.support import assert_alike

Pixels = npt.NDArray[np.uint8]


def _picture(rows: int, columns: int, channels: int, seed: int = 0) -> Pixels:
    """Soft colours with a little noise, like a photograph's."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (rows // 12 + 2, columns // 12 + 2, channels)).astype(np.uint8)
    bands = [Image.fromarray(coarse[..., k]).resize((columns, rows), Image.Resampling.BICUBIC) for k in range(channels)]
    smooth = np.stack([np.asarray(band) for band in bands], axis=-1).astype(float)
    noisy: Pixels = np.clip(smooth + rng.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8)
    return noisy


def _by_tensorflow(path: Path, channels: int) -> npt.NDArray[np.int64]:
    decoded = tf.io.decode_image(path.read_bytes(), channels=channels, expand_animations=False)
    pixels: npt.NDArray[np.int64] = decoded.numpy().astype(int)
    return pixels


_RGB = Image.fromarray(_picture(61, 83, 3))
_ALPHA = Image.fromarray(_picture(61, 83, 4))

# Image, and the modes in which the pixels are the same bit for bit.
_EXACT: dict[str, tuple[Image.Image, str, list[str]]] = {
    "rgb.png": (_RGB, "PNG", ["RGB", "RGBA"]),
    "grey.png": (_RGB.convert("L"), "PNG", ["L", "RGB", "RGBA"]),
    "palette.png": (_RGB.quantize(50), "PNG", ["RGB", "RGBA"]),
    "alpha.png": (_ALPHA, "PNG", ["RGB", "RGBA"]),
    "grey with alpha.png": (_ALPHA.convert("LA"), "PNG", ["L", "RGB", "RGBA"]),
    "16 bits.png": (
        Image.fromarray(_picture(61, 83, 1)[..., 0].astype(np.uint16) * 257 + 99),
        "PNG",
        ["L", "RGB", "RGBA"],
    ),
    "one bit.png": (_RGB.convert("1"), "PNG", ["L", "RGB"]),
    "rgb.bmp": (_RGB, "BMP", ["RGB", "RGBA"]),
    "grey.bmp": (_RGB.convert("L"), "BMP", ["RGB", "RGBA"]),
    "palette.gif": (_RGB.quantize(50), "GIF", ["RGB"]),
}
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (*_, modes) in _EXACT.items() for mode in modes])
def test_lossless_files_decode_to_the_same_pixels(tmp_path: Path, name: str, mode: str) -> None:
    image, kind, _ = _EXACT[name]
    image.save(tmp_path / name, kind)
    pixels = decode(str(tmp_path / name), mode)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, _by_tensorflow(tmp_path / name, _CHANNELS[mode]))


def test_grey_of_a_coloured_png_is_rounded_in_another_way(tmp_path: Path) -> None:
    _RGB.save(tmp_path / "rgb.png")
    difference = np.abs(decode(str(tmp_path / "rgb.png"), "L") - _by_tensorflow(tmp_path / "rgb.png", 1))
    assert difference.max() <= 1


@pytest.mark.parametrize(("quality", "subsampling"), list(itertools.product([60, 75, 95], [0, 1, 2])))
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_is_decoded_by_the_accurate_transform(tmp_path: Path, quality: int, subsampling: int, mode: str) -> None:
    """Keras's function takes TensorFlow's faster and less accurate one, and is about one level of 255 away."""
    path = tmp_path / "photo.jpg"
    _RGB.save(path, quality=quality, subsampling=subsampling)
    pixels = decode(str(path), mode)
    accurate = tf.io.decode_jpeg(path.read_bytes(), channels=_CHANNELS[mode], dct_method="INTEGER_ACCURATE").numpy()
    np.testing.assert_array_equal(pixels, accurate)
    assert np.abs(pixels - _by_tensorflow(path, _CHANNELS[mode])).mean() < 2


@pytest.mark.parametrize("name", ["rgb.jpg", "grey.jpg", "cmyk.jpg", "palette.bmp", "animated.gif", "alpha.png"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_every_format_goes_into_every_colour_mode(tmp_path: Path, name: str, mode: str) -> None:
    """Of these, Keras's function refuses ten."""
    path = tmp_path / name
    made = {"grey": _RGB.convert("L"), "cmyk": _RGB.convert("CMYK"), "palette": _RGB.quantize(16), "alpha": _ALPHA}
    extra: dict[str, Any] = {"save_all": True, "append_images": [_ALPHA.quantize(9)]} if path.suffix == ".gif" else {}
    image = made.get(path.stem, _RGB)
    image.save(path, **extra)
    assert decode(str(path), mode).shape == (61, 83, _CHANNELS[mode])
    brightness = np.asarray(image.convert("RGB").convert("L")).astype(int)
    assert np.abs(decode(str(path), "L")[..., 0] - brightness).mean() < 5


_SIZES = st.integers(1, 60)


@given(rows=_SIZES, columns=_SIZES, height=_SIZES, width=_SIZES)
def test_the_part_that_is_cropped_has_the_ratio(rows: int, columns: int, height: int, width: int) -> None:
    image = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns, 1)
    part = cropped(image, height, width)
    across, down = part.shape[1], part.shape[0]
    assert across == columns or down == rows
    assert abs(across - down * width / height) <= max(1.0, width / height) or down == 1
    assert abs(down - across * height / width) <= max(1.0, height / width) or across == 1


@given(rows=_SIZES, columns=_SIZES, height=_SIZES, width=_SIZES)
def test_padding_is_that_of_tensorflow(rows: int, columns: int, height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(1, 256, (rows, columns, 1), dtype=np.uint8)
    fits = min(height / rows, width / columns)
    padded = resized_with_pad(image, height, width, "nearest")
    assert padded.shape == (height, width, 1)
    if rows * fits >= 1 and columns * fits >= 1:  # TensorFlow refuses what would vanish
        np.testing.assert_array_equal(padded, tf.image.resize_with_pad(image, height, width, method="nearest").numpy())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files of many shapes, whose pixels both decoders agree on."""
    root = tmp_path_factory.mktemp("photos")
    for number, (rows, columns) in enumerate([(40, 60), (64, 64), (90, 31), (7, 100), (120, 50), (33, 34)]):
        place = root / f"class_{number % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(_picture(rows, columns, 3, number)).save(place / f"{number}.png")
    return root


_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "grayscale": {"color_mode": "grayscale"},
    "rgba": {"color_mode": "rgba"},
    "one number": {"image_size": 50},
    "crop": {"crop_to_aspect_ratio": True, "image_size": (30, 50)},
    "pad": {"pad_to_aspect_ratio": True, "image_size": (30, 50)},
    "pad, nearest": {"pad_to_aspect_ratio": True, "interpolation": "nearest", "image_size": (31, 17)},
    "crop, channels first": {"crop_to_aspect_ratio": True, "image_size": (30, 50), "data_format": "channels_first"},
    "pad, channels first": {"pad_to_aspect_ratio": True, "image_size": (30, 50), "data_format": "channels_first"},
    "channels first": {"image_size": [20, 24], "data_format": "channels_first"},
    **{
        name: {"interpolation": name, "image_size": (48, 40)}
        for name in ("nearest", "bicubic", "area", "lanczos3", "lanczos5", "gaussian", "MitchellCubic")
    },
    "categorical": {"label_mode": "categorical", "image_size": (8, 8)},
    "binary": {"label_mode": "binary", "image_size": (8, 8)},
    "no labels": {"labels": None, "image_size": (8, 8)},
    "one at a time": {"batch_size": None, "image_size": (8, 8)},
}


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS.keys())
def test_batches_are_those_of_keras(photos: Path, options: dict[str, Any]) -> None:
    arguments = {"shuffle": False, "verbose": False, "batch_size": 4, **options}
    theirs = list(keras.utils.image_dataset_from_directory(photos, **arguments).as_numpy_iterator())
    with keras_mp.image_dataset_from_directory(photos, workers=0, **arguments) as dataset:
        assert_alike(list(dataset), theirs, 1.02 if options.get("color_mode") == "grayscale" else 0.02)
