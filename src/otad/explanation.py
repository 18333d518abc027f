"""Which training samples a feature is made of."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.defense import OTAD
from otad.nn import EncodedStem
from otad.transport import TransportMap

__all__ = ["Explanation", "explain", "explain_encoded"]

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
    named, place = samples.unique(return_inverse=True)
    indices, weights = [], []
    for part in inputs.split(AT_ONCE):
        with torch.no_grad():
            stats = module.features(part).stats
        # A sample may carry weight in the lower and in the upper potential, and in several poses: add them up.
        dense = torch.zeros(len(part), len(named), dtype=torch.float64)
        dense.scatter_add_(1, place[stats["indices"]], stats["weights"])
        best = dense.topk(min(k, len(named)), dim=1)
        indices.append(named[best.indices])
        weights.append(best.values)
    return Explanation(torch.cat(indices).numpy(), torch.cat(weights).numpy())


def explain_encoded(module: OTAD, transport: TransportMap, inputs: Float[Tensor, "n ..."], k: int = 10) -> Explanation:
    """The k nearest training samples of the predicted class, by the points of an encoder, all of the same weight.

    Args:
        module: on an `EncodedStem`.
        transport: the training points, before the encoder.
        inputs: to explain.
        k: samples to name; all where there are fewer. Where the class has fewer the others have weight 0.
    """
    stem = module.stem
    assert isinstance(stem, EncodedStem)
    indices, weights = [], []
    with torch.no_grad():
        points = torch.cat([stem.encoded(part) for part in transport.x.split(AT_ONCE)])
        for part in inputs.split(AT_ONCE):
            other = module(part).argmax(1)[:, None] != transport.y
            distance = torch.cdist(stem(part), points).masked_fill(other, torch.inf)
            best = distance.topk(min(k, len(points)), dim=1, largest=False)
            alike = best.values.isfinite().double()
            indices.append(transport.samples[best.indices])
            weights.append(alike / alike.sum(1, keepdim=True).clamp(min=1))
    return Explanation(torch.cat(indices).numpy(), torch.cat(weights).numpy())
