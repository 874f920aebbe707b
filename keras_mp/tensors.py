"""What a batch must look like for Keras on its backend, so that the model gets it, and gets it without a copy.

On TensorFlow tuples stand in place of lists, and tensors in place of arrays of strings. On torch tensors stand on the
memory of the arrays: Keras passes a tensor on as it is, but copies an array. On JAX Keras passes arrays on.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_mp.loading.collate import holds_strings, with_tuples

# The dtypes that Keras on torch keeps.
_KEPT_BY_TORCH = frozenset(("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64"))


def for_keras(batch: Any, in_its_pool: bool) -> Any:
    """The batch as Keras is to pass it on to the model.

    Args:
        batch: it.
        in_its_pool: whether Keras asks from its own pool, so that the batch may have to be pickled.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _for_tensorflow(batch)
    return _for_torch(batch) if backend == "torch" and not in_its_pool else batch


def _for_tensorflow(batch: Any) -> Any:
    batch = with_tuples(batch)
    if not holds_strings(batch):
        return batch
    from keras_mp import tfdata  # it needs TensorFlow, which Keras has loaded here

    return tfdata.with_string_tensors(_as_inputs(batch))


def _for_torch(batch: Any) -> Any:
    return keras.tree.map_structure(_on_its_memory, _as_inputs(batch))


def _as_inputs(batch: Any) -> Any:
    """Keras takes a lone array for the inputs, but not a lone tensor."""
    return (batch,) if isinstance(batch, np.ndarray) else batch


def _on_its_memory(leaf: Any) -> Any:
    """A tensor on the array's memory, which it keeps alive; what torch has no such tensor for is left to Keras."""
    if type(leaf) is not np.ndarray or leaf.dtype.name not in _KEPT_BY_TORCH:
        return leaf
    if not (leaf.flags.c_contiguous and leaf.flags.writeable and leaf.dtype.isnative):
        return leaf
    import torch

    return torch.from_numpy(leaf)
