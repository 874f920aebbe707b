"""Dask and Ray without keras_mp: the work placed once, a few tasks in flight, results in the order of the batches."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.loaders import Feed
from benchmarks.work import Work


class _Ahead:
    """An epoch of which `in_flight` batches are submitted ahead."""

    def __init__(
        self, batches: int, in_flight: int, submit: Callable[[int], Any], result: Callable[[Any], Any]
    ) -> None:
        self._batches, self._in_flight = batches, in_flight
        self._submit, self._result = submit, result

    def __iter__(self) -> Iterator[Any]:
        tasks: deque[Any] = deque()
        for index in range(self._batches):
            tasks.append(self._submit(index))
            if len(tasks) == self._in_flight:
                yield self._result(tasks.popleft())
        while tasks:
            yield self._result(tasks.popleft())


def _load(work: Work, index: int) -> Any:
    return work[index]


def dask(work: Work, workers: int, epochs: int) -> Feed:
    """`client.submit` of a function whose first argument has been scattered."""
    client = dask_client(workers)
    placed = client.scatter(work, broadcast=True)

    def submit(index: int) -> Any:
        return client.submit(_load, placed, index, pure=False)

    return Feed(_Ahead(len(work), _in_flight(workers), submit, lambda task: task.result()), close=client.close)


def ray(work: Work, workers: int, epochs: int) -> Feed:
    """`ray.get` of a remote function whose first argument has been `put`."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    load, placed = ray.remote(_load), ray.put(work)
    ahead = _Ahead(len(work), _in_flight(workers), lambda index: load.remote(placed, index), ray.get)
    return Feed(ahead, close=ray.shutdown)


def dask_client(workers: int) -> Any:
    """Of a cluster of so many processes on this machine, which talk through TCP on loopback; closing it ends them."""
    from distributed import Client

    return Client(n_workers=workers, threads_per_worker=1, processes=True, protocol="tcp", dashboard_address=":0")


def _in_flight(workers: int) -> int:
    return max(10, 2 * workers)
