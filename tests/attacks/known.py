"""Models whose smallest perturbations are known in closed form."""

from typing import Literal

import torch
from torch import Tensor, nn

from otad.attacks import ThreatModel


class Linear(nn.Module):
    """logits = W x + b on flattened samples."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def distance(self, x: Tensor, norm: str) -> Tensor:
        """Exact distance of each row to the nearest decision boundary, float64 (batch,)."""
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        logits = x.flatten(1).double() @ weight.T + bias
        y = logits.argmax(dim=1)
        margins = logits.gather(1, y[:, None]) - logits
        difference = weight[y][:, None] - weight[None]
        # Under L-infinity the dual norm measures the slope.
        slope = torch.linalg.vector_norm(difference, ord=2 if norm == "l2" else 1, dim=2)
        return (margins / slope).masked_fill(slope == 0, torch.inf).amin(dim=1)


class TwoPrototypes(nn.Module):
    """logit j is minus the squared distance to prototype j: the boundary is the plane halfway between."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.stack([a, b]))

    def forward(self, x: Tensor) -> Tensor:
        return -(x.flatten(1)[:, None] - self.prototypes.flatten(1)[None]).square().sum(dim=2)

    def distance(self, x: Tensor, norm: str) -> Tensor:
        a, b = self.prototypes.flatten(1).double()
        middle = ((x.flatten(1).double() - (a + b) / 2) @ (a - b)).abs()
        return middle / torch.linalg.vector_norm(a - b, ord=2 if norm == "l2" else 1)


def linear(classes: int, d: int, n: int = 60, seed: int = 0) -> tuple[Linear, Tensor, Tensor]:
    """A random linear model, samples and the labels it gives them."""
    generator = torch.Generator().manual_seed(seed)
    model = Linear(torch.randn(classes, d, generator=generator), torch.randn(classes, generator=generator) / 10)
    x = torch.randn(n, d, generator=generator)
    return model, x, model(x).argmax(dim=1)


def two_prototypes(d: int = 10, n: int = 60, seed: int = 0) -> tuple[TwoPrototypes, Tensor, Tensor]:
    """Two prototypes that differ by as much in every coordinate, and samples on the segment between them.

    There the straight line to the other prototype is the shortest way out, under both norms.
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, generator=generator)
    b = a + torch.randn(d, generator=generator).sign()
    model = TwoPrototypes(a, b)
    x = a + torch.rand(n, 1, generator=generator) * (b - a)
    return model, x, model(x).argmax(dim=1)


def assert_within(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    assert x_adv.shape == x.shape
    assert bool(threat.contains(x_adv, x).all()), (threat.distance(x_adv, x).max(), threat)


def assert_tight(attack, model, x: Tensor, y: Tensor, norm: Literal["l2", "linf"], slack: float = 1.05) -> None:
    """Over the range of budgets: all within `slack` of their exact distance break, none 5 % short of it."""
    distance = model.distance(x, norm)
    for quantile in (0.1, 0.4, 0.8, 1.0):
        threat = ThreatModel(norm, float(distance.quantile(quantile)) * slack)
        x_adv = attack(model, x, y, threat)
        assert_within(x_adv, x, threat)
        broken = model(x_adv).argmax(dim=1) != y
        assert bool(broken[distance * slack <= threat.eps].all()), f"missed at {threat}"
        assert not bool(broken[distance * 0.95 > threat.eps].any()), f"impossible at {threat}"
