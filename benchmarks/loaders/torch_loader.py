"""PyTorch's DataLoader: its cheapest form here, whose dataset yields whole batches, and the one in every tutorial."""

from typing import Any, cast

from torch.utils.data import DataLoader

from benchmarks.loaders import Feed
from benchmarks.work import Samples, Work


def data_loader(work: Work, workers: int, epochs: int) -> Feed:
    data: Any = DataLoader(cast(Any, work), batch_size=None, num_workers=workers, persistent_workers=True)
    return Feed(data)


class _Rows:
    """A sample by its index, as a Dataset of PyTorch's has them."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples) * self._samples.batch_size

    def __getitem__(self, index: int) -> Any:
        return self._samples.transform(self._samples.source[index])


def by_sample(work: Work, workers: int, epochs: int) -> Feed:
    if not isinstance(work, Samples):
        raise TypeError(f"{type(work).__name__} has no samples, only batches")
    rows: Any = _Rows(work)
    return Feed(DataLoader(rows, batch_size=work.batch_size, num_workers=workers, persistent_workers=True))
