"""Exact nearest neighbours, in chunks of bounded memory."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["nearest_neighbors"]

DISTANCES_AT_ONCE = 2**25
FROM_DIFFERENCES = "donot_use_mm_for_euclid_dist"


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
        # What rounding may take from <a, b> and from |b|^2 / 2, per |a|^2 + |b|^2; points far out lose most.
        lost = (points.shape[1] + 8) * torch.finfo(points.dtype).eps
        found = []
        for chunk in x.split(rows):
            query = chunk - center
            near = torch.addmm(half * (1 - 2 * lost), query, centered.T, alpha=-1).topk(spare, dim=1, largest=False)
            squares, indices = _refined(chunk, points, near.indices)
            # No point left out is nearer than this.
            bound = 2 * near.values[:, -1] + (1 - 2 * lost) * query.square().sum(1)
            doubtful = (squares[:, k - 1] >= bound) & (spare < len(points))
            if doubtful.any():
                apart = torch.cdist(chunk[doubtful].double(), points.double(), compute_mode=FROM_DIFFERENCES)
                chosen = apart.sort(dim=1, stable=True).indices[:, :spare]
                squares[doubtful], indices[doubtful] = _refined(chunk[doubtful], points, chosen)
            found.append((squares[:, :k].sqrt(), indices[:, :k]))
        return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _refined(
    x: Float[Tensor, "m d"], points: Float[Tensor, "n d"], candidates: Int[Tensor, "m spare"]
) -> tuple[Float[Tensor, "m spare"], Int[Tensor, "m spare"]]:
    """Squared distances of candidates from the differences, in order; equal ones by index."""
    candidates = candidates.sort(dim=1).values
    exact = (points[candidates].double() - x[:, None].double()).square().sum(2)
    order = exact.sort(dim=1, stable=True)
    return order.values, candidates.gather(1, order.indices)
