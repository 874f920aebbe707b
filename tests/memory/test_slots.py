"""Slots: aligned, growing, and given back only when the last array on them is gone (P4, P6)."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mp.memory import files, pickling
from keras_mp.memory.control import CONTROL_BYTES, NOT_STARTED
from keras_mp.memory.segment import Segment, map_segment
from keras_mp.memory.slot_writer import SlotWriter
from keras_mp.memory.slots import Lease, Slot, SlotPool

Array = npt.NDArray[Any]


def _free(slots: SlotPool) -> int:
    return slots.free


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.fixture
def slots() -> Iterator[SlotPool]:
    made = SlotPool()
    yield made
    made.close()


class _Worker:
    """The worker's side of a slot, in this process."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.memory = SlotWriter(os.dup(slot.fd))
        self.memory.begin(slot.size)

    def answer(self, batch: Any) -> tuple[bytes, list[tuple[int, int]]]:
        """Encodes `batch` as the worker's main loop does, and tells the slot's new size."""
        buffers: pickling.Buffers = []
        header = pickling.dump_result(batch, buffers)
        places = [self.memory.put(buffer) for buffer in buffers]
        self._slot.size = self.memory.size
        return header, places

    def close(self) -> None:
        self.memory.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Slot], _Worker]]:
    made: list[_Worker] = []

    def connect(slot: Slot) -> _Worker:
        made.append(_Worker(slot))
        return made[-1]

    yield connect
    for worker in made:
        worker.close()


Connect = Callable[[Slot], _Worker]

# -- the worker's side -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3 * mmap.PAGESIZE), max_size=12))
def test_memory_is_aligned_disjoint_and_kept_while_the_slot_grows(sizes: list[int]) -> None:
    slot = Slot(0)
    memory = SlotWriter(os.dup(slot.fd))
    try:
        memory.begin(slot.size)
        taken = [memory.take(size) for size in sizes]
        for number, (_, part) in enumerate(taken):
            part[...] = number + 1
        end = CONTROL_BYTES
        for size, (offset, part) in zip(sizes, taken, strict=True):
            assert offset % 64 == 0
            assert offset >= end
            assert part.nbytes == size
            assert size == 0 or _address(part) % 64 == 0
            end = offset + size
        assert memory.size >= end
        slot.size = memory.size
        whole = slot.memory()  # what the parent sees
        for number, (offset, part) in enumerate(taken):
            assert (whole[offset : offset + part.nbytes] == number + 1).all()
    finally:
        memory.close()
        slot.close()


def test_arrays_in_the_slot_are_not_copied_and_others_are(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    worker = connect(lease.slot)
    inside = worker.memory.empty((100, 7), np.dtype(np.float32))
    inside[...] = 1
    grown = worker.memory.empty((50_000,), np.dtype(np.int64))  # beyond the first mapping
    grown[...] = 2
    outside = np.full((10,), 3.0)
    used = worker.memory.end
    header, places = worker.answer({"a": inside, "b": grown, "c": outside, "d": inside[16:32]})
    assert worker.memory.end - used < outside.nbytes + 64
    batch = lease.decode(header, places)
    for key, value in {"a": 1, "b": 2, "c": 3, "d": 1}.items():
        assert (batch[key] == value).all()
        assert _address(batch[key]) % 64 == 0
    assert np.shares_memory(batch["a"], batch["d"])


def test_a_view_off_alignment_is_copied_to_an_aligned_place(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    worker = connect(lease.slot)
    inside = worker.memory.empty((100,), np.dtype(np.float32))
    inside[...] = np.arange(100)
    batch = lease.decode(*worker.answer(inside[1:50]))
    np.testing.assert_array_equal(batch, np.arange(1, 50))
    assert _address(batch) % 64 == 0


def test_empty_arrays_take_no_slot_memory(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    worker = connect(lease.slot)
    assert worker.memory.empty((0, 5), np.dtype(np.float64)).shape == (0, 5)
    batch = lease.decode(*worker.answer([np.zeros((0, 5)), np.zeros(())]))
    assert batch[0].shape == (0, 5)
    assert batch[1].shape == ()


def test_the_parent_sees_how_far_a_worker_is(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    assert (lease.control.batch, lease.control.position) == (0, NOT_STARTED)
    worker = connect(lease.slot)
    worker.memory.begin_sample(7)
    assert (lease.control.batch, lease.control.position) == (0, 7)
    worker.memory.begin_batch(1)
    assert (lease.control.batch, lease.control.position) == (1, NOT_STARTED)
    worker.memory.begin_sample(2)
    assert (lease.control.batch, lease.control.position) == (1, 2)
    del lease
    gc.collect()
    assert slots.acquire().control.position == NOT_STARTED


@pytest.mark.parametrize("size", [10, 5 * mmap.PAGESIZE])
def test_a_long_request_travels_in_the_slot(slots: SlotPool, connect: Connect, size: int) -> None:
    lease = slots.acquire()
    data = os.urandom(size)
    lease.slot.write(data)
    assert connect(lease.slot).memory.read(size) == data


def test_a_header_in_the_slot(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    worker = connect(lease.slot)
    header, places = worker.answer(["text", np.arange(5)])
    place = worker.memory.put(pickle.PickleBuffer(header))
    lease.slot.size = worker.memory.size
    text, array = lease.decode(place, places)
    assert text == "text"
    np.testing.assert_array_equal(array, np.arange(5))


# -- leases ----------------------------------------------------------------------------------------------------------

_LAST_VIEWS: dict[str, Callable[[Any], Any]] = {
    "the array": lambda a: a,
    "a slice": lambda a: a[2:3],
    "a slice of a slice": lambda a: a[1:][1:][:1],
    "transposed and reshaped": lambda a: a.T.reshape(-1)[:1] if a.ndim == 1 else a.T,
    "another dtype": lambda a: a.view(np.uint8)[::16],
    "a memoryview": lambda a: memoryview(a),
    "a memoryview of a slice": lambda a: memoryview(a[3:])[1:],
    "np.frombuffer": lambda a: np.frombuffer(a, dtype=np.uint8),
    "np.asarray of a memoryview": lambda a: np.asarray(memoryview(a)),
    "stride tricks": lambda a: np.lib.stride_tricks.sliding_window_view(a, 2),
    "an object with the array interface": lambda a: np.asarray(_Interface(a)),
    "DLPack": lambda a: np.from_dlpack(a),
}


class _Interface:
    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def __array_interface__(self) -> Any:
        return self.array.__array_interface__


@pytest.mark.parametrize("view", _LAST_VIEWS.values(), ids=_LAST_VIEWS)
def test_a_slot_returns_only_after_its_last_view(
    slots: SlotPool, connect: Connect, view: Callable[[Array], Any]
) -> None:  # P6
    lease = slots.acquire()
    slot = lease.slot
    batch = lease.decode(*connect(slot).answer([np.arange(10.0), np.arange(10.0, 20.0)]))
    del lease
    gc.collect()
    assert not _free(slots), "batch alive"
    last = view(batch[1])
    del batch
    gc.collect()
    assert not _free(slots), "view alive"
    other = slots.acquire()
    assert other.slot is not slot
    del last
    gc.collect()
    assert _free(slots) == 1
    assert slots.acquire().slot is slot
    del other
    gc.collect()


def test_a_copy_does_not_hold_the_slot(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    copy = lease.decode(*connect(lease.slot).answer(np.arange(10.0))).copy()
    del lease
    gc.collect()
    assert _free(slots) == 1
    np.testing.assert_array_equal(copy, np.arange(10.0))


def test_what_torch_holds_is_not_overwritten(slots: SlotPool, connect: Connect) -> None:  # P6
    torch = pytest.importorskip("torch")
    lease = slots.acquire()
    batch = lease.decode(*connect(lease.slot).answer(np.arange(10.0)))
    address = _address(batch)
    tensor = torch.from_numpy(batch)
    del lease, batch
    gc.collect()
    assert tensor.data_ptr() == address
    assert not _free(slots)
    del tensor
    gc.collect()
    assert _free(slots) == 1


def test_batches_stay_valid_when_their_pool_closes_and_when_the_slot_grows(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    slot = lease.slot
    batch = lease.decode(*connect(slot).answer(np.arange(10.0)))
    address = _address(batch)
    os.ftruncate(slot.fd, 1 << 20)
    slot.size = 1 << 20
    slot.memory()  # maps it anew
    np.testing.assert_array_equal(batch, np.arange(10.0))
    slots.close()
    np.testing.assert_array_equal(batch, np.arange(10.0))
    assert _address(batch) == address
    del batch, lease  # the slot is closed: its return must not fail
    gc.collect()


def test_slots_are_reused_the_warmest_first(slots: SlotPool) -> None:
    first, second = slots.acquire(), slots.acquire()
    warm = second.slot
    del first
    gc.collect()
    del second
    gc.collect()
    assert slots.acquire().slot is warm
    assert len(slots.slots) == 2


def _lease(slots: SlotPool, size: int = 0) -> Lease:
    """A lease on a slot of some size whose batch the consumer has taken."""
    lease = slots.acquire()
    _grow(lease.slot, size)
    lease.slot.in_flight = False
    return lease


def _grow(slot: Slot, size: int) -> None:
    """Makes a slot larger, as a worker does; nothing is written there."""
    if size > slot.size:
        os.ftruncate(slot.fd, size)
        slot.size = size


@pytest.mark.parametrize(("size", "most"), [(0, 1 + 2 * 2 + 4 + 8), (100 << 20, 1 + 2 * 2 + 4)])
def test_trim_gives_memory_back_after_a_burst(slots: SlotPool, size: int, most: int) -> None:
    leases = [_lease(slots, size) for _ in range(40)]
    assert slots.trim() == []
    assert len({lease.slot.fd for lease in leases}) == 40
    del leases[2:]
    gc.collect()
    dropped = slots.trim()
    assert len(dropped) == len(set(dropped))
    assert len(slots.slots) == 40 - len(dropped) == most
    assert not set(dropped) & set(slots.slots)
    assert all(lease.slot.number in slots.slots for lease in leases)
    assert slots.nbytes == sum(slot.size for slot in slots.slots.values())
    assert slots.trim() == []


@pytest.mark.parametrize("in_flight", [1, 3, 10, 40])
@pytest.mark.parametrize("held", [0, 1, 4])
def test_steady_state_makes_no_slot_and_keeps_none_it_does_not_need(slots: SlotPool, in_flight: int, held: int) -> None:
    """Epochs that begin with nothing, read ahead, and let go of what they hold all at once, or not at all."""
    made = []
    for epoch in range(12):
        reading: list[Lease] = []
        holding: list[Lease] = []
        for _ in range(100):
            reading.append(slots.acquire())
            _grow(reading[-1].slot, 100 << 20)
            made += slots.trim()
            if len(reading) == in_flight:
                holding.append(reading.pop(0))
                holding[-1].slot.in_flight = False
            if len(holding) > held:
                holding = []
        assert epoch < 3 or not made, "dropped what was needed again"
        made.clear()
        assert len(slots.slots) <= in_flight + held + 1
        del reading, holding


def test_a_retired_slot_is_never_lent_again(slots: SlotPool, connect: Connect) -> None:
    lease = slots.acquire()
    number = lease.slot.number
    batch = lease.decode(*connect(lease.slot).answer(np.arange(10.0)))
    slots.retire(lease.slot)
    assert slots.trim() == [number]
    assert slots.trim() == []
    np.testing.assert_array_equal(batch, np.arange(10.0))
    del lease, batch
    gc.collect()
    assert slots.acquire().slot.number != number
    assert number not in slots.slots


def test_no_memory_is_an_os_error_and_leaves_nothing(slots: SlotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(OSError, match="No space left"):
        slots.acquire()
    assert not slots.slots
    with pytest.raises(OSError, match="No space left"):
        Segment([pickle.PickleBuffer(b"abc")], [(0, 3)], 3)


# -- segments --------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_segments_hold_their_buffers(data: list[bytes]) -> None:
    buffers = [pickle.PickleBuffer(part) for part in data]
    places, size = files.place_buffers(buffers)
    segment = Segment(buffers, places, size)
    try:
        if size:
            memory = map_segment(segment.fd, size)
            assert not memory.flags.writeable
            assert [memory[offset : offset + length].tobytes() for offset, length in places] == data
            assert segment.holds(buffers, places, size)
        changed = [pickle.PickleBuffer(bytes(255 - byte for byte in part)) for part in data]
        assert any(data) != (size > 0 and segment.holds(changed, places, size)) or not size
        assert not segment.holds(buffers, places, size + 1)
    finally:
        segment.close()


def test_segments_of_the_same_bytes_share_their_memory() -> None:
    def segment(data: bytes) -> Segment:
        buffers = [pickle.PickleBuffer(data)]
        return Segment.holding(buffers, *files.place_buffers(buffers))

    first, second, other = segment(b"abc" * 1000), segment(b"abc" * 1000), segment(b"abd" * 1000)
    try:
        assert os.fstat(first.fd).st_ino == os.fstat(second.fd).st_ino != os.fstat(other.fd).st_ino
        first.close()
        third = segment(b"abc" * 1000)  # of the one that is left
        assert os.fstat(third.fd).st_ino == os.fstat(second.fd).st_ino
        assert map_segment(third.fd, third.size)[:6].tobytes() == b"abcabc"
        second.close()
        third.close()
        before = len(os.listdir("/dev/fd"))
        segment(b"abc" * 1000).close()
        assert len(os.listdir("/dev/fd")) == before
    finally:
        for made in (first, second, other):
            made.close()


def test_an_empty_segment_holds_nothing() -> None:
    segment = Segment([], [], 0)
    try:
        assert segment.holds([], [], 0)
    finally:
        segment.close()


def test_memory_files_have_no_name(tmp_path: Path) -> None:  # P4, P7
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    fd = files.create_memory_file()
    try:
        assert os.fstat(fd).st_nlink == 0
        assert not os.get_inheritable(fd)
        assert not {name for name in os.listdir("/dev/shm") if "keras_mp" in name} - before
    finally:
        os.close(fd)


def test_memory_files_where_the_system_has_no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    fd = files.create_memory_file()
    try:
        assert os.fstat(fd).st_nlink == 0
        os.ftruncate(fd, 100)
    finally:
        os.close(fd)
