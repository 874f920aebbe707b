"""Audio at another rate: a band-limited interpolation by a windowed sinc.

J. O. Smith, "Digital audio resampling", https://ccrma.stanford.edu/~jos/resample/. Of a pair of rates only the ratio
counts: of every `old` samples `new` are made, each a weighted sum of those around it, with weights that repeat.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

_ZERO_CROSSINGS = 16  # of the sinc, on each side of a sample: the longer, the steeper the filter
_ROLLOFF = 0.94  # the filter's edge, as a share of the lower of the two Nyquist frequencies
_BETA = 8.0  # of the Kaiser window: what lies beyond the edge is about 80 dB down
_MAX_WEIGHTS = 1 << 24  # 128 MB; 44,100 to 16,000 takes 90,000


def resample(samples: npt.NDArray[np.float32], rate: int, new_rate: int) -> npt.NDArray[np.float32]:
    """Audio of the same duration at another rate.

    Args:
        samples: float32, shape (samples, channels).
        rate: samples a second.
        new_rate: samples a second of the result.

    Returns:
        float32, shape (ceil(samples * new_rate / rate), channels).

    Raises:
        ValueError: the file's rate is zero, or the two have hardly a divisor in common.
    """
    if rate < 1:
        raise ValueError(f"audio with a rate of {rate} samples a second cannot be resampled")
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    if old == new or not len(samples):
        return samples
    if new * old > _MAX_WEIGHTS:
        raise ValueError(
            f"audio cannot be resampled from {rate} to {new_rate} samples a second, a ratio of {new} to {old}; choose "
            "rates with a greater common divisor"
        )
    count = -(-len(samples) * new // old)
    weights = _weights(old, new)
    reach = weights.shape[1] - old
    blocks = -(-count // new)
    padded = np.zeros((max((blocks - 1) * old + weights.shape[1], reach // 2 + len(samples)), samples.shape[1]))
    padded[reach // 2 : reach // 2 + len(samples)] = samples
    # Shape (blocks, channels, taps): the samples around each block of `old`, a view.
    windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape[1], axis=0)[::old][:blocks]
    result: npt.NDArray[np.float64] = np.einsum("bct,nt->bnc", windows, weights, optimize=True)
    return result.reshape(-1, samples.shape[1])[:count].astype(np.float32)


@functools.lru_cache(maxsize=16)
def _weights(old: int, new: int) -> npt.NDArray[np.float64]:
    """Weights of the samples around a block: shape (new, taps), where `taps - old` are before and after the block."""
    cutoff = _ROLLOFF * min(1.0, new / old)  # of the old Nyquist frequency
    half = math.ceil(_ZERO_CROSSINGS / cutoff)
    offsets = np.arange(-half, old + half) - (np.arange(new) * old / new)[:, None]
    window = np.i0(_BETA * np.sqrt(np.clip(1 - (offsets / half) ** 2, 0, None))) / np.i0(_BETA)
    window[np.abs(offsets) > half] = 0
    weights: npt.NDArray[np.float64] = cutoff * np.sinc(cutoff * offsets) * window
    weights /= weights.sum(axis=1, keepdims=True)
    return weights
