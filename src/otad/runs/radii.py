"""Radii at which methods are compared, where the user names none."""

import math

import numpy as np
import torch

from otad.data import Dataset
from otad.errors import DataError

__all__ = ["radii_for"]

MNIST_RADII = (0.5, 1.0, 1.58)
# What MNIST's radii are of that median, 3.31, over 4,000 of its digits: so all data are attacked about as hard.
SHARES = (0.15, 0.3, 0.48)
SAMPLES = 1000


def radii_for(data: Dataset) -> list[float]:
    """Three growing L2 radii: MNIST's usual ones for grey images of 28 x 28, else by the distance between classes.

    Half the distance to the nearest training sample of another class is about what an attacker of 1-NN needs; the
    radii are 0.15, 0.3 and 0.48 of its median over the first 1,000 training samples, to two digits.

    Raises:
        DataError: that median is 0.
    """
    if data.box is not None and data.x_train.shape[1:] == (1, 28, 28):
        return list(MNIST_RADII)
    x = torch.as_tensor(data.x_train).double().flatten(1)
    y = torch.as_tensor(np.unique(data.y_train, return_inverse=True)[1])
    nearest = torch.cat(
        [
            torch.cdist(part, x).masked_fill(labels[:, None] == y[None], torch.inf).amin(dim=1)
            for part, labels in zip(x[:SAMPLES].split(100), y[:SAMPLES].split(100))
        ]
    )
    half = float(nearest.median()) / 2
    if half == 0:
        raise DataError(f"{data.name}: most samples have a twin of another class, so no radius suits; give --eps")
    return [_two_digits(share * half) for share in SHARES]


def _two_digits(value: float) -> float:
    return round(value, 1 - math.floor(math.log10(value)))
