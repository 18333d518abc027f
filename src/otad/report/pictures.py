"""What the page shows besides numbers: the transport in the plane and single test samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Contribution", "GallerySample", "TransportPicture"]


@dataclass(frozen=True)
class TransportPicture:
    """Training points and where the transport map takes them.

    Attributes:
        x: points after the stem, shape (n, d).
        z: their features, shape (n, d).
        y: class index, shape (n,).
        class_names: one name per class.
        paths: points between x and z, shape (n, steps, d), first x and last z; None draws straight arrows.
    """

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray
    class_names: Sequence[str]
    paths: np.ndarray | None = None


@dataclass(frozen=True)
class Contribution:
    """One training sample and its weight in the feature of a test sample."""

    index: int
    label: str
    weight: float
    sample: np.ndarray


@dataclass(frozen=True)
class GallerySample:
    """One test sample with all that is known about it.

    Attributes:
        index: its row in the test set.
        sample: (c, h, w) in [0, 1] for images, (features,) for tables.
        label, predicted: names of the true and the predicted class.
        certified_radius: certified L2 radius; None where the method has no certificate.
        attacked_at: the largest radius key tried; None where the sample was not attacked.
        adversarial: the adversarial example of the smallest radius that has one; None where none does.
        adversarial_at: that radius key.
        adversarial_norm: L2 distance between the sample and the adversarial example.
        adversarial_predicted: name of the class predicted for it.
        explanation: the training samples that make up the feature, largest weight first.
    """

    index: int
    sample: np.ndarray
    label: str
    predicted: str
    certified_radius: float | None = None
    attacked_at: str | None = None
    adversarial: np.ndarray | None = None
    adversarial_at: str | None = None
    adversarial_norm: float | None = None
    adversarial_predicted: str | None = None
    explanation: Sequence[Contribution] = ()
