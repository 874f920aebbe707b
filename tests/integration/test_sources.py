"""Sources that other packages have, as they are: each gives each sample once, whoever loads it (P1, P2)."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.support import assert_alike

pytestmark = pytest.mark.any_backend

_COUNT = 22


class Squares:
    """Sample i is (i, i, i) and i * i; what a source of somebody else's may look like."""

    def __init__(self, count: int = _COUNT) -> None:
        self.count = count
        self.lock = threading.Lock()  # as Grain's own sources hold them

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        with self.lock:
            return np.full(3, index, np.float32), index**2


class Table:
    """The rows of a table, by a function."""

    def __init__(self, table: Any, row: Callable[[Any, int], Any]) -> None:
        self.table = table
        self.row = row

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.row(self.table, index)


def _pair(row: Any) -> Any:
    """A row of a table with columns x and y as the sample that `Squares` has."""
    return np.asarray(row["x"], np.float32), row["y"]


def _columns() -> dict[str, Any]:
    return {"x": [[float(number)] * 3 for number in range(_COUNT)], "y": [number**2 for number in range(_COUNT)]}


def _on_arrow(name: str) -> Any:
    """A package that needs pyarrow, which cannot be imported beside NumPy 1."""
    return pytest.importorskip(name, exc_type=ImportError)


def _hugging_face(folder: Path) -> Any:
    return _on_arrow("datasets").Dataset.from_dict(_columns())


def _hugging_face_on_disk(folder: Path) -> Any:
    _hugging_face(folder).save_to_disk(folder / "rows")
    return _on_arrow("datasets").load_from_disk(folder / "rows").with_format("numpy")


def _hugging_face_of_torch(folder: Path) -> Any:
    pytest.importorskip("torch")
    return _hugging_face(folder).with_format("torch")


def _hugging_face_transformed(folder: Path) -> Any:
    rows = _hugging_face(folder).select(range(_COUNT))
    rows.set_transform(lambda batch: {"x": [np.array(x) + 1 for x in batch["x"]], "y": batch["y"]})
    return rows


def _subset(folder: Path) -> Any:
    data = pytest.importorskip("torch").utils.data
    parts = data.random_split(data.ConcatDataset([Squares(10), _Shifted(12)]), [12, 10])
    return data.ConcatDataset([data.Subset(part, np.arange(len(part))) for part in parts])


class _Shifted(Squares):
    def __getitem__(self, index: int) -> Any:
        return np.full(3, index + 10, np.float32), (index + 10) ** 2


def _tensors(folder: Path) -> Any:
    torch = pytest.importorskip("torch")
    columns = _columns()
    return torch.utils.data.TensorDataset(torch.tensor(columns["x"]), torch.tensor(columns["y"]))


def _grain(folder: Path) -> Any:
    return pytest.importorskip("grain").MapDataset.source(Squares()).map(lambda sample: sample)


def _zarr(folder: Path) -> Any:
    zarr = pytest.importorskip("zarr")
    x, y = (np.array(column) for column in _columns().values())
    group = zarr.open_group(folder / "rows.zarr", mode="w")
    group.create_array("x", data=x, chunks=(1, 3))
    group.create_array("y", data=y)
    opened = zarr.open_group(folder / "rows.zarr", mode="r")
    return keras_mp.zip(opened["x"], opened["y"])


def _hdf5(folder: Path) -> Any:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "rows.h5", "w") as new:
        for name, column in _columns().items():
            new[name] = column
    file = keras_mp.PerWorker(h5py.File, folder / "rows.h5")
    return Table(range(_COUNT), lambda _, index: {name: file()[name][index] for name in "xy"})


def _sqlite(folder: Path) -> Any:
    with sqlite3.connect(folder / "rows.db") as new:
        new.execute("create table rows (id integer primary key, x real, y integer)")
        new.executemany("insert into rows values (?, ?, ?)", [(n, float(n), n**2) for n in range(_COUNT)])
    new.close()
    database = keras_mp.PerWorker(sqlite3.connect, str(folder / "rows.db"))

    def read(_: Any, index: int) -> Any:
        x, y = database().execute("select x, y from rows where id = ?", (index,)).fetchone()
        return {"x": [x] * 3, "y": y}

    return Table(range(_COUNT), read)


def _pandas(folder: Path) -> Any:
    return Table(pytest.importorskip("pandas").DataFrame(_columns()), lambda frame, index: frame.iloc[index])


def _pandas_records(folder: Path) -> Any:
    return pytest.importorskip("pandas").DataFrame(_columns()).to_dict("records")


def _polars(folder: Path) -> Any:
    frame = pytest.importorskip("polars").DataFrame(_columns())
    return Table(frame, lambda frame, index: frame.row(index, named=True))


def _csr(folder: Path) -> Any:
    sparse = pytest.importorskip("scipy.sparse")
    x, y = _columns().values()
    return keras_mp.zip(sparse.csr_array(x), y)


_SOURCES: dict[str, tuple[Callable[[Path], Any], Callable[..., Any] | None]] = {
    "Hugging Face": (_hugging_face, _pair),
    "Hugging Face, on disk": (_hugging_face_on_disk, _pair),
    "Hugging Face, of torch": (_hugging_face_of_torch, _pair),
    "Hugging Face, set_transform": (_hugging_face_transformed, lambda row: (np.float32(row["x"] - 1), row["y"])),
    "torch Subset, ConcatDataset, random_split": (_subset, None),
    "torch TensorDataset": (_tensors, None),
    "Grain source": (lambda folder: Squares(), None),
    "Grain MapDataset": (_grain, None),
    "Zarr": (_zarr, lambda sample: (sample[0].astype(np.float32), sample[1])),
    "HDF5": (_hdf5, _pair),
    "SQLite": (_sqlite, _pair),
    "pandas iloc": (_pandas, _pair),
    "pandas records": (_pandas_records, _pair),
    "polars": (_polars, _pair),
    "SciPy csr": (_csr, lambda sample: (sample[0].toarray().astype(np.float32), sample[1])),
}


@pytest.fixture(scope="module", autouse=True)
def _loop_of_zarr() -> None:
    """Has Zarr start its event loop, which goes on until the process ends."""
    with contextlib.suppress(ImportError):
        import zarr

        zarr.array([1])


@pytest.fixture(params=_SOURCES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    make, transform = _SOURCES[request.param]
    return make(tmp_path), transform


def test_its_samples_come_once_whoever_loads_them(made: Any, running_pool: keras_mp.WorkerPool) -> None:
    source, transform = made
    options: Any = {"batch_size": 5, "shuffle": True, "seed": 4}
    with keras_mp.PoolDataset(source, transform, workers=0, **options) as dataset:
        plain = [*dataset, *dataset]
    with keras_mp.PoolDataset(source, transform, pool=running_pool, **options) as dataset:
        loaded = [*dataset, *dataset]
    assert_alike(loaded, plain)
    for epoch in plain[:5], plain[5:]:
        x, y = (np.concatenate([batch[part] for batch in epoch]) for part in (0, 1))
        assert x.dtype == np.float32
        assert x.shape == (_COUNT, 3)
        assert sorted(x[:, 1].tolist()) == list(range(_COUNT))
        assert (x[:, 1] ** 2 == y).all()


def test_what_fails_is_named(made: Any, running_pool: keras_mp.WorkerPool) -> None:
    source, transform = made

    def check(item: Any) -> Any:
        x, y = item if transform is None else transform(item)
        if y == 49:
            raise ValueError("seven is no good")
        return x, y

    with keras_mp.PoolDataset(source, transform, batch_size=_COUNT, workers=0) as whole:
        index = whole[0][1].tolist().index(49)
    with keras_mp.PoolDataset(source, check, batch_size=5, pool=running_pool) as dataset:
        with pytest.raises(ValueError, match="seven is no good") as caught:
            list(dataset)
    assert isinstance(caught.value, keras_mp.SampleError)
    failure = caught.value.failure
    assert (failure.index, failure.batch, failure.stage) == (index, index // 5, "transform")
    assert failure.item != "not read"
    assert f"sample {index} ({failure.item})" in str(caught.value)


def test_grain_datasets_without_an_end_have_no_length() -> None:
    grain = pytest.importorskip("grain")
    with keras_mp.PoolDataset(grain.MapDataset.source(Squares(6)).repeat(), batch_size=4, workers=0) as dataset:
        assert dataset.num_batches is None
        assert dataset[1][1].tolist() == [16, 25, 0, 1]


def test_indices_are_plain_integers() -> None:
    """What is written in another language, such as Arrow, need not know NumPy's."""

    class Strict(Squares):
        def __getitem__(self, index: int) -> Any:
            if type(index) is not int:
                raise TypeError(type(index))
            return super().__getitem__(index)

    part, rest = keras_mp.split(Strict(), 0.5)
    source = keras_mp.zip(keras_mp.concat(part, rest), keras_mp.concat(rest, part))
    options: Any = {"order": lambda epoch, rng: rng.permutation(_COUNT).astype(np.int32)}
    for buckets in ({}, {"buckets": keras_mp.Buckets(np.arange(_COUNT), [9])}):
        with keras_mp.PoolDataset(source, batch_size=4, workers=0, **(buckets or options)) as dataset:
            assert sum(len(batch[0][1]) for batch in dataset) == _COUNT


# -- what is refused -------------------------------------------------------------------------------------------------


class OpenFile(Squares):
    """A dataset that holds an open file, as torch's often do."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__()
        path.write_text("x\n" * _COUNT)
        self.file = path.open(mode)


def _open_hdf5(folder: Path) -> tuple[Any, Any]:
    h5py = pytest.importorskip("h5py")
    file = h5py.File(folder / "x.h5", "w")
    file["x"] = np.zeros(_COUNT)
    return file["x"], file


def _open_database(folder: Path) -> tuple[Any, Any]:
    database = sqlite3.connect(folder / "x.db")
    return Table(range(_COUNT), lambda _, index: database.execute("select ?", (index,)).fetchone()), database


def _open_file(folder: Path) -> tuple[Any, Any]:
    source = OpenFile(folder / "x.bin", "rb")
    return source, source.file


def _open_text(folder: Path) -> tuple[Any, Any]:
    source = OpenFile(folder / "x.txt", "r")
    return source, source.file


def _open_in_torch(folder: Path) -> tuple[Any, Any]:
    data = pytest.importorskip("torch").utils.data
    source, file = _open_file(folder)
    return data.Subset(source, range(4)), file


def _open_in_grain(folder: Path) -> tuple[Any, Any]:
    grain = pytest.importorskip("grain")
    source, file = _open_file(folder)
    return grain.MapDataset.source(source).map(lambda sample: sample), file


_OPEN = {
    "HDF5": _open_hdf5,
    "SQLite": _open_database,
    "file": _open_file,
    "text": _open_text,
    "torch": _open_in_torch,
    "Grain": _open_in_grain,
}


@pytest.mark.parametrize("kind", _OPEN)
def test_what_holds_something_open_is_refused_when_the_dataset_is_made(kind: str, tmp_path: Path) -> None:
    source, opened = _OPEN[kind](tmp_path)
    try:
        for name, make in (("source", keras_mp.PoolDataset), ("py_dataset", keras_mp.parallelize)):
            with pytest.raises(keras_mp.KerasMPError, match=rf"{name} cannot be sent .*\n.*PerWorker\(open_function"):
                make(source, workers=2)
        with pytest.raises(keras_mp.KerasMPError, match=r"transform cannot be sent"):
            keras_mp.PoolDataset(range(4), lambda index: (source, index), workers=2)
        with keras_mp.PoolDataset(source, batch_size=4, workers=0) as dataset:  # which sends nothing
            assert len(dataset[0]) > 0
    finally:
        opened.close()


def test_to_find_that_out_a_large_source_is_not_pickled() -> None:
    pickled = []

    class Sample:
        def __reduce__(self) -> Any:
            pickled.append(self)
            return bytes, (bytes(1000),)

    dataset = keras_mp.PoolDataset([Sample() for _ in range(20_000)], lambda sample: 1, workers=2)
    assert 0 < len(pickled) < 5000
    dataset.close()


def _tables() -> dict[str, Callable[[], Any]]:
    columns = {"x": [1, 2], "y": [3, 4]}
    return {
        "pandas": lambda: pytest.importorskip("pandas").DataFrame(columns),
        "polars": lambda: pytest.importorskip("polars").DataFrame(columns),
        "Arrow": lambda: _on_arrow("pyarrow").table(columns),
        "column of pandas": lambda: pytest.importorskip("pandas").Series([1, 2], index=[7, 8]),
    }


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("pandas", "source.to_dict('records')"),
        ("polars", "source.rows(named=True)"),
        ("Arrow", "source.to_pylist()"),
        ("column of pandas", "source.to_numpy()"),
    ],
)
def test_tables_whose_items_are_no_rows_are_refused(kind: str, remedy: str) -> None:
    source = _tables()[kind]()
    with pytest.raises(TypeError, match="source must give a row for") as caught:
        keras_mp.PoolDataset(source)
    assert remedy in str(caught.value)
    rows = eval(remedy, {"source": source})
    with keras_mp.PoolDataset(rows, batch_size=2, workers=0) as dataset:
        assert len(dataset) == 1
        assert (dataset[0] if kind == "column of pandas" else dataset[0]["x"]).tolist() == [1, 2]
