"""A WAV file into an array, as `tf.audio.decode_wav` does it: float32 from -1 to 1.

Of the format only the chunks "fmt " and "data" count. Samples may be integers of 8, 16, 24 or 32 bits, or floats of 32
or 64, which are passed on as they are. Anything else in a WAV file is compressed, and refused.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keras_mp.loading.formats.resampling import resample

AUDIO_FORMATS = (".wav",)

Audio = npt.NDArray[np.float32]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_SIZE_UNKNOWN = 0xFFFFFFFF  # what a program writes that does not know yet how much will follow


class Wav(NamedTuple):
    """A decoded file.

    Attributes:
        samples: float32, shape (samples, channels).
        rate: samples a second.
    """

    samples: Audio
    rate: int


@dataclasses.dataclass(frozen=True)
class AudioReader:
    """Reads a WAV file: path -> float32 array of shape (samples, channels).

    Attributes:
        rate: samples a second of the result; None: as in the file.
        length: samples of the result: what is longer is cut off, what is shorter filled up with zeros; None: all.
    """

    rate: int | None
    length: int | None

    def __call__(self, path: str) -> Audio:
        """Reads one file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no WAV file, or of an encoding that is not known, or truncated.
        """
        with open(path, "rb") as file:
            samples, rate = decode_wav(file.read(), None if self.rate else self.length)
        if self.rate is not None:
            samples = resample(samples, rate, self.rate)
        if self.length is None or len(samples) == self.length:
            return samples
        result = np.zeros((self.length, samples.shape[1]), np.float32)
        result[: len(samples)] = samples[: self.length]
        return result


def decode_wav(content: bytes, most: int | None = None) -> Wav:
    """The samples of a WAV file.

    Args:
        content: the file.
        most: samples to decode at most; None: all.

    Raises:
        ValueError: it is no WAV file, or of an encoding that is not known, or truncated.
    """
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"not a WAV file: it begins with {content[:12]!r}")
    encoding, channels, rate, bits = 0, 0, 0, 0
    start = 12
    while start + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, start)
        start += 8
        if name == b"fmt " and 16 <= size <= len(content) - start:
            encoding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, start)
            if encoding == _EXTENSIBLE and size >= 26:  # what it really is stands first in the sub-format
                (encoding,) = struct.unpack_from("<H", content, start + 24)
        elif name == b"data":
            size = len(content) - start if size == _SIZE_UNKNOWN else size
            if start + size > len(content):
                raise ValueError(
                    f"truncated WAV file: {size} bytes of samples are announced, {len(content) - start} are there"
                )
            if channels == 0:
                raise ValueError("damaged WAV file: its samples come before their format, or it has no channels")
            frames = size * 8 // (channels * bits) if bits else 0
            count = channels * (frames if most is None else min(frames, most))
            return Wav(_decoded(content, start, count, encoding, bits).reshape(-1, channels), rate)
        start += size + size % 2
    raise ValueError("truncated WAV file: it has no samples")


def _decoded(content: bytes, start: int, count: int, encoding: int, bits: int) -> Audio:
    if encoding == _FLOAT and bits in (32, 64):
        return np.frombuffer(content, f"<f{bits // 8}", count, start).astype(np.float32)
    if encoding != _PCM or bits not in (8, 16, 24, 32):
        raise ValueError(
            f"a WAV file of encoding {encoding} with {bits} bits cannot be decoded; convert it to 16-bit PCM"
        )
    if bits == 8:  # the only one without a sign
        return (np.frombuffer(content, np.uint8, count, start).astype(np.float32) - 128) / np.float32(128)
    if bits == 24:  # the upper three bytes of four
        padded = np.zeros((count, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(content, np.uint8, count * 3, start).reshape(-1, 3)
        return padded.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    integers: npt.NDArray[Any] = np.frombuffer(content, f"<i{bits // 8}", count, start)
    return integers.astype(np.float32) / np.float32(2 ** (bits - 1))
