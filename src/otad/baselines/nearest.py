"""The nearest-neighbour classifier and its certificate: the rival that needs no training."""

import time

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.threat_model import ThreatModel
from otad.certificate import Certificate
from otad.cip import PowerDiagram

__all__ = ["NearestNeighbor", "fit_nearest"]

BLOCK = 64  # wrong-class samples looked at together when certifying
QUERIES = 128  # samples certified together: bounds the memory of their distance matrix
# Logits are distances rounded to float32, by a share of 2^-24: squares further apart than 2^-22 of the larger one keep
# their order. Up to the radius the distance to j at most doubles; that makes 2^-20, and we take twice as much.
SQUARES_ROUNDING = 2.0**-19
DOUBLE = 2.0**-52
FLOAT32 = 2.0**-23
TINY = 1e-12


def fit_nearest(
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
) -> "NearestNeighbor":
    """1-NN on the samples; nothing is trained, so threat, minutes, seed and progress change nothing."""
    started = time.perf_counter()
    module = NearestNeighbor(x, y).eval()
    with torch.no_grad():
        right = [module(part).argmax(dim=1) == labels for part, labels in zip(x.split(QUERIES), y.split(QUERIES))]
    accuracy = float(torch.cat(right).double().mean())
    module.fitted = {"epochs": 0, "seconds": time.perf_counter() - started, "train_accuracy": accuracy}
    return module


class NearestNeighbor(nn.Module):
    """1-NN under the Euclidean distance; logit j is minus the distance to the nearest training sample of
    class j.

    Distances are compared in float64, and logits rounded to the dtype of the input.

    Args:
        x_train: training samples, (n, ...); forward takes the same shape.
        y_train: their classes 0, 1, .., each present at least once.

    Raises:
        ValueError: lengths that differ, no samples, a class without samples.
    """

    def __init__(self, x_train: Float[Tensor, "n ..."], y_train: Int[Tensor, " n"]) -> None:
        super().__init__()
        self.fitted: dict[str, float] = {}
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
        self.register_buffer("squares", points.double().square().sum(dim=1))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        flat = x.flatten(1).double()
        with torch.no_grad():
            nearest = self._nearest_of_each_class(flat.detach())
        # Differences, not the expanded square: exact where x is close to a training sample, and
        # differentiable.
        squared = (flat[:, None] - self.points[nearest].double()).square().sum(dim=2)
        return -squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt().to(x.dtype)

    def certify(self, x: Float[Tensor, "batch ..."], *, box: tuple[float, float] | None = None) -> Certificate:
        """Labels and the L2 radius within which each provably stays the same, of kind "nearest" or "nearest-in-box".

        A wrong-class sample j can only become the nearest where it is closer than every own-class sample i,
        and each i keeps it away by (d_j^2 - d_i^2) / (2 |x_i - x_j|), the distance of x to the plane between
        the two. The radius is the smallest over j of the largest over i. From each difference of squares an
        allowance is taken first for distances rounded to float32 and for float64 products.

        Args:
            x: samples in the shape of the training samples.
            box: the least and the largest value of every input, where only perturbations inside of it count: then as
                the power diagram of the training samples has it (`PowerDiagram.distance`), where that is more.

        Returns:
            Labels are class indices. Radii are in units of x; 0 where another class is as near up to
            rounding; infinite with one class only.
        """
        points = self.points.double()
        labels, radii = [], []
        with torch.no_grad():
            for part in x.split(QUERIES):
                label = self.forward(part).argmax(dim=1)
                flat = part.flatten(1).double()
                squared = _squared_distances(flat, points)
                size = self.squares.amax() + flat.square().sum(dim=1)
                noise = flat.shape[1] * DOUBLE * size
                labels.append(label)
                radii.extend(
                    self._radius(points, squared[row], int(label[row]), float(noise[row])) for row in range(len(part))
                )
        label, radius = torch.cat([*labels, self.labels[:0]]), np.array(radii, dtype=np.float64)
        if box is not None:
            radius = np.maximum(radius, self._within(x.flatten(1), label, box))
        radius[~x.flatten(1).isfinite().all(1).cpu().numpy()] = 0
        kind = "nearest" if box is None else "nearest-in-box"
        return Certificate(label.cpu().numpy(), radius, np.full(len(radius), kind))

    def _within(self, flat: Tensor, label: Tensor, box: tuple[float, float]) -> np.ndarray:
        """Distances to wrong-class cells within the box; 0 for samples outside of it."""
        diagram = PowerDiagram(self.points, -self.squares / 2, self.labels)
        low, high = (torch.full_like(self.points[0], value, dtype=torch.float64) for value in box)
        corner = float(low.abs().maximum(high.abs()).norm())
        # Logits are rounded distances, whose squares may exceed the size of the scores.
        rounding = FLOAT32 * max(8.0, 2 * corner / max(float(self.squares.amax().sqrt()), TINY))
        distance = torch.cat(
            [
                diagram.distance(part, own, box=(low, high), rounding=rounding)
                for part, own in zip(flat.split(QUERIES), label.split(QUERIES), strict=True)
            ]
        ).nan_to_num(0, posinf=torch.inf)
        inside = ((flat >= box[0]) & (flat <= box[1])).all(1)
        return torch.where(inside, distance, 0).cpu().numpy()

    def _radius(self, points: Tensor, squared: Tensor, label: int, noise: float) -> float:
        own = self.labels == label
        others = (~own).nonzero().squeeze(1)
        own_points, own_squared = points[own], squared[own]
        # The nearest own sample alone bounds each j from below; j in that order lets the search stop early.
        anchor = own_squared.argmin()
        lowest = _plane_distances(
            own_points[anchor][None], own_squared[anchor][None], points[others], squared[others], noise
        )[0]
        lowest, order = lowest.sort()
        radius = float("inf")
        for start in range(0, len(others), BLOCK):
            if float(lowest[start]) >= radius:
                break
            block = others[order[start : start + BLOCK]]
            planes = _plane_distances(own_points, own_squared, points[block], squared[block], noise)
            radius = min(radius, float(planes.amax(dim=0).min()))
        return max(radius, 0.0)

    def _nearest_of_each_class(self, flat: Tensor) -> Int[Tensor, "batch classes"]:
        start, columns = 0, []
        for count in self.counts:
            part = slice(start, start + count)
            columns.append(start + (self.squares[part] - 2 * flat @ self.points[part].double().T).argmin(dim=1))
            start += count
        return torch.stack(columns, dim=1)


def _plane_distances(
    own: Tensor, own_squared: Tensor, other: Tensor, other_squared: Tensor, noise: float
) -> Float[Tensor, "own other"]:
    """Signed distance of x to the plane halfway between own and other samples, less rounding; 0 where they coincide."""
    gap = _squared_distances(own, other).sqrt()
    difference = other_squared[None] - own_squared[:, None]
    difference = difference - SQUARES_ROUNDING * other_squared[None] - 4 * noise
    return torch.where(gap > 0, difference / (2 * (gap.square() + 4 * noise).sqrt()), torch.zeros_like(gap))


def _squared_distances(a: Tensor, b: Tensor) -> Float[Tensor, "a b"]:
    expanded = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * a @ b.T
    return expanded.clamp_min(0.0)
