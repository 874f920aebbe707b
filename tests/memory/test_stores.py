"""What keeps samples: bytes come back as they were, one process's beside another's, and as arrays of their own."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_mp.errors import KerasMPError
from keras_mp.memory.encoding import decode, encode
from keras_mp.memory.fingerprint import combined, fingerprint
from keras_mp.memory.shared_store import SharedStore
from tests.support import assert_same, python_path

_LEAVES = st.one_of(
    hnp.arrays(st.sampled_from(["i1", "f8", "c8", "U3"]).map(np.dtype), hnp.array_shapes(min_dims=0, min_side=0)),
    st.binary(),
    st.text(),
    st.integers(),
    st.none(),
)
_SAMPLES = st.recursive(_LEAVES, lambda part: st.one_of(st.tuples(part, part), st.dictionaries(st.text(), part)))


@given(_SAMPLES)
def test_a_sample_comes_back(sample: Any) -> None:
    assert_same(decode(np.frombuffer(bytearray(encode(sample)), np.uint8)), sample, "writeable")


@given(st.integers(1, 20_000), st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=3000)), max_size=30))
def test_bytes_come_back_and_stay_within_the_bound(nbytes: int, puts: list[tuple[int, bytes]]) -> None:
    store = SharedStore(10, nbytes)
    kept: dict[int, tuple[bytes, bytes]] = {}
    for number, (index, data) in enumerate(puts):
        key = number.to_bytes(16, "little")
        if not store.put(index, key, data):
            kept[index] = key, data
    for index, (key, data) in kept.items():
        found = store.get(index, key)
        assert found is not None
        assert found.tobytes() == data
        assert store.get(index, b"\1" * 16) is None
    assert sum(len(data) for _, data in kept.values()) <= nbytes
    assert store.nbytes <= nbytes
    store.close()


_FORK = multiprocessing.get_context("fork")


def _fork(calls: Sequence[tuple[Any, ...]]) -> None:
    """Runs functions with their arguments, each in a process of its own, beside each other."""
    processes = [_FORK.Process(target=function, args=arguments) for function, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        process.close()


def _fill(fds: tuple[int, ...], first: int) -> None:
    store = SharedStore(400, 1 << 20, [os.dup(fd) for fd in fds])
    for index in range(first, 400, 4):
        assert not store.put(index, index.to_bytes(16, "little"), bytes([index % 251]) * (index * 5))
    store.close()


def test_processes_add_beside_each_other() -> None:
    store = SharedStore(400, 1 << 20)
    _fork([(_fill, store.fds, first) for first in range(4)])
    for index in range(400):
        found = store.get(index, index.to_bytes(16, "little"))
        assert found is not None
        assert found.tobytes() == bytes([index % 251]) * (index * 5)
    store.close()


_STORES, _ROWS = 40, 256


def _race(stores: list[SharedStore], first: int, barrier: Any) -> None:
    for store in stores:
        barrier.wait(60)
        for index in range(first, _ROWS, 2):
            store.put(index, b"k" * 16, bytes([index]) * 64)


def test_no_room_is_given_twice() -> None:  # P2: one sample's bytes would be another's
    stores = [SharedStore(_ROWS, _ROWS * 64) for _ in range(_STORES)]  # so small that each sample asks for its room
    barrier = _FORK.Barrier(2)
    _fork([(_race, stores, first, barrier) for first in range(2)])
    for store in stores:
        for index in range(_ROWS):
            found = store.get(index, b"k" * 16)
            assert found is not None
            assert found.tobytes() == bytes([index]) * 64
        store.close()


def test_a_row_that_is_half_written_is_not_there() -> None:
    store = SharedStore(3, 1000)
    store.put(1, b"k" * 16, b"data")
    for byte in range(40):
        place = 2 * 64 + byte
        before = os.pread(store.fds[0], 1, place)
        os.pwrite(store.fds[0], bytes([before[0] ^ 1]), place)
        assert store.get(1, b"k" * 16) is None
        os.pwrite(store.fds[0], before, place)
    assert store.get(1, b"k" * 16) is not None
    store.close()


def _function(constant: int) -> Callable[[], int]:
    return [lambda: 1, lambda: 2, lambda: 1][constant]


def _default(value: int = 1) -> int:
    return value


def _other_default(value: int = 2) -> int:
    return value


class _Callable:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


_DIFFERENT = [
    0,
    1,
    True,
    1.0,
    "1",
    b"1",
    None,
    (),
    [],
    {},
    (1,),
    [1],
    ((1,), 2),
    (1, (2,)),
    {"a": 1},
    {"a": 2},
    {1, 2},
    np.zeros(3),
    np.zeros(3, np.float32),
    np.zeros((3, 1)),
    np.float32(0),
    _function(0),
    _function(1),
    _default,
    _other_default,
    _Callable(1),
    _Callable(2),
    _Callable(np.ones(2)),
    np.load,
    np.save,
    len,
    sum,
    np.random.default_rng(0).bit_generator.__class__,
    range(3),
    range(4),
]


def test_different_values_have_different_fingerprints() -> None:
    marks = [fingerprint(value) for value in _DIFFERENT]
    assert len(set(marks)) == len(marks)


def test_parts_of_a_mapped_file_are_told_apart_and_not_read(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "all.npy", np.zeros((8, 4), np.int16))
    mapped = np.load(tmp_path / "all.npy", mmap_mode="r")
    parts = [mapped, mapped[:4], mapped[4:], mapped[::2], mapped.view(np.uint16), mapped[:4].copy()]
    marks = [fingerprint(part) for part in parts]
    assert len(set(marks)) == len(marks)
    assert fingerprint(np.load(tmp_path / "all.npy", mmap_mode="r")[4:]) == marks[2]
    os.utime(tmp_path / "all.npy", (1, 1))  # the file may have changed
    assert fingerprint(mapped) != marks[0]


def test_equal_values_have_equal_fingerprints() -> None:
    assert fingerprint(_Callable([1, "a", np.ones(2)])) == fingerprint(_Callable([1, "a", np.ones(2)]))
    assert fingerprint({"x", "y", "z"}) == fingerprint({"z", "y", "x"})
    assert combined(b"ab", b"c") != combined(b"a", b"bc")


def test_what_has_none(tmp_path: pathlib.Path) -> None:
    with open(tmp_path / "file", "w") as file:
        with pytest.raises(KerasMPError, match="no fingerprint"):
            fingerprint({"file": file})


def test_the_same_in_every_interpreter(tmp_path: pathlib.Path) -> None:
    """Strings are one object in one process and several in the next; hashes of strings differ."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import helper
            import numpy as np
            from keras_mp.memory.fingerprint import fingerprint

            class Load:
                names = {"a", "b", "c", "dd"}

                def __call__(self, path, scale=2.5):
                    def inner(x):
                        return helper.decode(x) if x in {"q", "r", "s"} else np.load(x)

                    return [inner(part) * scale for part in path]

            print(fingerprint(Load()).hex())
            """
        )
    )
    helper = tmp_path / "helper.py"

    def run(**environment: str) -> str:
        return subprocess.run(
            [sys.executable, script],
            env={**os.environ, "PYTHONPATH": python_path(), "PYTHONDONTWRITEBYTECODE": "1", **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    helper.write_text("def decode(x):\n    return x + 1\n")
    first = run(PYTHONHASHSEED="1")
    assert first == run(PYTHONHASHSEED="2")
    helper.write_text("def decode(x):\n    return x + 2\n")
    assert run(PYTHONHASHSEED="1") != first
