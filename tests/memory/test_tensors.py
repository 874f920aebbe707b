"""Tensors of torch in a source: their memory is shared by the workers, like an array's."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import psutil
import pytest

import keras_mp
from keras_mp.memory import pickling

torch: Any = pytest.importorskip("torch")


def _again(value: Any) -> tuple[Any, int]:
    """What a worker gets of it, and how many bytes travelled as arrays."""
    buffers: pickling.Buffers = []
    body = pickling.dump_user_object(value, "source", buffers)
    memory = [bytearray(buffer.raw()) for buffer in buffers]
    return pickle.loads(body, buffers=memory), sum(map(len, memory))


_TENSORS = {
    "float32": lambda: torch.arange(12.0).reshape(3, 4),
    "bfloat16": lambda: torch.arange(12.0).to(torch.bfloat16),
    "bool": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.tensor([1 + 2j]).conj(),
    "transposed": lambda: torch.arange(12).reshape(3, 4).T,
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("kind", _TENSORS)
def test_a_tensor_travels_as_its_memory(kind: str) -> None:
    tensor = _TENSORS[kind]()
    again, nbytes = _again(tensor)
    assert type(again) is torch.Tensor
    assert again.dtype == tensor.dtype
    assert torch.equal(again, tensor)
    assert nbytes == tensor.nbytes


def test_what_is_more_than_its_memory_travels_as_torch_has_it() -> None:
    parameter, _ = _again(torch.nn.Parameter(torch.ones(3)))
    assert type(parameter) is torch.nn.Parameter
    tensor, _ = _again(torch.ones(3, requires_grad=True))
    assert tensor.requires_grad
    sparse, _ = _again(torch.eye(3).to_sparse())
    assert torch.equal(sparse.to_dense(), torch.eye(3))
    result, _ = _again(torch.ones(3, requires_grad=True) * 2)
    assert torch.equal(result, 2 * torch.ones(3))


def _own_bytes(sample: Any) -> Any:
    return sample[0].numpy().sum(), np.int64(psutil.Process().memory_full_info().uss)


def test_a_worker_has_no_copy_of_a_tensor(pool: keras_mp.WorkerPool) -> None:
    held = []
    for rows in (10, 400_000):
        source = torch.utils.data.TensorDataset(torch.ones(rows, 100), torch.arange(rows))
        with keras_mp.PoolDataset(source, _own_bytes, batch_size=1, pool=pool) as dataset:
            sums, own = next(iter(dataset))
        assert sums == [100]
        held.append(int(own[0]))
    assert held[1] - held[0] < 40_000_000  # of 160 MB
