"""Numbers and names as a report says them."""

from __future__ import annotations

from collections.abc import Sequence

from keras_mp.loading.timing import SlowSample


def count(number: int, one: str, many: str = "") -> str:
    """A number of things: "1 worker", "2 workers"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def capital(text: str) -> str:
    """The beginning of a sentence; `fit` stays what it is."""
    return text if text == "fit" else text[:1].upper() + text[1:]


def listed(samples: Sequence[SlowSample]) -> str:
    """Samples by index, item and time; where the item is an array, which has no name, by index and time."""
    return ", ".join(
        f"{sample.index} ({seconds(sample.seconds)})"
        if sample.item.startswith("array of shape")
        else f"{sample.index} ({sample.item}: {seconds(sample.seconds)})"
        for sample in samples
    )


def share(value: float) -> str:
    """A part of 1 in percent."""
    return "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    if value >= 1:
        return f"{value:,.1f} s" if value >= 100 else f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} µs"


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"
