"""Memory and descriptors: refused, full, held for long, given back (P3, P4, P6)."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

import keras_mp
from keras_mp.workers.handle import INLINE_SAMPLES
from tests.census import eventually
from tests.faults import scripts
from tests.faults.common import digest, digests, harmed, undisturbed

Array = npt.NDArray[Any]


# -- refused ---------------------------------------------------------------------------------------------------------

_EVERYBODY = "for pid in dataset.stats()['pids']: resource.prlimit(pid, resource.RLIMIT_FSIZE, ({size}, -1))"
_FILES_LEFT = "(len(os.listdir('/proc/self/fd')) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])"
# What refuses it, and what the error says of that.
_REFUSALS = {
    "slots cannot be made larger by workers": (_EVERYBODY.format(size=4096), r"process \d+", "ulimit -f"),
    "slots cannot be made by the parent": (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))",
        "the training process",
        "ulimit -f",
    ),
    "requests cannot be written to the slot": (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))",
        "the training process",
        "ulimit -f",
    ),
    "no descriptor is left in the parent": (
        f"resource.setrlimit(resource.RLIMIT_NOFILE, {_FILES_LEFT})",
        "the training process",
        "ulimit -n",
    ),
}
_REASONS = {"ulimit -f": "File too large", "ulimit -n": "Too many open files"}
_SETTING = """
    import resource
    source = np.random.default_rng(1).random((6 * {samples}, 30 if {samples} > 100 else 1000))
    order = lambda epoch, rng: rng.permutation(len(source))
    def make(**options):
        return keras_mp.PoolDataset(source, batch_size={samples}, seed=3, order=order, max_queue_size=2, **options)
    with make(workers=0) as plain:
        expected = digests(plain) + digests(plain)
    soft = [(limit, resource.getrlimit(limit)) for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)]
    def lift():
        for limit, values in soft:
            resource.setrlimit(limit, values)
        {lift}
"""


@pytest.mark.parametrize(
    ("refusal", "samples"),
    [(name, count) for name in _REFUSALS for count in (4, 3 * INLINE_SAMPLES) if count > 4 or "requests" not in name],
)
def test_a_batch_that_memory_is_refused_for_is_an_error(refusal: str, samples: int, tmp_path: Path) -> None:
    """It says which limit, and how much; nothing is lost: when the limit is lifted, that batch comes next (P1)."""
    refuse, where, limit = _REFUSALS[refusal]
    code = (
        _SETTING.format(samples=samples, lift=_EVERYBODY.format(size=-1))
        + f"""
    with make(workers=2) as dataset:
        dataset[0]
        dataset.set_epoch(0)
        held = []
        for _ in range(2):
            {refuse}
            try:
                for batch in dataset:
                    held.append(batch)
                    del batch
            except keras_mp.KerasMPError as error:
                print("told", str(error))
            state = dataset.state_dict()
            lift()
            dataset.load_state_dict(state)
            held += dataset  # the rest of the epoch
        assert digests(held) == expected
        stats = dataset.stats()
        assert stats["restarts"] == 0 and len(stats["pids"]) == 2, stats
        assert stats["slots"] <= len(held) + 4, stats
        del held
    print("right")
    """
    )
    said = scripts.run(code, tmp_path)
    assert said.splitlines()[-1] == "right", said
    told = [line for line in said.splitlines() if line.startswith("told")]
    assert len(told) == 2, said
    for line in told:
        assert re.search(rf"no shared memory for batch \d of epoch [01]: {where} was refused \d+ bytes", line), said
        assert _REASONS[limit] in line
        assert limit in line


def test_memory_that_was_refused_while_reading_ahead_is_asked_for_again(tmp_path: Path) -> None:
    """By the time that the batch is wanted, the limit has been lifted."""
    code = (
        _SETTING.format(samples=4, lift="")
        + """
    with make(workers=1) as dataset:
        iterator = iter(dataset)
        held = [next(iterator)]
        while dataset.stats()["queued"] + dataset.stats()["running"]:
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
        held.append(next(iterator))
        lift()
        held += iterator
        assert digests(held) == expected[:6]
        assert dataset.stats()["slots"] <= 8
        del held
    print("right")
    """
    )
    assert scripts.run(code, tmp_path).splitlines()[-1] == "right"


def test_address_space_refused_in_a_worker(tmp_path: Path) -> None:
    """A worker that cannot map a large slot says so of the batch; it does not die in silence."""
    code = """
    import resource
    def transform(index):
        if index == 5:
            limit = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
            resource.setrlimit(resource.RLIMIT_AS, (limit + (30 << 20), limit + (30 << 20)))
        return np.full(20 << 20, index, np.uint8)
    with keras_mp.PoolDataset(range(10), transform, batch_size=5, workers=1) as dataset:
        assert dataset[0].nbytes == 100 << 20
        try:
            dataset[1]
        except keras_mp.SampleError as error:
            assert isinstance(error, MemoryError)
            print(error)
    """
    assert "batch 1 of epoch 0" in scripts.run(code, tmp_path)


def test_address_space_refused_in_the_parent(tmp_path: Path) -> None:
    code = """
    import resource
    with keras_mp.PoolDataset(range(4), lambda i: np.full(200 << 20, i, np.uint8), batch_size=1, workers=1) as dataset:
        line = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
        limit = (int(line.split()[1]) << 10) + (180 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            dataset[2]
        except keras_mp.KerasMPError as error:
            print(error)
    """
    said = scripts.run(code, tmp_path)
    assert "batch 2 of epoch 0" in said
    assert "the training process was refused" in said
    assert "Cannot allocate memory" in said
    assert "ulimit -v" in said


def test_descriptors_that_run_out_while_workers_start(tmp_path: Path) -> None:
    """Whatever step it is that fails: an error that says what to do, or the right batches; and nothing is left open."""
    code = """
    import resource
    expected = undisturbed()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = []
    for spare in (*range(0, 30), 64):  # which is enough for all slots, too
        resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + spare, hard))
        try:
            with harmed("load", None, workers=3) as dataset:
                assert digests(dataset) == expected
        except (OSError, keras_mp.KerasMPError) as error:
            assert "Too many open files" in str(error)
            assert isinstance(error, OSError) or "ulimit" in str(error)
            told.append(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for thread in threading.enumerate():
            if thread.name.startswith("keras_mp"):
                thread.join(10)
                assert not thread.is_alive()
        assert len(os.listdir("/proc/self/fd")) == before, (spare, before, told, os.listdir("/proc/self/fd"))
    print(max(told))  # at the boundary it depends on which workers have started already
    with harmed("load", None, workers=3) as dataset:
        assert digests(dataset) == expected
    """
    assert 5 < int(scripts.run(code, tmp_path).splitlines()[-1]) < 64


def test_more_workers_than_descriptors_allow(tmp_path: Path) -> None:
    code = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, 4096))
    with harmed("load", None, workers=4000, max_queue_size=1000) as dataset:
        assert digests(dataset) == undisturbed()
        print(len(dataset.stats()["pids"]))
    """
    assert 1 <= int(scripts.run(code, tmp_path).splitlines()[-1]) < 15


def test_a_pool_starts_no_more_workers_than_there_is_work(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.WorkerPool(4096) as many, harmed("load", None, pool=many, max_queue_size=2) as dataset:
        assert digests(dataset) == undisturbed()
        assert len(many.stats()["pids"]) <= 4


def test_code_that_leaves_files_open(tmp_path: Path, pool: keras_mp.WorkerPool) -> None:
    """A worker that has run out of descriptors is replaced by a fresh one."""
    held = []

    def leak(row: Array) -> Array:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        for _ in range(2):
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        return row

    source = np.arange(24000.0).reshape(240, 100)
    with keras_mp.PoolDataset(source, leak, batch_size=4, pool=pool) as dataset:
        kept = []  # so that new slots are needed all the time
        for number, batch in enumerate(dataset):
            kept.append(batch)
            np.testing.assert_array_equal(batch, source[number * 4 : number * 4 + 4])
        assert dataset.stats()["restarts"] > 0


_SHM = """
mount -t tmpfs -o size={size} tmpfs /dev/shm && {fill} exec "$@"
"""


@pytest.mark.parametrize(("size", "fill"), [("64m", ""), ("4k", "head -c 4096 /dev/zero > /dev/shm/full;")])
def test_dev_shm_does_not_matter(size: str, fill: str, tmp_path: Path) -> None:
    unshare = [shutil.which("unshare") or "unshare", "--mount", "--map-root-user"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let a test have a /dev/shm of its own")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, os, numpy as np, keras_mp\n"
        "print(os.statvfs('/dev/shm').f_bavail)\n"
        "source = np.random.default_rng(0).random((8, 4 << 20), np.float32)\n"
        "with keras_mp.PoolDataset(source, batch_size=2, workers=2) as dataset:\n"
        "    held = list(dataset)\n"
        "    assert all((batch == source[2 * i : 2 * i + 2]).all() for i, batch in enumerate(held))\n"
        "print('right')\n"
    )
    done = subprocess.run(
        [*unshare, "sh", "-c", _SHM.format(size=size, fill=fill), "sh", sys.executable, "-W", "error", script],
        env={**os.environ, "KERAS_BACKEND": "numpy", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    free, right = done.stdout.split()
    assert right == "right"
    assert fill == "" or free == "0"


# -- held and given back ---------------------------------------------------------------------------------------------


def _stamp(index: int) -> Array:
    return np.full(5000, index, np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_arrays_held_at_random_are_never_overwritten(seed: int, pool: keras_mp.WorkerPool) -> None:  # P6
    rng = np.random.default_rng(seed)
    held: dict[int, tuple[int, Array]] = {}
    with keras_mp.PoolDataset(range(800), _stamp, batch_size=2, pool=pool) as dataset:
        for number, batch in enumerate(dataset):
            assert (batch[0] == 2 * number).all()
            held[int(rng.integers(60))] = number, batch[1:, 4000:][::-1] if number % 3 else batch
            for value, array in held.values():
                assert array[-1, -1] == 2 * value + 1, "overwritten"
        for value, array in held.values():
            assert (array[-1] == 2 * value + 1).all()
        assert dataset.stats()["slots"] < 2 * (60 + 10 + 8)
    for value, array in held.values():
        assert (array[-1] == 2 * value + 1).all()  # closed by now


@pytest.mark.parametrize("cached", [False, True])
def test_tensors_held_at_random_are_never_overwritten(cached: bool, pool: keras_mp.WorkerPool) -> None:  # P6
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(9)
    held: dict[int, tuple[int, Any]] = {}
    with keras_mp.PoolDataset(range(300), _stamp, batch_size=2, pool=pool) as dataset:
        stream = dataset.to_tf_dataset(epochs=1, prefetch=4)
        if cached:
            stream = stream.cache()
        for _ in range(2):
            for number, batch in enumerate(stream.prefetch(8)):
                held[int(rng.integers(40))] = number, batch if number % 2 else batch[1:, ::7]
                for value, tensor in held.values():
                    assert int(tensor[-1, -1]) == 2 * value + 1, "overwritten"
        for value, tensor in held.values():
            assert bool(tf.reduce_all(tensor[-1] == 2 * value + 1))
        del stream, batch, tensor
        held.clear()
        _flush(tf)


def _flush(tf: Any) -> None:
    """TensorFlow lets go of the last arrays that it was given only when a later call into Python returns."""
    gc.collect()
    for _ in range(2):
        tf.numpy_function(lambda: np.int64(0), [], tf.int64)


def test_slots_and_memory_stay_bounded_over_many_batches(pool: keras_mp.WorkerPool) -> None:
    process = psutil.Process()
    with keras_mp.PoolDataset(np.zeros((4000, 2000)), batch_size=2, pool=pool) as dataset:
        rss, slots = [], []
        for _ in range(5):  # 10,000 batches
            for _ in dataset:
                pass
            rss.append(process.memory_info().rss)
            slots.append(dataset.stats()["slots"])
        workers = [psutil.Process(pid) for pid in dataset.stats()["pids"]]
        assert max(slots) <= 20
        assert rss[-1] - rss[1] < 30 << 20
        assert all(worker.num_fds() < 80 for worker in workers)


def test_memory_of_a_burst_is_given_back_by_all(pool: keras_mp.WorkerPool) -> None:
    """By the parent when the consumer has let go, and by every worker, also the idle one."""
    source = np.arange(800)
    with keras_mp.PoolDataset(source, _stamp, batch_size=1, pool=pool) as dataset:
        workers = []
        held = [dataset[i] for i in range(800)]
        workers = [psutil.Process(pid) for pid in dataset.stats()["pids"]]
        assert dataset.stats()["slots"] >= 800 // 8
        del held
        gc.collect()
        digest(dataset[0])
        digest(dataset[1])
        assert dataset.stats()["slots"] < 30
        assert eventually(lambda: all(_memory_files(worker) < 80 for worker in workers))
    assert eventually(lambda: not any(_memory_files(worker) for worker in workers))


def _large(index: int) -> Array:
    return np.full(20 << 20, index, np.uint8)


def test_slots_of_large_batches_are_no_more_than_are_needed(pool: keras_mp.WorkerPool) -> None:
    """In steady state, and soon after a consumer has let go of many, though it asks for no more."""
    with keras_mp.PoolDataset(range(40), _large, batch_size=1, pool=pool, max_queue_size=3) as dataset:
        for _ in range(2):
            for _batch in dataset:
                pass
        del _batch
        needed = 3 + 2  # read ahead, the one being consumed, and the next
        assert dataset.stats()["slot_bytes"] < (needed + 1) * (24 << 20)
        held = [dataset[index] for index in range(20)]
        assert dataset.stats()["slots"] >= 20
        del held
        gc.collect()
        assert eventually(lambda: dataset.stats()["slot_bytes"] < (needed + 5) * (24 << 20))
        workers = [psutil.Process(pid) for pid in dataset.stats()["pids"]]
        assert eventually(lambda: all(_memory_files(worker) < 2 * (needed + 5) + 8 for worker in workers))


def test_an_epoch_of_large_batches_makes_no_new_slots(pool: keras_mp.WorkerPool) -> None:
    with keras_mp.PoolDataset(range(20), _large, batch_size=1, pool=pool, max_queue_size=6) as dataset:
        addresses = [{batch.ctypes.data for batch in dataset} for _ in range(6)]
        # How many are in use together varies with the load; of 120 batches each epoch's own would be 8 a time.
        assert len(set().union(*addresses)) <= 3 * (6 + 2)


def _memory_files(process: psutil.Process) -> int:
    """Memory files of ours that a process holds, segments of closed datasets included."""
    count = 0
    for name in os.listdir(f"/proc/{process.pid}/fd"):
        try:
            count += "keras_mp" in os.readlink(f"/proc/{process.pid}/fd/{name}")
        except OSError:
            continue
    return count


def test_a_failed_batch_gives_its_slot_back(pool: keras_mp.WorkerPool) -> None:
    def fail(index: int) -> Array:
        if index % 2:
            raise ValueError(index)
        return _stamp(index)

    with keras_mp.PoolDataset(range(200), fail, batch_size=1, pool=pool) as dataset:
        for index in range(200):
            if index % 2:
                with pytest.raises(ValueError, match=f"sample {index} "):
                    dataset[index]
            else:
                assert (dataset[index] == index).all()
        assert dataset.stats()["slots"] <= 30


def test_warnings_about_memory_are_not_needed(pool: keras_mp.WorkerPool) -> None:
    with warnings.catch_warnings(), harmed("load", None, pool=pool) as dataset:
        warnings.simplefilter("error")
        assert digests(dataset) == undisturbed()
