"""What every reader returns, before samples are divided and scaled, and the checks they share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from otad.errors import DataError

__all__ = ["Parts", "check_finite", "check_labels", "shown"]


@dataclass(frozen=True, eq=False)
class Parts:
    """All samples of a source, in its order.

    Attributes:
        x: images (n, channels, height, width), uint8 or float32 in [0, 1]; or a table (n, features), float64.
        y: labels, int64 or text, shape (n,); None where the source has none.
        is_test: the source's own division, shape (n,); None where it has none.
        split: one phrase about that division.
        units: of the values as they are.
        feature_names: columns of a table; empty for images.
        class_names: what the integer labels stand for.
    """

    x: np.ndarray
    y: np.ndarray | None
    is_test: np.ndarray | None = None
    split: str = ""
    units: str = "as in the file"
    feature_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def images(self) -> bool:
        return self.x.ndim == 4


def check_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """The labels as int64 or text, shape (n,).

    Args:
        labels: anything one-dimensional.
        where: the file, and the column or key, for messages.

    Raises:
        DataError: not one-dimensional, a missing label, or numbers with a fraction.
    """
    if labels.ndim != 1:
        raise DataError(f"{where}: the labels have shape {labels.shape}; expected one label per sample, shape (n,)")
    if labels.dtype.kind in "iu":
        return labels.astype(np.int64)
    if labels.dtype.kind == "f":
        return _whole(labels, where)
    if labels.dtype.kind in "bUS":
        return labels.astype(str)
    for row, value in enumerate(labels):
        if value is None or value != value:
            raise DataError(f"{where}: the label is missing at data row {row + 1}; fill it in or drop the row")
    return np.array([str(value) for value in labels])


def check_finite(x: np.ndarray, feature_names: tuple[str, ...], where: str) -> None:
    """Raise DataError at the first value of a table that is NaN, infinite or beyond float32."""
    # The cast to float32 comes later; a value beyond its range would turn into infinity there.
    bad = ~(np.abs(x) <= np.finfo(np.float32).max)
    if not bad.any():
        return
    row, column = np.argwhere(bad)[0]
    name = repr(feature_names[column]) if feature_names else str(column + 1)
    value = x[row, column]
    kind = "a missing value (NaN)" if np.isnan(value) else f"the value {value:g}"
    raise DataError(
        f"{where}: column {name} has {kind} at data row {row + 1}; fill it in, or drop the row or the column"
    )


def shown(values: Sequence[object], limit: int = 8) -> str:
    """A short list for a message: at most `limit` values, quoted."""
    return ", ".join(repr(str(v)) for v in values[:limit]) + (", ..." if len(values) > limit else "")


def _whole(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels that a file holds as floats although they count classes."""
    for row in np.flatnonzero(~np.isfinite(labels) | (labels != np.round(labels))):
        value = labels[row]
        if np.isnan(value):
            raise DataError(f"{where}: the label is missing at data row {row + 1}; fill it in or drop the row")
        raise DataError(
            f"{where}: the label at data row {row + 1} is {value:g}; classes are whole numbers or text, "
            "so name the column that holds the class"
        )
    return labels.astype(np.int64)
