"""Every backbone: stem, trunk of residual blocks, linear head."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otad.nn.transport_cost import block_cost

__all__ = ["Backbone", "CenteredFlatten"]


class CenteredFlatten(nn.Module):
    """Stem that flattens and subtracts the training mean: an isometry, so radii after it are radii before it.

    Args:
        mean: training mean, in the shape of one sample.
    """

    mean: Tensor
    lipschitz = 1.0

    def __init__(self, mean: Float[Tensor, "..."]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch d"]:
        return (x - self.mean).flatten(1)

    def inverse(self, points: Float[Tensor, "batch d"]) -> Float[Tensor, "batch ..."]:
        """The inputs of points."""
        return points.unflatten(1, self.mean.shape) + self.mean

    def box(self, low: float, high: float) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """The points of inputs whose every value lies between the two: least and largest coordinates."""
        return (low - self.mean).flatten(), (high - self.mean).flatten()


class Backbone(nn.Module):
    """stem -> trunk -> head; the trunk keeps the dimension and is trained to be an optimal-transport map.

    Args:
        stem: inputs to points in R^d, with its exact Lipschitz constant as `stem.lipschitz` and the way back as
            `stem.inverse`.
        blocks: residual branches h_t, each (batch, d) -> (batch, d).
        head: linear, features to logits.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.head(self.transport(self.stem(x))[0])

    def transport(self, x: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, "batch d"], Float[Tensor, " batch"]]:
        """Features z of points x, and the transport cost of each."""
        z, costs = self.path(x)
        return z, costs.sum(1)

    def path(self, x: Float[Tensor, "batch d"]) -> tuple[Float[Tensor, "batch d"], Float[Tensor, "batch m"]]:
        """Features z of points x, and what each of the m blocks contributes to the transport cost."""
        costs = [torch.zeros_like(x[:, :0])]
        for block in self.blocks:
            residual = block(x)
            costs.append(block_cost(residual, len(self.blocks))[:, None])
            x = x + residual
        return x, torch.cat(costs, 1)
