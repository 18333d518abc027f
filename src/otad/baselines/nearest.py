"""The nearest-neighbour classifier and its certificate: the rival that needs no training."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["NearestNeighbor"]

BLOCK = 64  # wrong-class samples looked at together when certifying
QUERIES = 128  # samples certified together: bounds the memory of their distance matrix


class NearestNeighbor(nn.Module):
    """1-NN under the Euclidean distance; logit j is minus the distance to the nearest training sample of
    class j.

    Args:
        x_train: training samples, (n, ...); forward takes the same shape.
        y_train: their classes 0, 1, .., each present at least once.

    Raises:
        ValueError: lengths that differ, no samples, a class without samples.
    """

    def __init__(self, x_train: Float[Tensor, "n ..."], y_train: Int[Tensor, " n"]) -> None:
        super().__init__()
        if len(x_train) != len(y_train) or len(x_train) == 0:
            raise ValueError(
                "x_train and y_train need the same number of rows, at least one; "
                f"they have {len(x_train)} and {len(y_train)}"
            )
        counts = torch.bincount(y_train)
        if bool((counts == 0).any()):
            empty = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(f"classes {empty} have no training samples; number the classes 0, 1, .. without gaps")
        order = torch.argsort(y_train, stable=True)
        self.counts = counts.tolist()
        points = x_train.detach()[order].flatten(1)
        self.points: Tensor  # (n, d), sorted by class, so that each class is one slice
        self.labels: Tensor
        self.squares: Tensor
        self.register_buffer("points", points)
        self.register_buffer("labels", y_train[order])
        self.register_buffer("squares", points.square().sum(dim=1))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        flat = x.flatten(1)
        with torch.no_grad():
            nearest = self._nearest_of_each_class(flat.detach())
        # Differences, not the expanded square: exact where x is close to a training sample, and
        # differentiable.
        squared = (flat[:, None] - self.points[nearest]).square().sum(dim=2)
        return -squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()

    def certify(self, x: Float[Tensor, "batch ..."]) -> tuple[np.ndarray, np.ndarray]:
        """Labels and the L2 radius within which each provably stays the same.

        A wrong-class sample j can only become the nearest where it is closer than every own-class sample i,
        and each i keeps it away by (d_j^2 - d_i^2) / (2 |x_i - x_j|), the distance of x to the plane between
        the two. The radius is the smallest over j of the largest over i.

        Args:
            x: samples in the shape of the training samples.

        Returns:
            label: class index, int64 (batch,).
            radius: float64 (batch,), in units of x; 0 where another class is just as near; infinite with one
                class only.
        """
        points = self.points.double()
        labels, radii = [], []
        with torch.no_grad():
            for part in x.flatten(1).split(QUERIES):
                label = self.forward(part.reshape(len(part), *x.shape[1:])).argmax(dim=1)
                squared = _squared_distances(part.double(), points)
                labels.append(label)
                radii.extend(self._radius(points, squared[row], int(label[row])) for row in range(len(part)))
        return torch.cat(labels).cpu().numpy(), np.array(radii, dtype=np.float64)

    def _radius(self, points: Tensor, squared: Tensor, label: int) -> float:
        own = self.labels == label
        others = (~own).nonzero().squeeze(1)
        own_points, own_squared = points[own], squared[own]
        # The nearest own sample alone bounds each j from below; j in that order lets the search stop early.
        anchor = own_squared.argmin()
        lowest = _plane_distances(own_points[anchor][None], own_squared[anchor][None], points[others], squared[others])[
            0
        ]
        lowest, order = lowest.sort()
        radius = float("inf")
        for start in range(0, len(others), BLOCK):
            if float(lowest[start]) >= radius:
                break
            block = others[order[start : start + BLOCK]]
            planes = _plane_distances(own_points, own_squared, points[block], squared[block])
            radius = min(radius, float(planes.amax(dim=0).min()))
        return max(radius, 0.0)

    def _nearest_of_each_class(self, flat: Tensor) -> Int[Tensor, "batch classes"]:
        start, columns = 0, []
        for count in self.counts:
            part = slice(start, start + count)
            columns.append(start + (self.squares[part] - 2 * flat @ self.points[part].T).argmin(dim=1))
            start += count
        return torch.stack(columns, dim=1)


def _plane_distances(
    own: Tensor, own_squared: Tensor, other: Tensor, other_squared: Tensor
) -> Float[Tensor, "own other"]:
    """Signed distance of x to the plane halfway between own and other samples, 0 where they coincide."""
    gap = _squared_distances(own, other).sqrt()
    difference = other_squared[None] - own_squared[:, None]
    return torch.where(gap > 0, difference / (2 * gap.clamp_min(torch.finfo(gap.dtype).tiny)), torch.zeros_like(gap))


def _squared_distances(a: Tensor, b: Tensor) -> Float[Tensor, "a b"]:
    expanded = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * a @ b.T
    return expanded.clamp_min(0.0)
