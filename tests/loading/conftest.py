"""One engine of each kind, for tests of what must be the same on all of them."""

from __future__ import annotations

from typing import Any

import pytest

_ENGINES: dict[str, dict[str, Any]] = {
    "in-process": {"workers": 0},
    "processes": {"workers": 2},
    "threads": {"workers": 2, "use_multiprocessing": False},
}


@pytest.fixture(params=_ENGINES)
def engine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A dataset's arguments for it."""
    return _ENGINES[request.param]
