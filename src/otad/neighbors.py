"""Exact nearest neighbours, in chunks of bounded memory."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["PointIndex", "indexed", "nearest_neighbors"]

DISTANCES_AT_ONCE = 2**25
OFFSET = 16.0  # |mean|^2 over the mean squared distance from it
FROM_DIFFERENCES = "donot_use_mm_for_euclid_dist"


def nearest_neighbors(
    x: Float[Tensor, "m d"], points: Float[Tensor, "n d"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """The k points nearest to each query, nearest first; equal distances go to the smaller index.

    Args:
        x: queries.
        points: what is searched; for many searches among the same points see `PointIndex`.
        k: neighbours, at most n.

    Returns:
        Euclidean distances (float64, from the differences themselves, so that ties and zeros are exact) and indices.

    Raises:
        ValueError: k is not between 1 and n.
    """
    return PointIndex(points).nearest(x, k)


class PointIndex:
    """Points to search among, with what every search needs of them, made once.

    Products find the candidates, in the dtype of the points, and differences in float64 decide among them. A bound on
    the rounding of the products tells the queries where a point left out could be nearer; there all are compared.

    Args:
        points: what is searched, shape (n, d).
    """

    @torch.no_grad()
    def __init__(self, points: Float[Tensor, "n d"]) -> None:
        self.points, self.version = points, _version(points)
        self.lost = (points.shape[1] + 8) * torch.finfo(points.dtype).eps
        self.center = points.mean(0)
        squares = torch.cat([(part - self.center).square().sum(1) for part in points.split(_rows(points))])
        # A large common offset would drown the products in rounding; a small one needs no copy of the points.
        offset = float(self.center.square().sum()) > OFFSET * float(squares.mean())
        self.held = points - self.center if offset else points
        self.offset = torch.zeros_like(self.center) if offset else self.center
        sizes = squares if offset else torch.linalg.vector_norm(points, dim=1).square()
        self.low = squares / 2 - self.lost * (squares + sizes)

    def is_of(self, points: Tensor) -> bool:
        """Whether it is made of these points, unchanged since."""
        return self.points is points and self.version == _version(points)

    def nearest(self, x: Float[Tensor, "m d"], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """As `nearest_neighbors`."""
        points = self.points
        if not 1 <= k <= len(points):
            raise ValueError(f"k must be between 1 and the number of points {len(points)}; got {k}")
        with torch.no_grad():
            spare = min(len(points), k + 8)  # rounding of the products may swap near ties: refine a few more
            rows = max(1, DISTANCES_AT_ONCE // max(len(points), spare * points.shape[1]))
            found = []
            for chunk in x.split(rows):
                query = chunk - self.center
                near = torch.addmm(self.low, query, self.held.T, alpha=-1).topk(spare, dim=1, largest=False)
                squares, indices = _refined(chunk, points, near.indices)
                size = query.square().sum(1)
                # No point left out is nearer than this.
                bound = 2 * (near.values[:, -1] + query @ self.offset) + size
                bound = bound - self.lost * (3 * size + self.offset.square().sum())
                doubtful = ~(squares[:, k - 1] < bound) & (spare < len(points))
                if doubtful.any():
                    apart = torch.cdist(chunk[doubtful].double(), points.double(), compute_mode=FROM_DIFFERENCES)
                    chosen = apart.sort(dim=1, stable=True).indices[:, :spare]
                    squares[doubtful], indices[doubtful] = _refined(chunk[doubtful], points, chosen)
                found.append((squares[:, :k].sqrt(), indices[:, :k]))
            return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def indexed(points: Float[Tensor, "n d"], index: PointIndex | None) -> PointIndex:
    """The index, if it is of these points; else a new one."""
    return index if index is not None and index.is_of(points) else PointIndex(points)


def _version(points: Tensor) -> int:
    return -1 if points.is_inference() else points._version


def _rows(points: Tensor) -> int:
    return max(1, DISTANCES_AT_ONCE // (8 * points.shape[1]))


def _refined(
    x: Float[Tensor, "m d"], points: Float[Tensor, "n d"], candidates: Int[Tensor, "m spare"]
) -> tuple[Float[Tensor, "m spare"], Int[Tensor, "m spare"]]:
    """Squared distances of candidates from the differences, in order; equal ones by index."""
    candidates = candidates.sort(dim=1).values
    exact = (points[candidates].double() - x[:, None].double()).square().sum(2)
    order = exact.sort(dim=1, stable=True)
    return order.values, candidates.gather(1, order.indices)
