"""Shards: the parts fit together, and data-parallel training on them is training on the whole."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import keras_mp
from tests.support import python_path

_SCRIPT = Path(__file__).parent / "scripts" / "distributed.py"


def epoch_of(dataset: Any) -> list[list[int]]:
    return [batch.tolist() for batch in dataset]


@pytest.mark.parametrize(
    ("samples", "size", "parts"), [(24, 3, 2), (23, 3, 2), (25, 4, 3), (13, 4, 3), (7, 2, 3), (9, 2, 4)]
)
def test_shards_are_disjoint_cover_the_epoch_and_have_equal_batches(samples: int, size: int, parts: int) -> None:
    with keras_mp.PoolDataset(range(samples), batch_size=size, shuffle=True, seed=3, workers=0) as whole:
        for _ in range(2):
            shards = [whole.shard(parts, index) for index in range(parts)]
            epochs = [epoch_of(shard) for shard in shards]
            assert len({len(epoch) for epoch in epochs}) == 1
            assert all(batch for epoch in epochs for batch in epoch)
            assert sorted(s for epoch in epochs for batch in epoch for s in batch) == list(range(samples))
            whole.set_epoch(whole.epoch + 1)


def test_shards_reassemble_to_the_global_batch_whatever_their_number() -> None:
    def joined(parts: int) -> list[list[int]]:
        whole = keras_mp.PoolDataset(range(48), batch_size=12 // parts, shuffle=True, seed=5, workers=0)
        shards = [whole.shard(parts, index) for index in range(parts)]
        return [list(itertools.chain(*step)) for step in zip(*(epoch_of(shard) for shard in shards), strict=True)]

    alone = epoch_of(keras_mp.PoolDataset(range(48), batch_size=12, shuffle=True, seed=5, workers=0))
    assert joined(2) == joined(3) == joined(4) == alone


def test_a_sample_is_augmented_alike_on_whatever_shard() -> None:
    def noise(_: int, rng: np.random.Generator) -> float:
        return float(rng.random())

    with keras_mp.PoolDataset(range(12), noise, batch_size=4, seed=1, workers=0) as whole:
        alone = np.concatenate([*whole])
    part = keras_mp.PoolDataset(range(12), noise, batch_size=2, seed=1, workers=0)
    halves = [np.concatenate([*part.shard(2, index)]) for index in (0, 1)]
    np.testing.assert_array_equal(np.sort(alone), np.sort(np.concatenate(halves)))


def test_epochs_are_reshuffled_across_shards() -> None:
    shard = keras_mp.PoolDataset(range(100), batch_size=10, shuffle=True, seed=0, workers=0).shard(2, 0)
    first, second = ({sample for batch in shard for sample in batch.tolist()} for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("parts", "index", "text"),
    [(0, 0, "num_shards"), (2, 2, "below num_shards=2"), (2, -1, "index"), (9, 0, "too few")],
)
def test_wrong_shards_are_refused(parts: int, index: int, text: str) -> None:
    whole = keras_mp.PoolDataset(range(8), batch_size=2, workers=0)
    with pytest.raises(ValueError, match=text):
        whole.shard(parts, index)
    with pytest.raises(ValueError, match="already"):
        whole.shard(2, 0).shard(2, 0)


def test_single_samples_that_do_not_divide_are_refused_with_the_way_out() -> None:
    whole = keras_mp.PoolDataset(range(7), batch_size=1, workers=0)
    with pytest.raises(ValueError, match=r"drop_remainder=True, or batch_size=2"):
        whole.shard(2, 0)
    assert len(whole.shard(7, 3)) == 1
    assert len(keras_mp.PoolDataset(range(7), batch_size=1, drop_remainder=True, workers=0).shard(2, 1)) == 3


def run(*arguments: str, backend: str = "tensorflow", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, _SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": python_path(), "KERAS_BACKEND": backend, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_mirrored_strategy_over_two_devices_trains_to_the_same_weights() -> None:
    found = weights(run("mirrored"))
    np.testing.assert_allclose(found["two"], found["one"], atol=1e-6)
    assert found["replicas"] == 2


def test_data_parallel_over_two_devices_trains_to_the_same_weights() -> None:
    pytest.importorskip("jax")
    found = weights(run("data_parallel", backend="jax", XLA_FLAGS="--xla_force_host_platform_device_count=2"))
    np.testing.assert_allclose(found["two"], found["one"], atol=1e-6)
    assert found["replicas"] == 2


def test_two_processes_on_shards_train_to_the_weights_of_one_on_the_whole() -> None:
    with socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in (first, second)]
    alone = weights(run("worker"))
    config = [json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}) for i in (0, 1)]
    both = [run("worker", TF_CONFIG=text) for text in config]
    for process in both:
        np.testing.assert_allclose(weights(process)["weights"], alone["weights"], atol=1e-6)


# -- finding one's place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_two_processes_find_their_places_and_train_on_each_sample_once_an_epoch(backend: str) -> None:  # P1
    pytest.importorskip(backend)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, _SCRIPT.with_name("places.py"), backend, str(rank), port],
            env={**os.environ, "PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        found = [weights(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [f"shard={rank} of 2" in each["shard"] for rank, each in enumerate(found)] == [True, True]
    assert found[0]["steps"] == found[1]["steps"] == 3
    assert found[0]["trained"] == found[1]["trained"]
    for epoch, steps in enumerate(found[0]["trained"]):
        assert len(steps) == 3
        assert sorted(sample for step in steps for sample in step) == list(range(22))
        assert sorted(found[0]["own"][epoch] + found[1]["own"][epoch]) == list(range(22))


def _config(**task: Any) -> str:
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1"], "evaluator": ["e:1"]}
    return json.dumps({"cluster": cluster, "task": task})


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> keras_mp.PoolDataset:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    return keras_mp.PoolDataset(range(12), batch_size=2, workers=0)


@pytest.mark.parametrize(
    ("task", "shard"), [({"type": "chief", "index": 0}, 0), ({"type": "worker", "index": 0}, 1)], ids=str
)
def test_tf_config_says_which_worker_this_is(
    whole: keras_mp.PoolDataset, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any], shard: int
) -> None:
    monkeypatch.setenv("TF_CONFIG", _config(**task))
    assert f"shard={shard} of 3" in repr(whole.shard())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"cluster": {"worker": ["a:1"]}}),
        json.dumps({"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}),
        _config(type="ps", index=0),
        _config(type="evaluator", index=0),
        _config(type="worker", index=2),
        _config(type="worker", index=-1),
        _config(type="worker", index="first"),
    ],
)
def test_a_tf_config_that_names_no_worker_is_refused(
    whole: keras_mp.PoolDataset, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=r"TF_CONFIG=.*does not say which worker this is.*shard\(num_shards, index\)"):
        whole.shard()


def test_a_process_that_trains_alone_is_told_what_was_looked_for(whole: keras_mp.PoolDataset) -> None:
    looked_for = r"keras\.distribution.*TF_CONFIG.*jax\.process_index.*torch\.distributed.*shard\(num_shards, index\)"
    with pytest.raises(ValueError, match=looked_for):
        whole.shard()


@pytest.mark.parametrize("arguments", [{"num_shards": 2}, {"index": 0}])
def test_half_a_place_is_refused(whole: keras_mp.PoolDataset, arguments: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="needs both num_shards and index, or none of them"):
        whole.shard(**arguments)
