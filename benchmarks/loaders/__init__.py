"""Every loader that takes part, by name. A loader's module is imported only in the process that measures it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from benchmarks.work import Work


def _nothing() -> None:
    pass


@dataclass
class Feed:
    """What a loader hands to the consumer: an iterable of one epoch, or of all epochs if `spans_epochs`."""

    data: Iterable[Any]
    spans_epochs: bool = False
    close: Callable[[], None] = _nothing


Open = Callable[[Work, int, int], Feed]  # (work, workers, epochs)


@dataclass(frozen=True)
class Loader:
    """`consume` says who takes the batches: a plain loop, Keras's `fit`, or nobody (the limit)."""

    name: str
    title: str
    consume: Literal["loop", "fit", "nobody"]
    where: str  # "module:function" below benchmarks.loaders, of type Open
    start_method: str | None = None  # multiprocessing's, where it is not the platform's default
    extra: bool = False  # measured only when asked for by name

    def load(self) -> Open:
        """Import the loader's module, and with it the framework: before any clock starts."""
        module, function = self.where.split(":")
        opener: Open = getattr(import_module(f"benchmarks.loaders.{module}"), function)
        return opener


_ALL = (
    Loader("limit", "limit: independent processes, no transport", "nobody", "limit:run"),
    Loader("in-process", "Keras PyDataset, in-process", "fit", "keras_own:in_process"),
    Loader("keras-threads", "Keras PyDataset, threads", "fit", "keras_own:threads"),
    Loader("keras-pool", "Keras PyDataset, process pool (fork)", "fit", "keras_own:processes"),
    Loader("keras-spawn", "Keras PyDataset, process pool (spawn)", "fit", "keras_own:processes", "spawn"),
    Loader("from-generator", "tf.data from_generator", "loop", "tf_data:from_generator"),
    Loader("keras-dir", "Keras image_dataset_from_directory", "loop", "tf_data:from_directory"),
    Loader("tf-map", "tf.data map(numpy_function, AUTOTUNE)", "loop", "tf_data:mapped"),
    Loader("recipe", "Pool.map, then from_tensor_slices", "loop", "tf_data:recipe"),
    Loader("torch", "PyTorch DataLoader, persistent workers", "loop", "torch_loader:data_loader"),
    Loader("torch-batch", "PyTorch DataLoader(batch_size=), its own collate", "loop", "torch_loader:by_sample"),
    Loader("spdl", "SPDL pipeline, ProcessPoolExecutor", "loop", "spdl_loader:pipeline"),
    Loader("grain", "Grain mp_prefetch", "loop", "grain_loader:mp_prefetch"),
    Loader("hf", "Hugging Face to_tf_dataset", "loop", "hf:to_tf_dataset"),
    Loader("tf-interleave", "tf.data interleave, map(numpy_function)", "loop", "streams:interleave"),
    Loader("torch-iterable", "PyTorch IterableDataset", "loop", "streams:iterable"),
    Loader("grain-interleave", "Grain InterleaveIterDataset, mp_prefetch", "loop", "grain_loader:interleave"),
    Loader("webdataset", "WebDataset, WebLoader", "loop", "streams:webdataset"),
    Loader("ours-fit", "keras_mp, fit(dataset)", "fit", "ours:dataset"),
    Loader("ours-export", "keras_mp, to_tf_dataset()", "loop", "ours:export"),
    Loader("ours-fit-export", "fit(dataset.to_tf_dataset())", "fit", "ours:export", extra=True),
    Loader("ours-fit-empty", "the same, arrays by keras_mp.empty", "fit", "ours:in_slot"),
    Loader("ours-export-empty", "to_tf_dataset(), arrays by keras_mp.empty", "loop", "ours:export_in_slot"),
    Loader("ours-dask", "keras_mp over Dask, fit(dataset)", "fit", "ours:over_dask", extra=True),
    Loader("ours-ray", "keras_mp over Ray, fit(dataset)", "fit", "ours:over_ray", extra=True),
    Loader("dask", "Dask alone, client.submit", "loop", "clusters:dask", extra=True),
    Loader("ray", "Ray alone, ray.get", "loop", "clusters:ray", extra=True),
    Loader("ours-iter", "keras_mp, iter(dataset)", "loop", "ours:dataset", extra=True),
)

LOADERS = {loader.name: loader for loader in _ALL}
