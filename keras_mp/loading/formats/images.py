"""An image file into an array of one size, as `keras.utils.image_dataset_from_directory` does it; needs Pillow.

Pillow decodes, NumPy resizes (`resizing`). Where a file can be decoded in more than one way, the choice is that of
TensorFlow: the orientation in EXIF is ignored, alpha is dropped and not blended, 16 bits become 8 by the upper byte.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from keras_mp.loading.formats.resizing import Pixels, resize

IMAGE_FORMATS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
MODES = {"grayscale": "L", "rgb": "RGB", "rgba": "RGBA"}

Aspect = Literal["stretch", "crop", "pad"]


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads an image file: path -> array of shape (height, width, channels), or (channels, height, width).

    Attributes:
        height: rows of the result.
        width: columns of the result.
        mode: Pillow's name of the colour mode: "L" (1 channel), "RGB" (3) or "RGBA" (4).
        interpolation: a key of `resizing.INTERPOLATIONS`; with "nearest" the result is uint8, else float32.
        aspect: what to do where the image has another ratio of width to height than the result: "stretch" it, "crop"
            it to the greatest part in its middle that has that ratio, or "pad" it with zeros.
        channels_first: whether the channels are the first axis.
    """

    height: int
    width: int
    mode: str
    interpolation: str
    aspect: Aspect
    channels_first: bool

    def __call__(self, path: str) -> Pixels:
        """Reads one file.

        Raises:
            OSError: it cannot be read, is no image, or is truncated.
        """
        image = decode(path, self.mode)
        if self.aspect == "crop":
            image = cropped(image, self.height, self.width)
        if self.aspect == "pad":
            image = resized_with_pad(image, self.height, self.width, self.interpolation)
        else:
            image = resize(image, self.height, self.width, self.interpolation)
        return image.transpose(2, 0, 1) if self.channels_first else image


def check_pillow() -> None:
    """Makes sure that images can be decoded.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "image_dataset_from_directory() needs Pillow; install it with: pip install 'keras-mp[images]'"
        ) from error


def decode(path: str, mode: str) -> Pixels:
    """The pixels of a file's first frame: uint8, shape (rows, columns, channels).

    Raises:
        OSError: it cannot be read, is no image, or is truncated.
    """
    from PIL import Image  # here: a worker imports nothing that its dataset does not need

    with Image.open(path) as image:
        if image.format == "JPEG" and mode == "L":
            image.draft("L", None)  # the decoder's own grey: no colours are computed
        if image.mode.startswith("I"):
            grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return _channels(grey.convert(mode))
        return _channels(image if image.mode == mode else image.convert(mode))


def _channels(image: Any) -> Pixels:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def cropped(image: Pixels, height: int, width: int) -> Pixels:
    """The greatest part in the middle of an image that has the ratio of `height` to `width`, not resized."""
    rows, columns = image.shape[:2]
    # Ratios in float32, as TensorFlow computes them: the last bit decides where the quotient is nearly whole.
    crop_rows = max(1, min(rows, int(np.float32(columns * height) / np.float32(width))))
    crop_columns = max(1, min(columns, int(np.float32(rows * width) / np.float32(height))))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    return image[top : top + crop_rows, left : left + crop_columns]


def resized_with_pad(image: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """The image resized to fit into (height, width) in its own ratio, in the middle of zeros."""
    rows, columns = (np.float32(length) for length in image.shape[:2])
    ratio = max(columns / np.float32(width), rows / np.float32(height))
    fitting_rows, fitting_columns = rows / ratio, columns / ratio
    inner = resize(image, max(1, int(fitting_rows)), max(1, int(fitting_columns)), interpolation)
    top = max(0, int((np.float32(height) - fitting_rows) / 2))
    left = max(0, int((np.float32(width) - fitting_columns) / 2))
    result = np.zeros((height, width, image.shape[2]), inner.dtype)
    result[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return result
