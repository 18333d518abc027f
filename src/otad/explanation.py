"""Which training samples a feature is made of."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.defense import OTAD

__all__ = ["Explanation", "explain"]

AT_ONCE = 256


@dataclass(frozen=True)
class Explanation:
    """The training samples that make up each feature.

    Attributes:
        indices: of training samples, most weight first, shape (n, k).
        weights: their convex weights, shape (n, k); rows sum to 1 where k is large enough to hold all active samples.
    """

    indices: np.ndarray
    weights: np.ndarray


def explain(module: OTAD, samples: Int[Tensor, " points"], inputs: Float[Tensor, "n ..."], k: int = 10) -> Explanation:
    """The k training samples with the largest weights in each feature.

    Args:
        module: the classifier.
        samples: the training sample behind each point that its interpolation names.
        inputs: to explain.
        k: samples to name; all where there are fewer.
    """
    indices, weights = [], []
    for part in inputs.split(AT_ONCE):
        with torch.no_grad():
            stats = module.features(part).stats
        # A point may carry weight in the lower and in the upper potential: add them up.
        dense = torch.zeros(len(part), len(samples), dtype=torch.float64)
        dense.scatter_add_(1, stats["indices"], stats["weights"])
        best = dense.topk(min(k, len(samples)), dim=1)
        indices.append(samples[best.indices])
        weights.append(best.values)
    return Explanation(torch.cat(indices).numpy(), torch.cat(weights).numpy())
