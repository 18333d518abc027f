"""Standardise the columns of a table, and remember how."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Float64, Num

from otad.errors import DataError

__all__ = ["Scaling"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Scaling:
    """x -> (x - mean) / scale, column by column.

    Attributes:
        mean: mean of each column, in the units of the source.
        scale: standard deviation of each column (divisor n); 1 where the column is constant.
    """

    mean: Float64[np.ndarray, " features"]
    scale: Float64[np.ndarray, " features"]

    @classmethod
    def fit(cls, x: Num[np.ndarray, "n features"], feature_names: Sequence[str] = ()) -> Self:
        """The scaling that gives each column of x mean 0 and standard deviation 1.

        Constant columns are centred only, and named in a warning of the log.

        Args:
            x: training samples.
            feature_names: names of the columns, for messages.

        Raises:
            DataError: every column is constant.
        """
        x = x.astype(np.float64)
        mean, scale = x.mean(axis=0), x.std(axis=0)
        # Rounding may give a constant column a tiny deviation, so compare the values themselves.
        constant = x.min(axis=0) == x.max(axis=0)
        if constant.all():
            raise DataError("every column is constant over the training samples: nothing to learn from; check the file")
        if constant.any():
            names = _names(constant, feature_names)
            logger.warning("%d constant column(s) carry no information and are only centred: %s", constant.sum(), names)
        mean = np.where(constant, x[0], mean)
        # The square of a deviation may underflow to 0 although the values differ.
        scale = np.where(constant | (scale == 0), 1.0, scale)
        return cls(mean=mean, scale=scale)

    def apply(self, x: Num[np.ndarray, "n other"]) -> Float32[np.ndarray, "n other"]:
        """Scale the columns of x.

        Raises:
            DataError: x has another number of columns, or values that the scaling takes out of float32.
        """
        if x.shape[1] != len(self.mean):
            raise DataError(
                f"the data has {x.shape[1]} feature columns and the scaling was made for {len(self.mean)}; "
                "give the columns the model was trained on"
            )
        # In float64, because a large mean would eat the digits that matter in float32.
        scaled = (x.astype(np.float64) - self.mean) / self.scale
        if not (np.abs(scaled) <= np.finfo(np.float32).max).all():
            row, column = np.argwhere(~(np.abs(scaled) <= np.finfo(np.float32).max))[0]
            raise DataError(
                f"the value {x[row, column]:g} in feature column {column + 1}, data row {row + 1}, "
                "does not fit float32 once scaled; correct or drop the row"
            )
        return scaled.astype(np.float32)

    def to_dict(self) -> dict[str, list[float]]:
        """The scaling as lists, for JSON."""
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The scaling that `to_dict` wrote.

        Raises:
            DataError: keys are missing, the lists differ in length, or hold anything but finite numbers
                (scale: positive).
        """
        try:
            mean = np.asarray(values["mean"], dtype=np.float64)
            scale = np.asarray(values["scale"], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a scaling: expected the lists 'mean' and 'scale' ({error})") from error
        if mean.ndim != 1 or mean.shape != scale.shape:
            raise DataError(
                f"not a scaling: 'mean' has shape {mean.shape}, 'scale' {scale.shape}; expected equal lists"
            )
        if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise DataError("not a scaling: every mean must be finite and every scale finite and above 0")
        return cls(mean=mean, scale=scale)


def _names(constant: np.ndarray, feature_names: Sequence[str]) -> str:
    columns = np.flatnonzero(constant)
    shown = [feature_names[int(j)] if feature_names else f"number {j + 1}" for j in columns[:10]]
    return ", ".join(shown) + (", ..." if len(columns) > 10 else "")
