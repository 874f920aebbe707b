"""Resizing gives the pixels of `tf.image.resize`."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mp.loading.formats.resizing import INTERPOLATIONS, resize, taps

_LENGTHS = st.integers(1, 70)
# Of 255 levels. TensorFlow sums in float32, and computes some weights in it too.
_TOLERANCE = {"nearest": 0.0, "bilinear": 1e-3, "bicubic": 1e-3}
_TOLERANCE_OF_OTHERS = 0.02


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=40)
@given(rows=_LENGTHS, columns=_LENGTHS, height=_LENGTHS, width=_LENGTHS, seed=st.integers(0, 2**31))
def test_pixels_are_those_of_tensorflow(
    interpolation: str, rows: int, columns: int, height: int, width: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    expected = tf.image.resize(image, (height, width), method=interpolation).numpy()
    resized = resize(image, height, width, interpolation)
    assert resized.dtype == expected.dtype
    tolerance = _TOLERANCE.get(interpolation, _TOLERANCE_OF_OTHERS)
    np.testing.assert_allclose(resized.astype(float), expected.astype(float), rtol=0, atol=tolerance)


@pytest.mark.parametrize("interpolation", sorted(set(INTERPOLATIONS) - {"nearest"}))
@given(length=st.integers(1, 500), new_length=st.integers(1, 500))
def test_weights_sum_to_one(interpolation: str, length: int, new_length: int) -> None:
    indices, weights = taps(length, new_length, interpolation)
    assert weights is not None
    assert indices.shape == weights.shape
    assert indices.min() >= 0
    assert indices.max() < length
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-5)


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for interpolation in ("nearest", "bilinear", "bicubic", "area", "lanczos3", "lanczos5"):
        np.testing.assert_allclose(resize(image, 9, 7, interpolation), image, atol=1e-3)
