"""Small training sets for rivals."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor


def two_clouds(n: int = 200, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two Gaussian clouds around (+1.5, 0, ..) and (-1.5, 0, ..), far enough apart to be separable but for a few."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.5 * torch.randn(n, d, generator=generator)
    x[:, 0] += 3.0 * y - 1.5
    return x, y


def digits(n_train: int = 600, n_test: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real digits, 8 x 8 in [0, 1], as images: training samples and classes, test samples and classes."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))[: n_train + n_test]
    x = torch.as_tensor(pixels[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.as_tensor(labels[order])
    return x[:n_train], y[:n_train], x[n_train:], y[n_train:]
