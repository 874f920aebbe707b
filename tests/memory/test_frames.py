"""Messages: any nest of arrays survives, large memory is not copied, frames may be split anywhere."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_mp.errors import KerasMPError
from keras_mp.memory import files, frames, pickling

Array = npt.NDArray[Any]

_DTYPES = st.one_of(
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.complex_number_dtypes(),
    hnp.boolean_dtypes(),
    hnp.datetime64_dtypes(),
    hnp.timedelta64_dtypes(),
    hnp.byte_string_dtypes(),
    hnp.unicode_string_dtypes(),
    hnp.array_dtypes(),
)
_SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def _arrays(draw: st.DrawFn) -> Array:
    """Arrays in all layouts: C, Fortran, transposed, strided, reversed, broadcast, read-only."""
    array: Array = np.array(draw(hnp.arrays(draw(_DTYPES), draw(_SHAPES))))
    layout = draw(st.sampled_from(["c", "fortran", "transposed", "strided", "reversed", "broadcast", "read-only"]))
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "transposed":
        return array.T
    if layout == "strided" and array.ndim:
        return array[::2]
    if layout == "reversed" and array.ndim:
        return array[::-1]
    if layout == "broadcast":
        return np.broadcast_to(array, (3, *array.shape))
    if layout == "read-only":
        array.flags.writeable = False
    return array


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Record:
    data: Any
    name: str


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.builds(np.float32, st.floats(width=32)),
)
_NESTS = st.recursive(
    st.one_of(_arrays(), _SCALARS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, st.text(max_size=5)),
    ),
    max_leaves=8,
)


def _assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        native = expected.dtype.newbyteorder("=")  # NumPy's own pickling of a strided array loses the byte order
        assert actual.dtype.newbyteorder("=") == native
        assert actual.shape == expected.shape
        assert actual.astype(native).tobytes() == expected.astype(native).tobytes()
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            _assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            _assert_same(one, other)
    elif isinstance(expected, Record):
        _assert_same((actual.data, actual.name), (expected.data, expected.name))
    else:
        assert pickle.dumps(actual) == pickle.dumps(expected)  # NaN is not equal to itself


def _through_memory(header: bytes, buffers: pickling.Buffers) -> Any:
    """Decodes as a worker or the parent does: from one piece of memory with the buffers at their places."""
    places, end = files.place_buffers(buffers)
    memory = np.zeros(end, dtype=np.uint8)
    for buffer, (offset, size) in zip(buffers, places, strict=True):
        memory[offset : offset + size] = np.frombuffer(buffer.raw(), np.uint8) if size else 0
    return pickle.loads(header, buffers=[memory[offset : offset + size] for offset, size in places])


@given(_NESTS)
def test_results_survive(value: Any) -> None:
    buffers: pickling.Buffers = []
    header = pickling.dump_result(value, buffers)
    _assert_same(_through_memory(header, buffers), value)


@given(_NESTS)
def test_user_objects_survive(value: Any) -> None:
    buffers: pickling.Buffers = []
    header = pickling.dump_user_object(value, "source", buffers)
    _assert_same(_through_memory(header, buffers), value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        np.arange(6).astype(">i4"),
        np.array([(1, 2.5, b"x")], dtype=[("a", "<i2"), ("b", ">f8"), ("c", "S3")]),
        np.array(["a", "β", ""]),
        np.array([{"a": 1}, None, "x"], dtype=object),
        np.array(3.5),
        np.zeros((0, 5)),
        np.ma.masked_array([1, 2, 3], mask=[False, True, False]),
    ],
    ids=["bfloat16", "big-endian", "structured", "unicode", "object", "0-d", "empty", "masked"],
)
def test_special_arrays_survive(array: Array) -> None:
    buffers: pickling.Buffers = []
    restored = _through_memory(pickling.dump_result(array, buffers), buffers)
    assert type(restored) is type(array)
    assert restored.dtype == array.dtype
    assert restored.shape == array.shape
    assert restored.tolist() == array.tolist()


def test_contiguous_memory_travels_out_of_band() -> None:
    array = np.zeros((1000, 1000))
    buffers: pickling.Buffers = []
    assert len(pickling.dump_result({"x": array, "y": array.T, "z": [array[10:20]]}, buffers)) < 1000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 2 * array.nbytes + array[10:20].nbytes
    assert np.shares_memory(np.frombuffer(buffers[0].raw()), array)


@given(st.lists(st.binary(max_size=300)), st.integers(0, 1000))
def test_buffers_are_aligned_and_do_not_overlap(data: list[bytes], start: int) -> None:
    places, end = files.place_buffers([pickle.PickleBuffer(part) for part in data], start)
    last = start
    for part, (offset, size) in zip(data, places, strict=True):
        assert offset % files.ALIGNMENT == 0
        assert size == len(part)
        assert last <= offset < last + files.ALIGNMENT
        last = offset + size
    assert end == last


# -- frames ----------------------------------------------------------------------------------------------------------


def _frame(message: Any) -> bytes:
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        frames.send(left, message)
        left.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: right.recv(1 << 16), b""))


_MESSAGES = st.lists(st.one_of(st.binary(max_size=200), st.text(max_size=20), st.integers()), max_size=6)


@given(_MESSAGES, st.data())
def test_frame_reader_takes_frames_split_anywhere(messages: list[Any], data: st.DataObject) -> None:
    stream = b"".join(map(_frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    left, right = socket.socketpair()
    with left, right:
        right.setblocking(False)
        reader, got = frames.FrameReader(right), list[Any]()
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            left.sendall(stream[start:stop])
            got.extend(reader.frames())
        assert got == messages
        left.close()
        with pytest.raises(EOFError):
            list(reader.frames())


def test_frame_reader_keeps_whole_frames_when_the_peer_dies_within_the_next() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.setblocking(False)
        left.sendall(_frame("one") + _frame("two") + _frame("three")[:-1])
        left.close()
        reader = frames.FrameReader(right)
        assert list(reader.frames()) == ["one", "two"]
        with pytest.raises(EOFError):
            list(reader.frames())


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 20) + 1, 5 << 20])
def test_long_frames(size: int) -> None:
    message = bytes(size)
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=frames.send, args=(left, message))
        sender.start()
        assert frames.receive(right) == (message, [])
        sender.join()
        right.setblocking(False)
        sender = threading.Thread(target=frames.send, args=(left, message))
        sender.start()
        reader, got = frames.FrameReader(right), list[Any]()
        while not got:
            got.extend(reader.frames())
        sender.join()
        assert got == [message]


def test_descriptors_travel_with_their_frame(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    left, right = socket.socketpair()
    with left, right, path.open("rb") as file:
        frames.send(left, "first", [file.fileno()])
        frames.send(left, "second")
        first, second = frames.receive(right), frames.receive(right)
        assert first is not None
        with open(first[1][0], "rb") as received:
            assert received.read() == b"content"
        assert first[0] == "first"
        assert second == ("second", [])


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, -1])
def test_receive_tells_a_peer_that_is_gone_at_any_byte(keep: int) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(_frame("message")[:keep])
        left.close()
        assert frames.receive(right) is None


# -- user objects ----------------------------------------------------------------------------------------------------


def _in_a_new_process(data: bytes, expression: str) -> str:
    """Prints `expression` of the unpickled `value` in an interpreter that has never seen this module."""
    code = f"import pickle, sys, numpy as np; value = pickle.load(sys.stdin.buffer); print({expression})"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_functions_travel_by_value() -> None:
    offset = 10

    def closure(x: int) -> int:
        return x + offset

    class Local:
        def __call__(self, x: int) -> int:
            return x * offset

    value = [lambda x: x - 1, closure, Local()]
    data = pickling.dump_user_object(value, "transform")
    assert _in_a_new_process(data, "[f(5) for f in value]") == "[4, 15, 50]"


def test_an_installed_module_that_another_copy_hides_travels_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # as Ray hides psutil
    for folder in ("site-packages", "thirdparty"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "hidden_by_a_copy.py").write_text("file = open(__file__)\n")
        monkeypatch.syspath_prepend(tmp_path / folder)
        module = importlib.import_module("hidden_by_a_copy")  # the second time, the one that is there
    with module.file:
        (again,) = pickle.loads(pickling.dump_user_object([module], "transform"))
        assert again is module
    monkeypatch.delitem(sys.modules, "hidden_by_a_copy")


def test_what_main_defines_travels_by_value() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("scale = 3\nclass Scale:\n    def __call__(self, x):\n        return x * scale\n", namespace)
    data = pickling.dump_user_object(namespace["Scale"](), "transform")
    assert _in_a_new_process(data, "value(5)") == "15"


def test_results_of_classes_by_value_survive() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "np": np}
    exec("class Batch:\n    def __init__(self):\n        self.x = np.arange(1000.)\n", namespace)
    buffers: pickling.Buffers = []
    header = pickling.dump_result(namespace["Batch"](), buffers)
    assert len(buffers) == 1
    np.testing.assert_array_equal(_through_memory(header, buffers).x, np.arange(1000.0))


class _BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


@pytest.mark.parametrize(
    "value",
    [(i for i in range(3)), [(i for i in range(3))], _BadRepr()],
    ids=["gen", "list", "repr"],
)
def test_what_cannot_be_pickled_is_named_with_the_way_out(value: Any) -> None:
    with pytest.raises(KerasMPError) as caught:
        pickling.dump_user_object(value, "transform")
    text = str(caught.value)
    assert text.startswith("transform cannot be sent to worker processes: TypeError: ")
    assert "Received transform=" in text
    assert "workers=0" in text
    assert isinstance(caught.value.__cause__, TypeError)


class Marked(np.ndarray[Any, Any]):
    """A subclass with a pickle of its own."""

    mark = 0

    def __reduce__(self) -> Any:
        return _marked, (np.asarray(self), self.mark)


def _marked(array: Any, mark: int) -> Any:
    view = array.view(Marked)
    view.mark = mark
    return view


def test_the_memory_of_an_arrays_subclass_is_not_copied() -> None:
    """As of what `to_records()` of pandas gives."""
    make: Any = np.rec.fromarrays  # NumPy's annotations know no names without formats
    records = make([np.arange(1000), np.arange(1000.0)], names="a,b")
    marked = np.arange(1000).view(Marked)
    marked.mark = 3
    for array in (records, marked):
        buffers: pickling.Buffers = []
        data = pickling.dump_user_object(array, "source", buffers)
        assert len(data) < 1000
        restored = _through_memory(data, buffers)
        assert type(restored) is type(array)
        assert restored.dtype == array.dtype
        np.testing.assert_array_equal(restored, array)
        assert getattr(restored, "mark", 0) == getattr(array, "mark", 0)
    strings = make([np.array(["x", "y"], object)], names="a")
    assert pickle.loads(pickling.dump_user_object(strings, "source"))[1].a == "y"


# -- memory maps -----------------------------------------------------------------------------------------------------

_HEADER_BYTES = 128  # of a version 1.0 .npy file with a short header


@pytest.fixture(scope="module")
def npy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wire") / "data.npy"
    np.save(path, np.arange(20 * 30 * 40, dtype=np.float32).reshape(20, 30, 40))
    return path


_VIEWS: dict[str, Any] = {
    "whole": lambda m: m,
    "slice": lambda m: m[3:7],
    "slice of slice": lambda m: m[3:17][2:5, 4:],
    "strided": lambda m: m[1::3, ::2, 5:30:7],
    "transposed": lambda m: m.transpose(2, 0, 1),
    "row": lambda m: m[4, 5],
    "inserted axis": lambda m: m[:, None, ::2],
    "other dtype": lambda m: m[2:].view(np.uint32),
    "broadcast": lambda m: np.broadcast_to(m[0], (4, 30, 40), subok=True),
    "one element": lambda m: m[19:, 29:, 39:],
}


@pytest.mark.parametrize("view", _VIEWS.values(), ids=_VIEWS)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_memmaps_are_opened_again_not_copied(npy: Path, view: Any, mode: Any) -> None:
    original = view(np.load(npy, mmap_mode=mode))
    assert isinstance(original, np.memmap)
    buffers: pickling.Buffers = []
    data = pickling.dump_user_object({"x": original}, "source", buffers)
    assert not buffers
    assert len(data) < 2000
    restored = pickle.loads(data)["x"]
    assert restored.dtype == original.dtype
    assert restored.shape == original.shape
    np.testing.assert_array_equal(restored, original)


def test_reopened_memmap_lies_in_the_file(npy: Path) -> None:
    data = pickling.dump_user_object(np.load(npy, mmap_mode="r")[5:], "source")
    in_maps = f"any({str(npy)!r} in line for line in open('/proc/self/maps'))"
    expected = int(np.load(npy)[5:].sum(dtype=np.float64))
    assert _in_a_new_process(data, f"{in_maps}, int(value.sum(dtype=float))") == f"True {expected}"


@pytest.mark.parametrize("reverse", [lambda m: m[::-1], lambda m: m[:0]], ids=["reversed", "empty"])
def test_memmaps_that_cannot_be_opened_again_are_copied(npy: Path, reverse: Any) -> None:
    original = reverse(np.load(npy, mmap_mode="r"))
    buffers: pickling.Buffers = []
    restored = _through_memory(pickling.dump_user_object(original, "source", buffers), buffers)
    np.testing.assert_array_equal(restored, original)


def test_private_changes_of_a_memmap_travel(npy: Path) -> None:
    original = np.load(npy, mmap_mode="c")
    original[0, 0, 0] = -1
    buffers: pickling.Buffers = []
    restored = _through_memory(pickling.dump_user_object(original, "source", buffers), buffers)
    assert restored[0, 0, 0] == -1


def test_a_computed_memmap_is_not_taken_for_the_file(npy: Path) -> None:
    """NumPy keeps the subclass, and sometimes the file name, on arrays that no longer stand on the file."""
    original = np.load(npy, mmap_mode="r")
    for computed in (original + 1, original.astype(np.float64), original.copy(), np.sqrt(original), original[[3, 1]]):
        buffers: pickling.Buffers = []
        restored = _through_memory(pickling.dump_user_object(computed, "source", buffers), buffers)
        assert restored.dtype == computed.dtype
        np.testing.assert_array_equal(restored, computed)
