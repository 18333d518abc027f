"""What the readers return: samples, labels, and how they were divided and scaled."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from otad.data.scaling import Scaling

__all__ = ["Dataset", "Features"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test part, ready for `fit`.

    Attributes:
        name: the name or the file it came from.
        x_train: images (n, channels, height, width) in [0, 1], or a table (n, features).
        y_train: labels as given, int64 or text, shape (n,).
        x_test: like x_train.
        y_test: like y_train; every class occurs in y_train too.
        split: one sentence: how the two parts were made, with the seed.
        units: of x, hence of radii: "pixel values in [0, 1]", "training standard deviations",
            "as in the file", "log-normalised expression", or "as scaled by the model".
        box: the range that no input leaves, (0, 1) for images; None where there is none.
        feature_names: the columns of a table; empty for images.
        scaling: how the columns were standardised; None where they were not.
        class_names: what the integer labels 0, 1, ... stand for, where the source says so; else empty.
    """

    name: str
    x_train: Float32[np.ndarray, "n_train ..."]
    y_train: np.ndarray
    x_test: Float32[np.ndarray, "n_test ..."]
    y_test: np.ndarray
    split: str
    units: str
    box: tuple[float, float] | None
    feature_names: tuple[str, ...] = ()
    scaling: Scaling | None = None
    class_names: tuple[str, ...] = ()


class Features(NamedTuple):
    """Samples to predict, in the order of their source.

    Attributes:
        x: images (n, channels, height, width) in [0, 1], or a table (n, features).
        y: labels, shape (n,); None where the source has none.
        name: the name or the file it came from.
        feature_names: the columns of a table; empty for images.
        rows: the position of each sample in its source, of a test part in that part, counted from 0.
    """

    x: Float32[np.ndarray, "n ..."]
    y: np.ndarray | None
    name: str
    feature_names: tuple[str, ...]
    rows: np.ndarray
