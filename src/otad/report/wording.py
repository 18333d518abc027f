"""Numbers and keys in the words of the page and the terminal."""

import math
from collections.abc import Iterable

__all__ = ["number", "percent", "radius_key", "radius_of", "radius_words", "sorted_radii", "split_key"]

_NORMS = {"l2": "L2", "linf": "L∞"}


def percent(share: float | None) -> str:
    """0.9481 -> "94.8 %"; a missing share is a dash."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def number(value: object, digits: int = 3) -> str:
    """A number with `digits` significant digits, in plain notation where that is short; text as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}e}"


def radius_key(norm: str, eps: float) -> str:
    """The key of a budget: "0.5" for L2, "linf:0.03" for L-infinity."""
    text = f"{eps:g}"
    return text if norm == "l2" else f"{norm}:{text}"


def split_key(key: str) -> tuple[str, float]:
    """The norm and the radius of a key: "linf:0.03" -> ("linf", 0.03)."""
    norm, _, radius = key.rpartition(":")
    return norm or "l2", float(radius)


def radius_of(key: str) -> float:
    """The radius of a key."""
    return split_key(key)[1]


def radius_words(key: str) -> str:
    """The key as a reader says it: "0.5" -> "L2 0.5"."""
    norm, _, radius = key.rpartition(":")
    return f"{_NORMS.get(norm or 'l2', norm)} {radius}"


def sorted_radii(keys: Iterable[str]) -> list[str]:
    """Keys without repetition, L2 first, each norm by growing radius."""
    return sorted(set(keys), key=lambda key: (split_key(key)[0] != "l2", *split_key(key)))
