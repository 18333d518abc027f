"""A soft vote of the nearest training points: what an attack climbs to steer a retrieval."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["SoftNeighbors"]

POINTS_FOR_SCALE = 256


class SoftNeighbors(nn.Module):
    """One score a class: minus the soft minimum of the squared distances to its k nearest training points.

        score_c(x) = t log sum over the k nearest points i of class c of exp(-|e(x) - e(x_i)|^2 / (s t)),

    t the temperature, up to a term that all classes share, with s the typical squared distance between neighbours of
    different classes.
    At a temperature near 0 the best class is that of the single nearest point; at higher ones all k have a say, and
    their weights are a differentiable stand-in for the retrieval. The neighbours are looked up anew at every
    evaluation, and the gradient runs through the embedding.

    Args:
        x_train: training samples, (n, ...).
        y_train: their class indices, (n,).
        n_classes: columns of the scores; a class without training points scores minus infinity.
        embedding: inputs -> coordinates in which distances are measured; None: the inputs themselves.
        k: points of each class that are looked at (the "guides").
        temperature: in units of s; positive.
    """

    points: Tensor
    center: Tensor
    squares: Tensor

    def __init__(
        self,
        x_train: Float[Tensor, "n ..."],
        y_train: Int[Tensor, " n"],
        n_classes: int,
        *,
        embedding: Callable[[Tensor], Tensor] | None = None,
        k: int = 5,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if k < 1 or not temperature > 0:
            raise ValueError(f"k must be at least 1 and temperature positive, not {k} and {temperature}")
        self._embed = [embedding]  # in a list: not ours to move, train or freeze
        self.k, self.temperature = k, temperature
        order = y_train.argsort(stable=True)
        with torch.no_grad():
            points = self.embed(x_train[order])
            center = points.mean(dim=0)
            points = points - center  # smaller numbers, smaller rounding in the products
        self.register_buffer("points", points)
        self.register_buffer("center", center)
        self.register_buffer("squares", points.square().sum(dim=1))
        self.ends = torch.bincount(y_train, minlength=n_classes).cumsum(0).tolist()
        self.scale = _typical_square(points, y_train[order])

    def embed(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch d"]:
        embedding = self._embed[0]
        return (x if embedding is None else embedding(x)).flatten(1).to(x.dtype)

    def at(self, temperature: float) -> "SoftNeighbors":
        """The same points at another temperature."""
        other = copy.copy(self)
        other.temperature = temperature
        return other

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        e = self.embed(x) - self.center
        # |e|^2 is the same for every point, and leaves every comparison between classes as it is.
        closeness = (2 * e @ self.points.T - self.squares) / (self.scale * self.temperature)
        scores, start = [], 0
        for end in self.ends:
            if end > start:
                nearest = closeness[:, start:end].topk(min(self.k, end - start), dim=1).values
                scores.append(self.temperature * nearest.logsumexp(dim=1))
            else:
                scores.append(torch.full_like(e[:, 0], -torch.inf))
            start = end
        return torch.stack(scores, dim=1)


def _typical_square(points: Float[Tensor, "n d"], y: Int[Tensor, " n"]) -> float:
    """Median squared distance from a training point to the nearest one of another class."""
    some = torch.linspace(0, len(points) - 1, min(POINTS_FOR_SCALE, len(points))).long().to(points.device)
    squares = torch.cdist(points[some], points).square()
    nearest = squares.masked_fill(y[some][:, None] == y[None], torch.inf).amin(dim=1)
    nearest = nearest[nearest.isfinite() & (nearest > 0)]
    return float(nearest.median()) if len(nearest) else 1.0
