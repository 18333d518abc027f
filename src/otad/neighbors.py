"""Exact nearest neighbours, in chunks of bounded memory."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["nearest_neighbors"]

DISTANCES_AT_ONCE = 2**25


def nearest_neighbors(
    x: Float[Tensor, "m d"], points: Float[Tensor, "n d"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k points nearest to each query, nearest first; equal distances go to the smaller index.

    Args:
        x: queries.
        points: what is searched.
        k: neighbours, at most n.

    Returns:
        Euclidean distances (float64, from the differences themselves, so that ties and zeros are exact) and indices.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"k must be between 1 and the number of points {len(points)}; got {k}")
    with torch.no_grad():
        spare = min(len(points), k + 8)  # rounding of the products may swap near ties: refine a few more
        center = points.mean(0)  # a common offset would drown the products in rounding
        centered = points - center
        half = centered.square().sum(1) / 2
        rows = max(1, DISTANCES_AT_ONCE // max(len(points), spare * points.shape[1]))
        found = []
        for chunk in x.split(rows):
            candidates = (
                torch.addmm(half, chunk - center, centered.T, alpha=-1).topk(spare, dim=1, largest=False).indices
            )
            candidates = candidates.sort(dim=1).values
            exact = (points[candidates].double() - chunk[:, None].double()).square().sum(2)
            order = exact.sort(dim=1, stable=True)
            found.append((order.values[:, :k].sqrt(), candidates.gather(1, order.indices[:, :k])))
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])
