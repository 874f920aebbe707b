"""What holds for every test: quiet backends, and nothing left behind (P4)."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from hypothesis import HealthCheck, settings

import keras_mp
from tests import census

# A loaded machine makes single examples slow; no test may depend on the wall clock.
settings.register_profile("keras_mp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("keras_mp")

_outcome = pytest.StashKey[bool]()


@pytest.fixture(scope="session", autouse=True)
def _standard_library_helper() -> None:
    """Starts multiprocessing's resource tracker, which a first pool of spawned processes would leave running."""
    resource_tracker.ensure_running()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[_outcome] = report.passed
    return report


@pytest.fixture
def pool() -> Iterator[keras_mp.WorkerPool]:
    """Two workers, which start when they are first asked for something."""
    with keras_mp.WorkerPool(2) as made:
        yield made


@pytest.fixture(scope="module")
def running_pool() -> Iterator[keras_mp.WorkerPool]:
    """Two workers that run already: of a wider scope than the census, so that no test counts as leaving them behind."""
    with keras_mp.WorkerPool(2) as made:
        with keras_mp.PoolDataset(range(16), batch_size=1, pool=made) as dataset:
            for _ in dataset:
                pass
        yield made


@pytest.fixture(scope="module")
def processes() -> Iterator[concurrent.futures.Executor]:
    """An executor of the user's, running likewise."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as made:
        list(made.map(abs, range(8)))
        yield made


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a process, thread, descriptor or shared memory of keras_mp's kinds behind.

    What a fixture of a wider scope has started already does not count. A test that failed anyway is not looked at: its
    traceback keeps its objects alive.
    """
    before = census.take_census()
    yield
    if request.node.stash.get(_outcome, False):
        # What a cluster of a wider scope has started or opened meanwhile is no leak; its fixture sees to its end.
        ours_only = request.node.get_closest_marker("cluster") is not None
        left = census.wait_until_nothing_is_left(before, ours_only=ours_only)
        assert not left, "left behind:\n" + "\n".join(left)
