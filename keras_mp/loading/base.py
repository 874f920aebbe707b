"""What every loader is, and what it gives: the batch, the samples that failed, and what that took."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from keras_mp.errors import KerasMPError, SampleFailure, sample_error
from keras_mp.loading.randomness import Generators, Seeder
from keras_mp.loading.timing import SlowestSamples, StageTimes, Work
from keras_mp.memory import pickling
from keras_mp.memory.files import Descriptor
from keras_mp.memory.packed import ListPacker
from keras_mp.plan.request import Request
from keras_mp.plan.views import replace_leaves

NOT_READ = "not read"
SAMPLES_DONE = -2  # the position that is reported when all samples have been read, and the batch is put together

_OF_ONE_LOADER = {"copies_items", "generators", "slowest"}  # found out by each


class Loaded(NamedTuple):
    """A batch, the samples that failed on the way to it, and what the way took.

    Attributes:
        batch: the batch.
        failures: left out of it, or replaced in it.
        work: of the batch, or of some before it too; None if another batch's includes it.
        queued_s: how long it waited for a worker, in seconds.
        nbytes: of its arrays, where that is known.
    """

    batch: Any
    failures: tuple[SampleFailure, ...]
    work: Work | None = None
    queued_s: float = 0.0
    nbytes: int | None = None


class Place:
    """Where in the making of a sample its code is: at which stage, and for which item of the source."""

    __slots__ = ("item", "stage")

    def __init__(self) -> None:
        self.stage = "source"
        self.item: Any = NOT_READ


def ignore_position(position: int) -> None:
    """The `report_position` where nobody watches."""


class Loader:
    """Base of loaders: dataclasses whose fields are functions and objects of the user's.

    Attributes:
        source: what samples or batches are read from.
        runs_user_code: whether anything that is called is the user's.
    """

    source: Any
    runs_user_code: bool

    def load(
        self, request: Request, report_position: Callable[[int], None], seed: Seeder | None, times: StageTimes
    ) -> Loaded:
        """Loads one batch. Several threads may do so at once.

        Args:
            request: which batch.
            report_position: called with the position in the request of each sample before its turn, and with
                `SAMPLES_DONE` after the last.
            seed: seeds `generators`; called with the key of a sample or batch before its code runs. None: they are
                left alone.
            times: takes the time of each stage.

        Raises:
            SampleError: code of the user's failed, and what failed cannot be left out.
        """
        raise NotImplementedError

    def open(self) -> None:
        """Loading begins in this process, or in workers of it: takes what that needs, until `close`.

        Raises:
            KerasMPError: there is no memory for it.
        """

    def close(self) -> None:
        """Gives up what `open` took. Called as often as that."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that its cache has."""
        return 0

    def descriptors(self) -> list[Descriptor]:
        """Copies, which are the caller's, of what a worker needs besides the pickled loader: see `attach`."""
        return []

    def attach(self, fds: Sequence[int]) -> None:
        """Uses, in a worker, what `descriptors` gave; from now on they are this object's."""
        for fd in fds:
            os.close(fd)

    def dump(self, buffers: pickling.Buffers) -> bytes:
        """Pickles it for a worker, long lists packed; the memory of its arrays is appended to `buffers`.

        Raises:
            KerasMPError: it holds something that cannot be pickled; the message says which part.
        """
        sent, source = self, replace_leaves(self.source, self.packer.pack)
        if source is not self.source:
            sent = copy.copy(self)
            sent.source = source
        try:
            return pickling.dump_user_object(sent, "dataset", buffers)
        except KerasMPError:
            for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every loader is a dataclass
                pickling.dump_user_object(getattr(self, field.name), field.name)
            raise

    def sharing(self, shared_view: Callable[[npt.NDArray[Any]], npt.NDArray[Any] | None]) -> Self:
        """The loader with the arrays of its source replaced by what `shared_view` gives for them, if that is not None.

        It is this one if there are none.
        """

        def replace(leaf: Any) -> Any:
            return shared_view(leaf) if isinstance(leaf, np.ndarray) else None

        self.packer.share(shared_view)
        source = replace_leaves(self.source, replace)
        if source is self.source:
            return self
        other = copy.copy(self)
        other.source = source
        return other

    @functools.cached_property
    def packer(self) -> ListPacker:
        """Packs long lists of the source, once; of this loader and its copies."""
        return ListPacker()

    @functools.cached_property
    def slowest(self) -> SlowestSamples:
        """The slowest samples so far."""
        return SlowestSamples()

    @functools.cached_property
    def generators(self) -> Generators:
        """What this code may draw from; searched for once."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every loader is a dataclass
        return Generators.of(**{field.name: getattr(self, field.name) for field in fields})

    def renewed(self) -> Any:
        """The same loader, with the generators that its code holds now."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:  # for a copy too
        return {name: value for name, value in self.__dict__.items() if name not in _OF_ONE_LOADER}


def check_batch(batch: Any, stage: str) -> Any:
    """Returns `batch`, unless it is None: Keras would wait for ever for the batch it leaves out."""
    if batch is None:
        raise TypeError(f"{stage} returned None instead of a batch; did it forget to return?")
    return batch


def batch_error(error: BaseException, stage: str, request: Request) -> Exception:
    """What is raised where a batch as a whole failed."""
    return sample_error(failure_of(error, stage, request, None, ""), error)


def failure_of(error: BaseException, stage: str, request: Request, index: int | None, item: str) -> SampleFailure:
    """What is recorded of an error of the user's code."""
    return SampleFailure.of(
        error,
        stage=stage,
        index=index,
        item=item,
        epoch=request.epoch,
        batch=request.batch,
        where=f"process {os.getpid()}",
    )
