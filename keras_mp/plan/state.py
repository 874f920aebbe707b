"""A dataset's place in its epochs as plain numbers: what `state_dict()` gives and `load_state_dict()` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_mp.plan.batching import Batching
from keras_mp.plan.progress import Progress

_VERSION = 2


def dump_state(progress: Progress, plan: Batching, loader: str, batch_seed: int | None) -> dict[str, Any]:
    """The state of a dataset that has come as far as `progress`.

    Args:
        progress: what has been handed out.
        plan: of its batches.
        loader: what kind of dataset it is.
        batch_seed: root of the order of batches where Keras shuffles them.
    """
    return {
        "version": _VERSION,
        "loader": loader,
        **plan.identity,
        "epoch": progress.epoch,
        "position": progress.position,
        "missing": sorted(progress.missing),
        "permuted": progress.permuted,
        "batch_seed": batch_seed,
    }


def check_version(state: Mapping[str, Any]) -> None:
    """Raises ValueError if the state is of another version, in which its numbers meant something else."""
    if state.get("version") != _VERSION:
        raise ValueError(
            f"state has version {state.get('version')!r}, but this keras_mp reads version {_VERSION}: seeds have other "
            "meanings in others; start the epoch over with set_epoch()"
        )


def load_state(state: Mapping[str, Any], plan: Batching, loader: str) -> Progress:
    """What has been handed out, by a state of the same dataset.

    Raises:
        ValueError: it is of another dataset, or names batches that there are not.
    """
    for name, mine in {"loader": loader, **plan.identity}.items():
        if state.get(name) != mine:
            raise ValueError(
                f"state is of another dataset: {name} is {state.get(name)!r} there and {mine!r} here; make the "
                "dataset as it was when the state was taken"
            )
    epoch, position, count = state.get("epoch"), state.get("position"), plan.num_batches
    missing, permuted = state.get("missing"), state.get("permuted")
    if not (isinstance(epoch, int) and epoch >= 0):
        raise ValueError(f"state has epoch {epoch!r}; it must be a number from 0")
    if not (isinstance(position, int) and 0 <= position <= count):
        raise ValueError(f"state has position {position!r}, but the dataset has {count} batches in an epoch")
    if not (isinstance(missing, list) and all(isinstance(at, int) and 0 <= at < position for at in missing)):
        raise ValueError(f"state has missing {missing!r}; it must list positions from 0 to {position - 1}")
    if not isinstance(permuted, bool):
        raise ValueError(f"state has permuted {permuted!r}; it must be a bool")
    return Progress(epoch, position, set(missing), permuted)
