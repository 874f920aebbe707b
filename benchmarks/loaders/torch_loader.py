"""PyTorch's DataLoader in its cheapest form here: the dataset yields whole batches, workers persist."""

from typing import Any, cast

from torch.utils.data import DataLoader

from benchmarks.loaders import Feed
from benchmarks.work import Work


def data_loader(work: Work, workers: int, epochs: int) -> Feed:
    data: Any = DataLoader(cast(Any, work), batch_size=None, num_workers=workers, persistent_workers=True)
    return Feed(data)
