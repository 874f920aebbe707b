"""Resizing as `tf.image.resize` does it without antialiasing, in NumPy: each axis is a weighted sum of a few pixels.

What a pixel of the result is made of depends on the two lengths of the axis only, so it is computed once for each.
The centre of pixel `i` lies at `i + 0.5`. The kernels and what happens at the edges follow TensorFlow's operations
`ResizeBilinear`, `ResizeBicubic`, `ResizeArea`, `ResizeNearestNeighbor` (all with half pixel centres) and
`ScaleAndTranslate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]
_Values = npt.NDArray[np.float64]

_BICUBIC_TABLE = 1024  # ResizeBicubic takes its weights from a table of so many offsets
_KEYS_A = -0.5


class Taps(NamedTuple):
    """What the pixels along an axis of the result are made of.

    Attributes:
        indices: pixels of the image, int of shape (taps, pixels of the result).
        weights: float32 of the same shape; None: pixels are taken as they are.
    """

    indices: npt.NDArray[np.intp]
    weights: npt.NDArray[np.float32] | None


def resize(image: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """Resizes an image.

    Args:
        image: shape (rows, columns, channels).
        height: rows of the result.
        width: columns of the result.
        interpolation: a key of `INTERPOLATIONS`.

    Returns:
        Shape (height, width, channels); float32, or for "nearest" of the image's dtype.
    """
    rows = _resized(image, taps(image.shape[0], height, interpolation), 0)
    return _resized(rows, taps(image.shape[1], width, interpolation), 1)


def _resized(image: Pixels, axis_taps: Taps, axis: int) -> Pixels:
    indices, weights = axis_taps
    if weights is None:
        chosen: Pixels = np.take(image, indices[0], axis)
        return chosen
    shape = (-1, 1, 1) if axis == 0 else (-1, 1)
    result: Pixels = np.take(image, indices[0], axis).astype(np.float32, copy=False)
    result *= weights[0].reshape(shape)
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        result += np.take(image, index, axis) * weight.reshape(shape)
    return result


@functools.lru_cache(maxsize=4096)
def taps(length: int, new_length: int, interpolation: str) -> Taps:
    """What the pixels along an axis are made of, when `length` of them become `new_length`."""
    return INTERPOLATIONS[interpolation](length, new_length)


def _centres(length: int, new_length: int) -> _Values:
    """Where in the image the centres of the new pixels lie."""
    # TensorFlow computes in float32; a centre that falls on an edge must fall on the same side of it.
    scale = np.float32(length) / np.float32(new_length)
    return ((np.arange(new_length, dtype=np.float32) + np.float32(0.5)) * scale).astype(np.float64)


def _nearest(length: int, new_length: int) -> Taps:
    return Taps(np.minimum(_centres(length, new_length), length - 1).astype(np.intp)[None], None)


def _bilinear(length: int, new_length: int) -> Taps:
    position = _centres(length, new_length) - 0.5
    below = np.floor(position)
    share = position - below
    return _clipped(np.stack([below, below + 1]), np.stack([1 - share, share]), length)


def _bicubic(length: int, new_length: int) -> Taps:
    position = _centres(length, new_length) - 0.5
    below = np.floor(position)
    share = np.rint((position - below) * _BICUBIC_TABLE) / _BICUBIC_TABLE
    offsets = np.arange(-1.0, 3.0)[:, None]
    return _inside(below + offsets, _keys(np.abs(share - offsets)), length)


def _area(length: int, new_length: int) -> Taps:
    scale = length / new_length
    starts = np.arange(new_length) * scale
    indices = np.floor(starts) + np.arange(np.ceil(scale) + 1)[:, None]
    overlap = np.minimum(indices + 1, starts + scale) - np.maximum(indices, starts)
    return _clipped(indices, np.maximum(overlap, 0) / scale, length)


def _kernel(kernel: Callable[[_Values], _Values], radius: float) -> Callable[[int, int], Taps]:
    def kernel_taps(length: int, new_length: int) -> Taps:
        # In float32, and by the inverse of the scale, as in TensorFlow: it decides whether a pixel at the edge counts.
        scale = np.float32(1) / (np.float32(new_length) / np.float32(length))
        centres = (np.arange(new_length, dtype=np.float32) + np.float32(0.5)) * scale
        indices = np.ceil(centres - radius - 0.5) + np.arange(2 * np.ceil(radius) + 1)[:, None]
        distance = np.abs(indices + 0.5 - centres)
        return _inside(indices, np.where(distance < radius, kernel(distance), 0), length)

    return kernel_taps


def _clipped(indices: _Values, weights: _Values, length: int) -> Taps:
    """Beyond the edge the pixel at the edge counts."""
    return Taps(np.clip(indices, 0, length - 1).astype(np.intp), weights.astype(np.float32))


def _inside(indices: _Values, weights: _Values, length: int) -> Taps:
    """Beyond the edge nothing counts, and the weights of what is left are made to sum to one."""
    weights = np.where((indices >= 0) & (indices < length), weights, 0)
    return _clipped(indices, weights / weights.sum(axis=0), length)


def _keys(x: _Values) -> _Values:
    """R. Keys, "Cubic convolution interpolation for digital image processing", 1981."""
    near = ((_KEYS_A + 2) * x - (_KEYS_A + 3)) * x * x + 1
    far = ((_KEYS_A * x - 5 * _KEYS_A) * x + 8 * _KEYS_A) * x - 4 * _KEYS_A
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _lanczos(radius: int) -> Callable[[_Values], _Values]:
    return lambda x: np.sinc(x) * np.sinc(x / radius)


def _gaussian(x: _Values) -> _Values:
    """Of standard deviation 0.5: a third of the radius."""
    return np.exp(-2 * x * x)


def _mitchell(x: _Values) -> _Values:
    """D. Mitchell and A. Netravali, "Reconstruction filters in computer graphics", 1988, with B = C = 1/3."""
    near = (7 * x - 12) * x * x / 6 + 8 / 9
    far = ((-7 / 18 * x + 2) * x - 10 / 3) * x + 16 / 9
    return np.where(x < 1, near, far)


INTERPOLATIONS: dict[str, Callable[[int, int], Taps]] = {
    "bilinear": _bilinear,
    "nearest": _nearest,
    "bicubic": _bicubic,
    "area": _area,
    "lanczos3": _kernel(_lanczos(3), 3),
    "lanczos5": _kernel(_lanczos(5), 5),
    "gaussian": _kernel(_gaussian, 1.5),
    "mitchellcubic": _kernel(_mitchell, 2),
}
