"""Grain's `mp_prefetch`. The epochs are one repeated dataset, so that its workers start once and not once an epoch."""

import sys

import grain
from absl import flags

from benchmarks.loaders import Feed
from benchmarks.work import Work


def mp_prefetch(work: Work, workers: int, epochs: int) -> Feed:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # Grain's workers are started with the parsed flags
    # One reading thread a process: the work holds the GIL or fills memory, and more threads only get in its way.
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    data = grain.MapDataset.source(work).repeat(epochs).to_iter_dataset(read)
    return Feed(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)), spans_epochs=True)
