"""Which training points are near an input, in a metric of choice."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.neighbors import PointIndex, indexed

__all__ = ["Neighbors", "Retrieval", "neighborhood"]

EMBEDDED_AT_ONCE = 256


class Neighbors(NamedTuple):
    """The k nearest training points of each query, nearest first.

    Attributes:
        distances: shape (batch, k), float64.
        indices: shape (batch, k).
        next_distance: to the first point that is not among them, inf where there is none; shape (batch,).
    """

    distances: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]
    next_distance: Float[Tensor, " batch"]


def neighborhood(x: Float[Tensor, "batch e"], index: PointIndex, k: int) -> Neighbors:
    """The k nearest of the points, and how far away the next one is; no gradient.

    Args:
        x: queries.
        index: of the n points that are searched.
        k: neighbours, at most n.
    """
    distances, indices = index.nearest(x.detach().double(), min(k + 1, len(index.points)))
    beyond = distances[:, k] if distances.shape[1] > k else torch.full_like(distances[:, 0], torch.inf)
    return Neighbors(distances[:, :k], indices[:, :k], beyond)


class Retrieval(nn.Module):
    """An embedding of inputs, and the embedded training points.

    Called with inputs it returns their coordinates, through which an attack can differentiate; a model holds the
    neighbours it finds there constant. `to`, `float` and `double` move it between devices and leave its numbers as
    they are, so that a float64 copy of a model has the same neighbours.

    Args:
        embedding: inputs -> coordinates. Its attribute `lipschitz` bounds its Lipschitz constant; without it, or where
            it is None, none is known. One with a constant is put into float64, because certificates rest on it; any
            other works in its own dtype, and then the neighbours of a query can depend on its batch where two training
            points tie to rounding (1e-6 in float32).
        points: coordinates of the training points, in the order of the transport map, shape (n, e).

    Attributes:
        lipschitz: from input to coordinates; inf where unknown.
    """

    points: Tensor

    def __init__(self, embedding: nn.Module, points: Float[Tensor, "n e"]) -> None:
        super().__init__()
        self.embedding = embedding.eval().requires_grad_(False)
        if getattr(embedding, "lipschitz", None) is not None:
            self.embedding.double()
        self._index: PointIndex | None = None
        self.register_buffer("points", points.double())

    @property
    def lipschitz(self) -> float:
        """As the embedding says now: its weights may have been loaded since."""
        bound = getattr(self.embedding, "lipschitz", None)
        return float("inf") if bound is None else float(bound)

    @classmethod
    def of(cls, embedding: nn.Module, inputs: Float[Tensor, "n ..."]) -> "Retrieval":
        """Embed these training inputs."""
        with torch.no_grad():
            retrieval = cls(embedding, torch.empty(0, 0))
            retrieval.points = retrieval(inputs)
            return retrieval

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch e"]:
        return _embedded(self.embedding, x)

    def nearest(self, coordinates: Float[Tensor, "batch e"], k: int) -> Neighbors:
        """The k training points nearest to these coordinates."""
        self._index = indexed(self.points, self._index)
        return neighborhood(coordinates, self._index, k)

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _embedded(embedding: nn.Module, x: Tensor) -> Tensor:
    dtype = next((p.dtype for p in embedding.parameters()), x.dtype)
    parts = [embedding(part.to(dtype)).flatten(1) for part in x.split(EMBEDDED_AT_ONCE)]
    return torch.cat(parts).double()
