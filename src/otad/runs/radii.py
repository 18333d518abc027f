"""Radii at which methods are compared, where the user names none."""

import logging
import math

import numpy as np
import torch

from otad.baselines import NearestNeighbor
from otad.data import Dataset
from otad.data.splits import held_out, stratified_subset
from otad.errors import DataError

__all__ = ["radii_for"]

logger = logging.getLogger("otad.runs")

MNIST_RADII = (0.5, 1.0, 1.58)
CERTIFIED = (0.9, 0.7, 0.5)  # of the held-out samples that 1-NN classifies rightly
HELD_OUT = 0.2
MOST_SAMPLES, MOST_MEASURED = 6000, 300


def radii_for(data: Dataset) -> list[float]:
    """Growing L2 radii: MNIST's usual three for grey images of 28 x 28, else by what 1-NN certifies.

    Of the training samples, at most 6,000, a fifth is held out, of which at most 300 are measured. 1-NN on the others
    certifies 90, 70 and 50 % of those it classifies rightly at these radii, to two digits (fewer radii where some agree
    in these). So all data are attacked about as hard, in units of what a method without training proves, and test
    samples have no part in it.

    Raises:
        DataError: no such radii, since 1-NN is wrong, or too many samples have a twin of another class.
    """
    if data.box is not None and data.x_train.shape[1:] == (1, 28, 28):
        return list(MNIST_RADII)
    y = np.unique(data.y_train, return_inverse=True)[1]
    some = stratified_subset(y, min(len(y), MOST_SAMPLES), 0)  # in random order
    x, y = torch.as_tensor(data.x_train[some]), torch.as_tensor(y[some])
    shared = torch.bincount(y).amax() > 1
    held = torch.from_numpy(held_out(y.numpy(), HELD_OUT, 0)) if shared else torch.zeros_like(y, dtype=torch.bool)
    measured = held.nonzero().squeeze(1)[:MOST_MEASURED]
    if not len(measured):
        raise DataError(f"{data.name}: too few samples of any class to hold some out and choose radii by; give --eps")
    logger.info("radii for %s: what 1-NN certifies of %d held-out training samples", data.name, len(measured))
    certificate = NearestNeighbor(x[~held], y[~held]).certify(x[measured], box=data.box)
    right = certificate.label == y[measured].numpy()
    radii = [float(np.quantile(certificate.radius[right], 1 - share)) if right.any() else 0.0 for share in CERTIFIED]
    if not 0 < radii[0] <= radii[-1] < math.inf:
        raise DataError(f"{data.name}: 1-NN certifies nothing, or everything, so no radius suits; give --eps")
    return sorted({_two_digits(radius) for radius in radii})


def _two_digits(value: float) -> float:
    return round(value, 1 - math.floor(math.log10(value)))
