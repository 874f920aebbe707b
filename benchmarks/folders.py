"""The folder workload: a folder of JPEGs of two classes, cut out of a photograph that Matplotlib ships."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.work import Array, Samples, kept_folder, spin
from keras_mp.loading.formats.files import Read
from keras_mp.loading.formats.images import IMAGE_FORMATS, ImageReader
from keras_mp.plan.listing import list_directory

_BATCH_SIZE = 32
_WIDTH, _HEIGHT = 500, 375  # the usual size of a photograph in ImageNet
_QUALITY = 90
_SPIN_5_MS = 62_000  # loops of `spin` on the 2-core machine the targets are for


@dataclass
class Folder(Samples):
    """A folder of images: `image_dataset_from_directory` gets its path, every other loader the ready batch."""

    folder: str = ""
    augment: Callable[[Array], Array] | None = None


def augment(image: Array) -> Array:
    """A user's own augmentation, say: 5 ms of Python that holds the GIL."""
    spin(_SPIN_5_MS)
    return image[:, ::-1].copy()


@dataclass
class _Augmented:
    read: Read
    function: Callable[[Array], Array]

    def __call__(self, item: Any) -> Any:
        image, label = self.read(item)
        return self.function(image), label


def photographs(batches: int, function: Callable[[Array], Array] | None = None) -> Folder:
    """`batches` batches of photographs; the files are written the first time and kept."""
    count = batches * _BATCH_SIZE
    folder = kept_folder(f"{count}-photographs", lambda folder: _write(folder, count))
    source: Any = list_directory(folder, "inferred", "int", None, IMAGE_FORMATS, False, None, False)
    read = Read(ImageReader(256, 256, "RGB", "bilinear", "stretch", False))
    return Folder(source, read if function is None else _Augmented(read, function), _BATCH_SIZE, str(folder), function)


def _write(folder: Path, count: int) -> None:
    """Parts of the photograph of all sizes, each at the same size, and every other one mirrored: its class."""
    import matplotlib
    from PIL import Image

    rng = np.random.default_rng(0)
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as photograph:
        photograph.load()
        for number in range(count):
            width = int(rng.integers(_WIDTH // 2, photograph.width))
            height = width * _HEIGHT // _WIDTH
            left, top = (int(rng.integers(room + 1)) for room in (photograph.width - width, photograph.height - height))
            part = photograph.resize((_WIDTH, _HEIGHT), box=(left, top, left + width, top + height))
            name = "mirrored" if number % 2 else "upright"
            if number % 2:
                part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            (folder / name).mkdir(parents=True, exist_ok=True)
            part.save(folder / name / f"{number:06}.jpg", quality=_QUALITY)
