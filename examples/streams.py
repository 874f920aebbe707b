"""Train on data that can only be read from one end to the other: tar files of images, lines of JSON, Parquet.

- A Sentinel-2 scene (shipped by the package `spyndex`) is cut into tiles, which are written into tar files as
  WebDataset lays them out: `0123.jpg` beside `0123.cls`. One of these is cut off, as by an interrupted download.
- Python's own language reference (as `help()` shows it) becomes files of JSON lines: texts of 2 to 2,000 words, padded
  to the longest of a batch, or packed into rows without padding.
- The tiles' means become a Parquet file, of which each row group is a shard (with pyarrow; else this part is left out).

A reader is a generator that takes a shard and yields its samples; it runs in a worker.

    python examples/streams.py [--epochs N] [--workers N]
"""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import io
import json
import os
import re
import tarfile
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import keras
import numpy as np
from PIL import Image

import keras_mp

_TILE_PIXELS = 20
_TILES_PER_TAR = 25
_BRIGHTEST = 4500  # counts that become white
_NDVI_VEGETATION = 0.5
_ROW_WORDS = 128
_VOCABULARY = 2000


# -- images in tar files -------------------------------------------------------------------------------------------


def tiles() -> Iterator[tuple[Any, int]]:
    """Tiles of the scene in false colours (infrared, red, green), and whether they are mostly green vegetation."""
    text = importlib.resources.files("spyndex").joinpath("data", "S2_10m.json").read_text(encoding="utf-8")
    scene = np.array(json.loads(text), np.float32)  # blue, green, red, infrared; shape (4, 300, 300)
    red, infrared = scene[2], scene[3]
    is_vegetation = (infrared - red) / (infrared + red) > _NDVI_VEGETATION
    colours = np.clip(scene[[3, 2, 1]] * (255 / _BRIGHTEST), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    starts = range(0, scene.shape[1], _TILE_PIXELS)
    for row, column in ((row, column) for row in starts for column in starts):
        part = slice(row, row + _TILE_PIXELS), slice(column, column + _TILE_PIXELS)
        yield colours[part], int(is_vegetation[part].mean() > 0.5)


def write_tars(folder: Path) -> list[Path]:
    """Writes the tiles into tar files; the last file is truncated."""
    every = list(tiles())
    order = np.random.default_rng(0).permutation(len(every))  # shards hold a bit of everything
    paths = []
    for start in range(0, len(order), _TILES_PER_TAR):
        paths.append(folder / f"tiles-{start // _TILES_PER_TAR:03}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for number in order[start : start + _TILES_PER_TAR]:
                image, label = every[number]
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=95)
                for suffix, data in (("jpg", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    with tarfile.open(paths[-1]) as tar:
        member = tar.getmembers()[_TILES_PER_TAR]
    os.truncate(paths[-1], member.offset_data + 1)
    return paths


def read_tar(path: Path) -> Iterator[dict[str, bytes]]:
    """The samples of a tar file: its files of one name, by their suffixes."""
    sample: dict[str, bytes] = {}
    name = ""
    with tarfile.open(path, "r|") as tar:  # "|": from one end to the other, as from a socket
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            if stem != name and sample:
                yield sample
                sample = {}
            name = stem
            file = tar.extractfile(member)
            if file is not None:
                sample[suffix] = file.read()
    if sample:
        yield sample


def decode(sample: dict[str, bytes], rng: np.random.Generator) -> tuple[Any, Any]:
    """A tile, mirrored at random, and its label."""
    image = np.asarray(Image.open(io.BytesIO(sample["jpg"])), np.float32) / 255
    return image[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])], np.float32(sample["cls"])


def train_on_tars(folder: Path, epochs: int, workers: int | None) -> None:
    """Trains on the tar files, one of which fails."""
    shards = write_tars(folder)
    options: dict[str, Any] = {"batch_size": 16, "lanes": 4, "seed": 1, "on_error": "skip", "workers": workers}
    with keras_mp.StreamDataset(shards, read_tar, **options) as unread:
        length = unread.count()
    print(f"{len(shards)} tar files, {length} samples")
    model = keras.Sequential(
        [
            keras.Input((_TILE_PIXELS, _TILE_PIXELS, 3)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["accuracy"])
    with keras_mp.StreamDataset(shards, read_tar, decode, shuffle=100, length=length, **options) as train:
        model.fit(train, epochs=epochs)
        failure = train.failures[0]
        print(f"{failure.stage} failed after {failure.offset} samples of {Path(shards[failure.index or 0]).name}")


# -- texts in lines of JSON ----------------------------------------------------------------------------------------


def write_lines(folder: Path) -> list[Path]:
    """Writes the paragraphs into files of JSON lines."""
    paragraphs = [part for text in topics.values() for part in text.split("\n\n") if len(part.split()) > 1]
    paths = [folder / f"texts-{number}.jsonl" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs[number::8]))
    return paths


def read_lines(path: Path) -> Iterator[str]:
    """The texts of a file."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tokenise(text: str) -> Any:
    """Numbers of the words, int32; the end of the text is 1."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())[: _ROW_WORDS - 1]
    return np.array([2 + sum(word.encode()) % (_VOCABULARY - 2) for word in words] + [1], np.int32)


def pack(texts: Sequence[Any]) -> dict[str, Any]:
    """Puts texts into rows of equal length, one after the other, each whole and in the first row that has room.

    Returns:
        "ids": int32, shape (rows, words); 0 where nothing is. "text": which text of its row a word is of, from 1.
    """
    rows: list[list[Any]] = []
    for text in texts:
        row = next((row for row in rows if sum(map(len, row)) + len(text) <= _ROW_WORDS), None)
        if row is None:
            rows.append(row := [])
        row.append(text)
    ids, number = np.zeros((2, len(rows), _ROW_WORDS), np.int32)
    for place, row in enumerate(rows):
        ids[place, : sum(map(len, row))] = np.concatenate(row)
        number[place, : sum(map(len, row))] = np.repeat(np.arange(1, len(row) + 1), [len(text) for text in row])
    return {"ids": ids, "text": number}


def compare_padding_and_packing(folder: Path, workers: int | None) -> None:
    """Says how much of the batches is text."""
    options: dict[str, Any] = {"batch_size": 64, "shuffle": 256, "lanes": 4, "seed": 1, "workers": workers}
    shards = write_lines(folder)
    with keras_mp.StreamDataset(shards, read_lines, tokenise, collate=keras_mp.pad(), **options) as padded:
        used = [np.count_nonzero(batch) / batch.size for batch in padded]
        print(f"padded: {np.mean(used):.0%} of {len(used)} batches are text")
    with keras_mp.StreamDataset(shards, read_lines, tokenise, collate=list, batch_transform=pack, **options) as packed:
        used = [np.count_nonzero(batch["ids"]) / batch["ids"].size for batch in packed]
        print(f"packed: {np.mean(used):.0%} of {len(used)} batches are text")


# -- tables in Parquet ---------------------------------------------------------------------------------------------


def read_row_group(shard: tuple[Path, int]) -> Iterator[Any]:
    """The rows of a row group, as arrays of float32."""
    from pyarrow import parquet

    path, group = shard
    with parquet.ParquetFile(path) as file:
        table = file.read_row_group(group)
    columns = [table.column(name).to_numpy() for name in table.column_names]
    yield from np.stack(columns, axis=1).astype(np.float32)


def read_parquet(folder: Path, workers: int | None) -> None:
    """Writes and reads a table; each row group is a shard."""
    import pyarrow
    from pyarrow import parquet

    means = np.array([[*image.mean((0, 1)), label] for image, label in tiles()])
    path = folder / "means.parquet"
    names = ["infrared", "red", "green", "is_vegetation"]
    table = pyarrow.table({name: means[:, number] for number, name in enumerate(names)})
    parquet.write_table(table, path, row_group_size=50)
    groups = parquet.ParquetFile(path).num_row_groups
    with keras_mp.StreamDataset(
        [(path, group) for group in range(groups)], read_row_group, batch_size=16, shuffle=50, lanes=2, workers=workers
    ) as rows:
        found = sum(len(batch) for batch in rows)
        print(f"{groups} row groups, {found} rows of {len(names)} columns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "keras_mp: .* failed", RuntimeWarning)  # it is printed
        folder = Path(name)
        train_on_tars(folder, arguments.epochs, arguments.workers)
        compare_padding_and_packing(folder, arguments.workers)
        if importlib.util.find_spec("pyarrow") is None:
            print("pyarrow is not installed, so no Parquet is read")
        else:
            read_parquet(folder, arguments.workers)


if __name__ == "__main__":
    main()
