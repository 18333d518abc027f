"""Radii at which methods are compared, where the user names none."""

import math

import numpy as np
import torch

from otad.baselines import NearestNeighbor
from otad.data import Dataset
from otad.data.splits import held_out, stratified_subset
from otad.errors import DataError

__all__ = ["radii_for"]

MNIST_RADII = (0.5, 1.0, 1.58)
CERTIFIED = (0.9, 0.7, 0.5)  # of the held-out samples that 1-NN classifies rightly
HELD_OUT = 0.2
MOST_KNOWN, MOST_MEASURED = 6000, 1000


def radii_for(data: Dataset) -> list[float]:
    """Three growing L2 radii: MNIST's usual ones for grey images of 28 x 28, else by what 1-NN certifies.

    A fifth of the training samples is held out (at most 1,000 are measured), and 1-NN on the others (at most 6,000)
    certifies 90, 70 and 50 % of those it classifies rightly at these radii, to two digits. So all data are attacked
    about as hard, in units of what a method without training proves, and test samples have no part in it.

    Raises:
        DataError: no such radii, since 1-NN is wrong, or too many samples have a twin of another class.
    """
    if data.box is not None and data.x_train.shape[1:] == (1, 28, 28):
        return list(MNIST_RADII)
    y = np.unique(data.y_train, return_inverse=True)[1]
    some = np.arange(len(y)) if len(y) <= MOST_KNOWN else stratified_subset(y, MOST_KNOWN, 0)
    x, y = torch.as_tensor(data.x_train[some]), torch.as_tensor(y[some])
    held = torch.from_numpy(held_out(y.numpy(), HELD_OUT, 0))
    measured = held.nonzero().squeeze(1)[:MOST_MEASURED]
    certificate = NearestNeighbor(x[~held], y[~held]).certify(x[measured], box=data.box)
    right = certificate.label == y[measured].numpy()
    radii = [float(np.quantile(certificate.radius[right], 1 - share)) if right.any() else 0.0 for share in CERTIFIED]
    if not 0 < radii[0] < radii[-1] < math.inf:
        raise DataError(f"{data.name}: 1-NN certifies too little to choose radii by; give --eps")
    return [_two_digits(radius) for radius in radii]


def _two_digits(value: float) -> float:
    return round(value, 1 - math.floor(math.log10(value)))
