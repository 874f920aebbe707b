"""`image_dataset_from_directory` and its like, with the arguments of `keras.utils`, but a `PoolDataset` comes back.

The files, their order, their labels and which of them are for validation are those that Keras chooses for the same
arguments (`plan.listing`); the files are read and decoded in the workers, without TensorFlow (`loading`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_mp.checks import check_callable, check_choice, check_count
from keras_mp.dataset import PoolDataset
from keras_mp.errors import short_repr
from keras_mp.loading.formats.audio import AUDIO_FORMATS, AudioReader
from keras_mp.loading.formats.files import Read, Reader, only_sample
from keras_mp.loading.formats.images import IMAGE_FORMATS, MODES, Aspect, ImageReader, check_pillow
from keras_mp.loading.formats.resizing import INTERPOLATIONS
from keras_mp.loading.formats.texts import TEXT_FORMATS, TextReader
from keras_mp.loading.pad import pad
from keras_mp.plan.listing import Listing, check_split, list_directory, split_listing
from keras_mp.plan.series import time_series


class DirectoryDataset(PoolDataset):
    """A `PoolDataset` of the files of a directory.

    Attributes:
        class_names: the classes in the order of their numbers; None where there are no labels.
        file_paths: the files, by sample number.
    """

    def __init__(self, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.class_names = listing.class_names
        self.file_paths = listing.paths


# One dataset, or two of them for subset="both".
Datasets = DirectoryDataset | tuple[DirectoryDataset, DirectoryDataset]


def image_dataset_from_directory(
    directory: Any,
    labels: Any = "inferred",
    label_mode: str | None = "int",
    class_names: Sequence[str] | None = None,
    color_mode: str = "rgb",
    batch_size: int | None = 32,
    image_size: int | tuple[int, int] = (256, 256),
    shuffle: bool = True,
    seed: int | None = None,
    validation_split: float | None = None,
    subset: str | None = None,
    interpolation: str = "bilinear",
    follow_links: bool = False,
    crop_to_aspect_ratio: bool = False,
    pad_to_aspect_ratio: bool = False,
    data_format: str | None = None,
    format: str = "tf",
    verbose: bool = True,
    *,
    transform: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Images from a directory, with the arguments of `keras.utils.image_dataset_from_directory`.

    Args:
        directory: where the .bmp, .gif, .jpeg, .jpg and .png files are: for labels="inferred", those of each class in a
            folder of their own, or below it.
        labels: "inferred": from the folders. None: no labels. Else a number for each file, in the alphabetical order of
            their paths.
        label_mode: "int": int32, shape (batch,). "categorical": one-hot float32, shape (batch, classes). "binary":
            float32 0 or 1, shape (batch, 1). None: no labels.
        class_names: the folders to take, in the order of their numbers. None: all, in alphabetical order.
        color_mode: "grayscale" (1 channel), "rgb" (3) or "rgba" (4).
        batch_size: samples in a batch. None: each batch is one sample, without a batch axis.
        image_size: (height, width) of the result, or one number for both.
        shuffle: the samples in another order in every epoch. For subset="both" the validation files keep theirs.
        seed: which files are for validation, as with Keras; and the root of all randomness. None: drawn once, and the
            files stand in alphabetical order before they are shuffled.
        validation_split: share of the files that is for validation.
        subset: "training", "validation", or "both" for a tuple of the two.
        interpolation: "bilinear", "nearest" (the images are then uint8), "bicubic", "area", "lanczos3", "lanczos5",
            "gaussian" or "mitchellcubic", without antialiasing.
        follow_links: whether to go into directories that are links.
        crop_to_aspect_ratio: cut off what is too wide or too high, instead of distorting the image.
        pad_to_aspect_ratio: fit the whole image in, with zeros around it, instead of distorting it.
        data_format: "channels_last" or "channels_first". None: `keras.config.image_data_format()`.
        format: without meaning here; "tf" and "grain" are accepted so that calls need no change.
        verbose: whether to print how many files were found.
        transform: (image, label), or image where there are no labels -> sample; runs in a worker, and takes `rng` as
            that of `PoolDataset` does.
        **options: the other arguments of `PoolDataset`: `workers`, `on_error`, `order` (in place of the shuffle of each
            epoch), `cache` (keeps the decoded images), ... but for `load`, which is what reads a file.

    Returns:
        A `PoolDataset` of batches (images, labels), or of images; images are float32 from 0 to 255, of shape (batch,
        height, width, channels). It has `class_names` and `file_paths`. A tuple of two of them for subset="both".

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError, NotADirectoryError: there is no such directory.
        TypeError, ValueError: an argument is of the wrong kind or out of range, or there are no files.
    """
    check_pillow()
    check_choice(color_mode, "color_mode", tuple(MODES))
    check_choice(str(interpolation).lower(), "interpolation", tuple(INTERPOLATIONS))
    check_choice(format, "format", ("tf", "grain"))
    if crop_to_aspect_ratio and pad_to_aspect_ratio:
        raise ValueError("crop_to_aspect_ratio and pad_to_aspect_ratio exclude each other; leave one of them out")
    data_format = data_format or keras.config.image_data_format()
    check_choice(data_format, "data_format", ("channels_last", "channels_first"))
    height, width = _check_image_size(image_size)
    aspect: Aspect = "crop" if crop_to_aspect_ratio else "pad" if pad_to_aspect_ratio else "stretch"
    reader = ImageReader(
        height, width, MODES[color_mode], interpolation.lower(), aspect, data_format == "channels_first"
    )
    return _datasets(
        reader, IMAGE_FORMATS, directory, labels, label_mode, class_names, batch_size, shuffle, seed, validation_split,
        subset, follow_links, verbose, transform, options,
    )  # fmt: skip


def text_dataset_from_directory(
    directory: Any,
    labels: Any = "inferred",
    label_mode: str | None = "int",
    class_names: Sequence[str] | None = None,
    batch_size: int | None = 32,
    max_length: int | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    validation_split: float | None = None,
    subset: str | None = None,
    follow_links: bool = False,
    format: str = "tf",
    verbose: bool = True,
    *,
    transform: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Texts from a directory, with the arguments of `keras.utils.text_dataset_from_directory`.

    Args:
        directory: where the .txt files are, as for `image_dataset_from_directory`.
        max_length: bytes that are kept of each text; None: all.
        transform: (text, label), or text where there are no labels -> sample. A text is `bytes`, so say
            `text.decode()` where you need a `str`.

    The other arguments are those of `image_dataset_from_directory`.

    Returns:
        A `PoolDataset` of batches (texts, labels), or of texts: arrays of `bytes` objects, of shape (batch,), which
        `fit` and `to_tf_dataset()` make string tensors of. Otherwise as `image_dataset_from_directory`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
        TypeError, ValueError: an argument is of the wrong kind or out of range, or there are no files.
    """
    check_choice(format, "format", ("tf", "grain"))
    reader = TextReader(None if max_length is None else check_count(max_length, "max_length", 0))
    return _datasets(
        reader, TEXT_FORMATS, directory, labels, label_mode, class_names, batch_size, shuffle, seed, validation_split,
        subset, follow_links, verbose, transform, options,
    )  # fmt: skip


def audio_dataset_from_directory(
    directory: Any,
    labels: Any = "inferred",
    label_mode: str | None = "int",
    class_names: Sequence[str] | None = None,
    batch_size: int | None = 32,
    sampling_rate: int | None = None,
    output_sequence_length: int | None = None,
    ragged: bool = False,
    shuffle: bool = True,
    seed: int | None = None,
    validation_split: float | None = None,
    subset: str | None = None,
    follow_links: bool = False,
    verbose: bool = True,
    *,
    transform: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Sounds from a directory, with the arguments of `keras.utils.audio_dataset_from_directory`.

    Args:
        directory: where the .wav files are, as for `image_dataset_from_directory`.
        sampling_rate: samples a second; a file of another rate is resampled. None: each file keeps its own.
        output_sequence_length: samples of each sound, after resampling: longer ones are cut off, shorter ones filled
            up with zeros. None: those of a batch are filled up to the longest of it.
        ragged: must be False: a ragged tensor is TensorFlow's.
        transform: (sound, label), or sound where there are no labels -> sample. A sound is float32 from -1 to 1, of
            shape (samples, channels).

    The other arguments are those of `image_dataset_from_directory`.

    Returns:
        A `PoolDataset` of batches (sounds, labels), or of sounds; sounds have the shape (batch, samples, channels).
        Otherwise as `image_dataset_from_directory`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
        TypeError, ValueError: an argument is of the wrong kind or out of range, or there are no files.
    """
    if ragged:
        raise ValueError(
            "ragged=True makes ragged tensors, which exist in TensorFlow only; leave it out, and batches are padded, "
            "or pass batch_size=None and call .to_tf_dataset().ragged_batch(n)"
        )
    reader = AudioReader(
        None if sampling_rate is None else check_count(sampling_rate, "sampling_rate"),
        None if output_sequence_length is None else check_count(output_sequence_length, "output_sequence_length"),
    )
    if output_sequence_length is None and batch_size is not None:
        options = {"collate": pad(), **options}
    return _datasets(
        reader, AUDIO_FORMATS, directory, labels, label_mode, class_names, batch_size, shuffle, seed, validation_split,
        subset, follow_links, verbose, transform, options,
    )  # fmt: skip


def timeseries_dataset_from_array(
    data: Any,
    targets: Any,
    sequence_length: int,
    sequence_stride: int = 1,
    sampling_rate: int = 1,
    batch_size: int | None = 128,
    shuffle: bool = False,
    seed: int | None = None,
    start_index: int | None = None,
    end_index: int | None = None,
    format: str = "tf",
    *,
    transform: Callable[..., Any] | None = None,
    **options: Any,
) -> PoolDataset:
    """Windows of a time series, with the arguments of `keras.utils.timeseries_dataset_from_array`.

    Args:
        data: array whose first axis is time; a memmap is read by the workers, piece by piece.
        targets: `targets[i]` belongs to the window that begins at step `i`. None: no targets.
        sequence_length: steps in a window.
        sequence_stride: steps from the start of one window to the start of the next.
        sampling_rate: steps from one step of a window to its next.
        batch_size: windows in a batch. None: each batch is one window, without a batch axis.
        shuffle: the windows in another order in every epoch.
        seed: root of all randomness. None: drawn once.
        start_index: the first step that is used.
        end_index: the step before which to stop.
        format: without meaning here; "tf" and "grain" are accepted.
        transform: (window, target), or window where there are no targets -> sample; runs in a worker.
        **options: the other arguments of `PoolDataset`.

    Returns:
        A `PoolDataset` of batches (windows, targets), or of windows of shape (batch, sequence_length, ...).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or there is no window.
    """
    check_choice(format, "format", ("tf", "grain"))
    source = time_series(data, targets, sequence_length, sequence_stride, sampling_rate, start_index, end_index)
    return PoolDataset(source, transform, seed=seed, **_options(batch_size, shuffle, options))


def _datasets(
    reader: Reader,
    formats: tuple[str, ...],
    directory: Any,
    labels: Any,
    label_mode: Any,
    class_names: Sequence[str] | None,
    batch_size: int | None,
    shuffle: bool,
    seed: int | None,
    validation_split: float | None,
    subset: Any,
    follow_links: bool,
    verbose: bool,
    transform: Callable[..., Any] | None,
    options: dict[str, Any],
) -> Datasets:
    """The files that the arguments choose, as one dataset or two."""
    if "load" in options:
        raise TypeError("load= is what reads the files here; pass your function as transform=")
    check_callable(transform, "transform")
    check_split(validation_split, subset, shuffle, seed)
    shuffles = _options(batch_size, shuffle, options)
    keeps_order = _options(batch_size, False, options)
    listing = list_directory(directory, labels, label_mode, class_names, formats, shuffle, seed, follow_links)
    parts = split_listing(listing, validation_split, subset)
    if verbose:
        classes = "" if listing.class_names is None else f" belonging to {len(listing.class_names)} classes"
        sys.stdout.write(f"Found {len(listing)} files{classes}.\n")
        for name, part in zip(("training", "validation") if subset == "both" else (subset,), parts, strict=True):
            sys.stdout.write(f"Using {len(part)} files for {name}.\n" if name else "")
    both = {"transform": transform, "load": Read(reader), "seed": seed}
    first = DirectoryDataset(parts[0], **both, **shuffles)
    return first if len(parts) == 1 else (first, DirectoryDataset(parts[1], **both, **keeps_order))


def _options(batch_size: int | None, shuffle: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `PoolDataset` that `batch_size` and `shuffle` amount to, with the user's own."""
    result = {"batch_size": batch_size, "shuffle": bool(shuffle) and options.get("order") is None, **options}
    if batch_size is None:
        if options.get("collate") is not None:
            raise ValueError(
                f"collate={short_repr(options['collate'], 80)} makes batches, but batch_size=None asks for single "
                "samples; leave one of them out"
            )
        result |= {"batch_size": 1, "collate": only_sample}
    return result


def _check_image_size(image_size: Any) -> tuple[int, int]:
    if isinstance(image_size, tuple | list):
        if len(image_size) != 2:
            raise ValueError(f"image_size must be (height, width), got {short_repr(image_size, 80)}")
        return check_count(image_size[0], "image_size[0]"), check_count(image_size[1], "image_size[1]")
    return (check_count(image_size, "image_size"),) * 2
