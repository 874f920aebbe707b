"""What a batch must look like for Keras on TensorFlow: tuples in place of lists, and string tensors."""

from __future__ import annotations

from typing import Any

from keras_mp.loading.collate import holds_strings, with_tuples


def for_tensorflow(batch: Any) -> Any:
    """The batch as Keras passes it on to TensorFlow. TensorFlow, which is loaded then, is needed for strings only."""
    batch = with_tuples(batch)
    if not holds_strings(batch):
        return batch
    from keras_mp import tfdata

    # Keras takes a lone array for the inputs, but not a lone tensor.
    return tfdata.with_string_tensors(batch if isinstance(batch, tuple | dict) else (batch,))
