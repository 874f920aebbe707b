"""Random numbers are a function of (seed, epoch, sample) alone (P2), on threads too."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from keras_mp.engines.isolation import ThreadIsolation
from keras_mp.loading.randomness import Generators, Key, Seeder, takes_rng
from keras_mp.plan.seeds import Stream, seed_sequence

_GLOBAL = Generators()


def _draw_globally() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), random.gauss(0, 1)


def test_equal_keys_give_equal_draws_and_others_do_not() -> None:
    big = 7 + (3 << 32)
    numbers = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 7), (big, 4, 5), (7, 3, 4, 5), (7, 3, big), (0, 5)]
    numbers += [(2**40, 3, 10**12), (2**64, 0, 0), (2**96, 0, 0), (0, 2**32, 0), (0, 0, 2**32), (2**200, 0, 0)]
    keys = [(stream, key) for stream in Stream for key in numbers]
    own = [seed_sequence(stream, *key).generate_state(4).tolist() for stream, key in keys]
    assert own == [seed_sequence(stream, *key).generate_state(4).tolist() for stream, key in keys]
    assert len({tuple(draw) for draw in own}) == len(keys)


def test_keys_seed_both_global_generators() -> None:
    with _GLOBAL.restored():
        draws = []
        for index in (3, 4, 3):
            _GLOBAL.seed(Key(Stream.SAMPLE, 1, 2, index))
            draws.append(_draw_globally())
    assert draws[0] == draws[2]
    assert all(one != other for one, other in zip(draws[0], draws[1], strict=True))


def test_the_global_state_is_restored_after_an_error() -> None:
    before = _GLOBAL.state()
    with pytest.raises(KeyError), _GLOBAL.restored():
        _draw_globally()
        np.random.seed(3)
        raise KeyError
    assert _GLOBAL.state() == before


class _Method:
    def __call__(self, x: int, *, rng: Any = None) -> int:
        return x


def _with_rng(x: int, rng: Any) -> int:
    return x


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_with_rng, True),
        (_Method(), True),
        (lambda x, rng: x, True),
        (functools.partial(_with_rng, 1), True),
        (functools.wraps(_with_rng)(lambda *a: 0), True),
        (lambda x: x, False),
        (lambda x, **kwargs: x, False),
        (np.sin, False),
        (int, False),
        (dict.get, False),
        (None, False),
    ],
)
def test_takes_rng(function: Callable[..., Any] | None, expected: bool) -> None:
    assert takes_rng(function) is expected


# -- threads ---------------------------------------------------------------------------------------------------------


def _alone(load: Callable[[Seeder | None], Any]) -> Any:
    with _GLOBAL.restored():
        return load(_GLOBAL.seed)


def _loads(body: Callable[[int], Any], count: int) -> list[Callable[[Seeder | None], Any]]:
    """One load for each key 0..count-1: it seeds, as loaders do, and runs `body`."""

    def load(number: int, seed: Seeder | None) -> Any:
        if seed is not None:
            seed(Key(Stream.SAMPLE, 0, 0, number))
        return number, body(number)

    return [functools.partial(load, number) for number in range(count)]


def _seeds(isolation: ThreadIsolation) -> bool:
    """Whether it seeds the batches that follow, as it must for code that draws."""
    return isolation.run(lambda seed: seed, _GLOBAL) is not None


def _known_not_to_draw() -> ThreadIsolation:
    isolation = ThreadIsolation()
    (load,) = _loads(lambda number: None, 1)
    isolation.run(load, _GLOBAL)
    assert not _seeds(isolation)
    return isolation


def test_threads_that_draw_globally_draw_what_they_would_alone() -> None:
    isolation = ThreadIsolation()
    barrier = threading.Barrier(4)

    def body(number: int) -> Any:
        if number < 4 and not barrier.broken:
            try:
                barrier.wait(1)  # the first four run at once for certain
            except threading.BrokenBarrierError:
                pass
        return [_draw_globally() for _ in range(20)]

    expected = [_alone(load) for load in _loads(lambda number: [_draw_globally() for _ in range(20)], 40)]
    before = _GLOBAL.state()
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(functools.partial(isolation.run, generators=_GLOBAL), _loads(body, 40)))
    assert got == expected
    assert _seeds(isolation)
    assert _GLOBAL.state() == before


def test_threads_that_do_not_draw_run_side_by_side() -> None:
    isolation = _known_not_to_draw()
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        got = list(
            threads.map(
                functools.partial(isolation.run, generators=_GLOBAL), _loads(lambda number: barrier.wait(30) >= 0, 4)
            )
        )
    assert got == [(number, True) for number in range(4)]  # a barrier of four passes only if four are inside
    assert not _seeds(isolation)


def test_somebody_elses_draw_does_not_make_a_loader_run_exclusively_for_ever() -> None:
    isolation = _known_not_to_draw()
    runs: list[Seeder | None] = []

    def load(seed: Seeder | None) -> str:
        runs.append(seed)
        if seed is None:
            random.random()  # as Keras might in the main thread meanwhile
        else:
            seed(Key(Stream.SAMPLE, 0, 0, 1))
        return "batch"

    assert isolation.run(load, _GLOBAL) == "batch"
    assert len(runs) == 2
    assert not _seeds(isolation)


def test_an_error_without_draws_is_raised_once() -> None:
    runs = []

    def load(seed: Seeder | None) -> None:
        runs.append(seed)
        raise KeyError("bad sample")

    with pytest.raises(KeyError, match="bad sample"):
        _known_not_to_draw().run(load, _GLOBAL)
    assert runs == [None]


def test_an_error_after_a_draw_counts_only_if_it_comes_again_seeded() -> None:
    """With `retries`, or code that fails at random, the failure itself must be reproducible."""
    isolation = ThreadIsolation()

    def load(seed: Seeder | None) -> float:
        if seed is not None:
            seed(Key(Stream.SAMPLE, 0, 0, 5))
        value = random.random()
        if seed is None:
            raise ValueError("unlucky")
        return value

    assert isolation.run(load, _GLOBAL) == _alone(load)
    assert _seeds(isolation)
    with pytest.raises(ValueError, match="always"):
        isolation.run(lambda seed: _raise(ValueError("always")), _GLOBAL)
    # The lock is free again.
    assert ThreadIsolation().run(lambda seed: 3, _GLOBAL) == 3


def _raise(error: Exception) -> None:
    raise error
