"""WAV files: the samples of `tf.audio.decode_wav`, further encodings, other rates, padding."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import scipy.io.wavfile
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import keras_mp
from keras_mp.loading.formats.audio import decode_wav
from keras_mp.loading.formats.resampling import resample
from tests.support import assert_alike


def _wav(samples: npt.NDArray[Any], rate: int = 8000) -> bytes:
    """A file as SciPy writes it."""
    buffer = io.BytesIO()
    scipy.io.wavfile.write(buffer, rate, samples)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
def test_sixteen_bits_are_decoded_as_by_tensorflow(channels: int) -> None:
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, (501, channels)).astype(np.int16)
    integers[:2] = [[-(2**15)], [2**15 - 1]]
    content = _wav(integers, 44_100)
    expected, rate = tf.audio.decode_wav(content)
    samples, our_rate = decode_wav(content)
    assert samples.dtype == np.float32
    assert our_rate == int(rate) == 44_100
    np.testing.assert_array_equal(samples, expected.numpy())


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_other_encodings(dtype: str) -> None:
    floats = np.random.default_rng(0).uniform(-1, 1, (300, 2))
    scales = {"u1": 127.0, "i2": 2.0**15 - 1, "i4": 2.0**31 - 129}
    stored = floats if dtype[0] == "f" else np.rint(floats * scales[dtype]) + (128 if dtype == "u1" else 0)
    samples, rate = decode_wav(_wav(stored.astype(dtype)))
    assert rate == 8000
    np.testing.assert_allclose(samples, floats, atol=0.012 if dtype == "u1" else 1e-4)


def test_twenty_four_bits() -> None:
    values = [-(2**23), -1, 0, 1, 2**23 - 1, 2**22]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(3)
        file.setframerate(96_000)
        file.writeframes(b"".join(value.to_bytes(3, "little", signed=True) for value in values))
    samples, rate = decode_wav(buffer.getvalue())
    assert rate == 96_000
    np.testing.assert_array_equal(samples, np.array(values, np.float32).reshape(3, 2) / 2**23)


_GOOD = _wav(np.arange(100, dtype=np.int16))


def _with_chunk_before_the_data() -> bytes:
    return _GOOD[:36] + b"LIST" + struct.pack("<I", 5) + b"abcde\0" + _GOOD[36:]


def _of_unknown_size() -> bytes:
    return _GOOD[:40] + struct.pack("<I", 0xFFFFFFFF) + _GOOD[44:]


@pytest.mark.parametrize("content", [_with_chunk_before_the_data(), _of_unknown_size(), _GOOD + b"tail"])
def test_other_chunks_are_passed_over(content: bytes) -> None:
    np.testing.assert_array_equal(decode_wav(content).samples[:100], decode_wav(_GOOD).samples)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a WAV file: it begins with b''"),
        (b"OggS" + bytes(40), "not a WAV file: it begins with b'OggS"),
        (_GOOD[:30], "truncated WAV file: it has no samples"),
        (_GOOD[:100], "truncated WAV file: 200 bytes of samples are announced, 56 are there"),
        (_GOOD[:20] + struct.pack("<H", 17) + _GOOD[22:], "encoding 17 with 16 bits cannot be decoded; convert"),
        (_GOOD[:34] + struct.pack("<H", 12) + _GOOD[36:], "encoding 1 with 12 bits cannot be decoded"),
        (_GOOD[:22] + struct.pack("<H", 0) + _GOOD[24:], "no channels"),
    ],
)
def test_bad_files_are_refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_wav(content)


@given(cut=st.integers(0, len(_GOOD) - 1))
def test_a_truncated_file_is_an_error_and_never_less_sound(cut: int) -> None:
    with pytest.raises(ValueError, match="WAV file"):
        decode_wav(_GOOD[:cut])


@pytest.mark.parametrize(("rate", "new_rate"), [(44_100, 16_000), (16_000, 44_100), (8000, 16_000), (48_000, 16_000)])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.4])
def test_resampling_keeps_a_tone(rate: int, new_rate: int, share: float) -> None:
    frequency = share * min(rate, new_rate)
    samples = np.sin(2 * np.pi * frequency * np.arange(rate // 2) / rate).astype(np.float32)
    tone = resample(np.stack([samples, -samples], axis=1), rate, new_rate)
    assert tone.dtype == np.float32
    assert tone.shape == (new_rate // 2, 2)
    expected = np.sin(2 * np.pi * frequency * np.arange(len(tone)) / new_rate)
    np.testing.assert_allclose(tone[200:-200, 0], expected[200:-200], atol=1e-3)
    np.testing.assert_array_equal(tone[:, 0], -tone[:, 1])


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    samples = np.sin(2 * np.pi * 12_000 * np.arange(24_000) / 48_000).astype(np.float32)[:, None]
    assert np.abs(resample(samples, 48_000, 16_000)[200:-200]).max() < 1e-3


@given(length=st.integers(0, 300), rate=st.integers(1, 60), new_rate=st.integers(1, 60))
def test_the_duration_stays(length: int, rate: int, new_rate: int) -> None:
    samples = np.ones((length, 1), np.float32)
    assert len(resample(samples, rate, new_rate)) == -(-length * new_rate // rate)


def test_rates_without_a_common_divisor_are_refused() -> None:
    with pytest.raises(ValueError, match="from 44101 to 16000 samples a second, a ratio of 16000 to 44101; choose"):
        resample(np.zeros((10, 1), np.float32), 44_101, 16_000)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sounds")
    for number in range(7):
        place = root / f"class_{number % 2}"
        place.mkdir(exist_ok=True)
        samples = np.random.default_rng(number).integers(-(2**15), 2**15, (50 + 10 * number, 1)).astype(np.int16)
        (place / f"{number}.wav").write_bytes(_wav(samples))
    return root


_PADS_SCALAR_LABELS_ONLY = pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15),
    reason=f"Keras {keras.__version__} raises an error itself, where sounds have no label, or one that is no scalar",
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_sequence_length": 70},
        {"batch_size": None},
        pytest.param({"labels": None}, marks=_PADS_SCALAR_LABELS_ONLY),
        pytest.param({"label_mode": "binary"}, marks=_PADS_SCALAR_LABELS_ONLY),
    ],
    ids=str,
)
def test_batches_are_those_of_keras(sounds: Path, options: dict[str, Any]) -> None:
    arguments = {"shuffle": False, "verbose": False, "batch_size": 3, **options}
    theirs = list(keras.utils.audio_dataset_from_directory(sounds, **arguments).as_numpy_iterator())
    with keras_mp.audio_dataset_from_directory(sounds, workers=0, **arguments) as dataset:
        assert_alike(list(dataset), theirs)


def test_all_sounds_come_at_one_rate_and_length(sounds: Path) -> None:
    options: dict[str, Any] = {"sampling_rate": 4000, "output_sequence_length": 40, "verbose": False}
    with keras_mp.audio_dataset_from_directory(sounds, shuffle=False, workers=0, **options) as dataset:
        ((batch, _),) = dataset
    assert batch.shape == (7, 40, 1)
    assert not batch[0, 25:].any()  # of 50 samples at twice the rate
    assert batch[0, :25].any()
    assert batch[-1].all()
