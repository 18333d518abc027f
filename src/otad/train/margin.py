"""Distances between the rows of a head: what margins are divided by."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = ["row_distances"]


def row_distances(rows: Float[Tensor, "classes d"], labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
    """|w_j - w_y| for the label y of every sample, 0 for j = y, differentiable there too.

    Args:
        rows: w, of the head.
        labels: class indices.
    """
    own = functional.embedding(labels[:, None], rows)  # an index would sum its gradients in the order of threads
    squared = (rows[None] - own).square().sum(2)
    others = torch.ones_like(squared, dtype=torch.bool).scatter(1, labels[:, None], False)
    return torch.where(others, squared.clamp(min=1e-12).sqrt(), 0)
