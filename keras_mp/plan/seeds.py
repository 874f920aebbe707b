"""The roots of all random streams: of samples, batches, shuffles and orders, no two of them the same (P2)."""

from __future__ import annotations

import enum

import numpy as np

_WORD = (1 << 32) - 1


class Stream(enum.IntEnum):
    """What is drawn from a stream."""

    SAMPLE = 1
    BATCH = 2
    SHUFFLE = 3
    ORDER = 4
    SUBSTITUTES = 5  # which samples are tried
    SUBSTITUTE = 6  # what such a sample draws
    BATCH_ORDER = 7  # of batches, where Keras shuffles them
    BUCKET_ORDER = 8  # of the batches of all buckets
    LOAD = 10  # of the code that runs before a cache, the same in every epoch
    BLOCK = 11  # in which order a lane's block of samples comes
    READ = 12  # of the code that reads a shard
    SPLIT = 9  # which samples go to which part of a source


def seed_sequence(
    stream: Stream, seed: int, epoch: int, index: int = 0, repeat: int = 0, part: int = 0
) -> np.random.SeedSequence:
    """The root of one stream.

    Different arguments give different entropy: every number but the seed has its own, fixed words of it, and the seed,
    which may be of any size, stands behind them. (`SeedSequence([seed, epoch, ...])` gives an int as many words as it
    needs, and takes words of zero at the end of a short list for none.)

    Args:
        stream: what it is for.
        seed: the dataset's seed.
        epoch: epoch number.
        index: number of the sample, or batch.
        repeat: how often the sample came before in the epoch.
        part: which of the generators that are seeded for this sample or batch.
    """
    words = [stream, part, repeat, epoch & _WORD, epoch >> 32, index & _WORD, index >> 32, seed & _WORD]
    while seed := seed >> 32:
        words.append(seed & _WORD)
    return np.random.SeedSequence(np.array(words, dtype=np.uint32))
