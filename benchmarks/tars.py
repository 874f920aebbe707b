"""The workload of tar files: the photographs of `folders`, readable only from one end of a file to the other."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.folders import photographs
from benchmarks.work import Array, Work, kept_folder

BATCH_SIZE = 32
_PER_TAR = 64  # so that no reader has half a batch at the end of a file


@dataclass
class Tars:
    """Tar files as WebDataset lays them out; every loader gets the files, `read` and `decode`."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths) * _PER_TAR // BATCH_SIZE

    def __getitem__(self, index: int) -> Any:
        """A batch, for a look at its shapes."""
        rows = [decode(sample) for _, sample in zip(range(BATCH_SIZE), read(self.paths[0]), strict=False)]
        return tuple(np.stack(column) for column in zip(*rows, strict=True))


def tars_of(work: Work) -> Tars:
    """The work, which must be of tar files."""
    if not isinstance(work, Tars):
        raise TypeError(f"this loader reads tar files, not {type(work).__name__}")
    return work


def read(path: str) -> Iterator[tuple[bytes, int]]:
    """The samples of a tar file: the bytes of a JPEG, and its class."""
    image = b""
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:
                continue
            if member.name.endswith(".jpg"):
                image = file.read()
            else:
                yield image, int(file.read())


def decode(sample: tuple[bytes, int]) -> tuple[Array, Array]:
    """A photograph of 256x256, float32, and its class."""
    from PIL import Image

    with Image.open(io.BytesIO(sample[0])) as image:
        resized = image.resize((256, 256), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32), np.asarray(sample[1], np.int64)


def tars(batches: int) -> Tars:
    """`batches` batches, an even number; the files are written the first time and kept."""
    folder = kept_folder(f"{batches}-tar-batches", lambda folder: _write(folder, batches))
    return Tars(sorted(str(path) for path in folder.glob("*.tar")))


def _write(folder: Path, batches: int) -> None:
    source = photographs(batches).source
    for start in range(0, len(source), _PER_TAR):
        with tarfile.open(folder / f"{start:06}.tar", "w") as tar:
            for number in range(start, min(start + _PER_TAR, len(source))):
                path, label = source[number]
                for suffix, data in (("jpg", Path(path).read_bytes()), ("cls", str(int(label)).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
