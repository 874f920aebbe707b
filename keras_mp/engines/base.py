"""What every engine does: the protocol between a dataset and the code that has its batches loaded.

An engine is told which batch is wanted, never why. Which engine it is makes no difference to the batch (P2), and none
calls back into the dataset that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from keras_mp.loading.base import Loaded, Loader
from keras_mp.plan.request import Request


class Engine(Protocol):
    """Loads the batches of one dataset.

    Any thread may call any method. The dataset calls `submit` and `update` under a lock of its own, so never two of
    them at a time; `result` waits without that lock, on several threads at once.
    """

    @property
    def bundle_size(self) -> int:
        """How many requests had better be submitted at once: more than one where a batch takes no longer than asking.

        It may change from call to call. Submitting more or fewer is slower at worst.
        """

    @property
    def batch_bytes(self) -> int | None:
        """Bytes of the arrays in the batch that came last; None as long as none has come."""

    def submit(self, requests: Sequence[Request]) -> Sequence[Any]:
        """Requests batches without waiting for any, in the order in which they will be wanted.

        Returns:
            One handle for each request, for `is_ready` and then either `result` or `cancel`.

        Raises:
            PoolClosed: the engine, or the pool behind it, has been closed.
        """

    def is_ready(self, handle: Any) -> bool:
        """Whether `result` would return, or raise, at once."""

    def result(self, handle: Any) -> Loaded:
        """Waits for a batch. Called once for a handle, on any thread.

        The batch is the caller's: neither the engine nor code of the user's writes to its arrays after this, and the
        caller may. Their memory is used again only after the last reference to it is gone (P6).

        Raises:
            SampleError: code of the user's failed.
            WorkerCrashed, BatchTimeout: the batch ended its workers, or took too long, twice.
            PoolClosed: the engine is closed, also while this waits (P3).
        """

    def cancel(self, handle: Any) -> None:
        """Gives up a request whose result nobody will ask for.

        It is dropped if nobody has begun to load it; otherwise its batch, or error, is thrown away. A finaliser may
        call this, so it waits for nothing.
        """

    def update(self, loader: Loader) -> bool | None:
        """Loads what is submitted from now on with `loader` in its present state; earlier requests keep the old one.

        Returns:
            Whether it differs from the one before; None if that is not known.
        """

    def close(self) -> None:
        """Frees what the engine holds, and ends every wait in `result` with `PoolClosed`. May be called again.

        Batches that `result` has returned stay valid.
        """

    def stats(self) -> dict[str, Any]:
        """Numbers for the user: "engine" (its kind, a str), and counts of the engine's own."""
