"""Hugging Face `Dataset.to_tf_dataset(num_workers=)`: rows are batch numbers, the work is the collate function."""

from typing import Any

import datasets
import numpy as np

from benchmarks.loaders import Feed
from benchmarks.work import Work, leaves_of


def _load(rows: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    batch = work[int(rows[0]["index"])]
    return batch if isinstance(batch, dict) else {f"leaf_{k}": leaf for k, leaf in enumerate(leaves_of(batch))}


def to_tf_dataset(work: Work, workers: int, epochs: int) -> Feed:
    rows = datasets.Dataset.from_dict({"index": np.arange(len(work))})
    data = rows.to_tf_dataset(batch_size=1, collate_fn=_load, collate_fn_args={"work": work}, num_workers=workers)
    return Feed(data)
