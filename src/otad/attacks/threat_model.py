"""What an attacker may do (ThreatModel) and what it knows (AttackerKnowledge)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram

__all__ = ["AttackerKnowledge", "ThreatModel"]

# Projection stops this share short of the budget, so that rounding in x + delta does not carry a point
# outside.
SAFETY = 1e-6


@dataclass(frozen=True)
class ThreatModel:
    """All inputs within `eps` of the sample, in one norm, and inside the box where there is one.

    Attributes:
        norm: "l2" (Euclidean over all coordinates of a sample) or "linf" (largest coordinate).
        eps: the budget, in units of the model's input; positive.
        box: lowest and highest value a coordinate may take, (0.0, 1.0) for images; None for an attacker that
            no box holds back, which never makes a model look more robust than it is.

    Raises:
        ValueError: an unknown norm, a budget that is not a positive finite number, an empty box.
    """

    norm: Literal["l2", "linf"]
    eps: float
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm must be 'l2' or 'linf', not {self.norm!r}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps must be a positive finite number, not {self.eps!r}")
        if self.box is not None and not (len(self.box) == 2 and self.box[0] < self.box[1]):
            raise ValueError(f"box must be (low, high) with low < high, not {self.box!r}")

    @property
    def key(self) -> str:
        """How results name this budget: "0.5" for L2, "linf:0.03" for L-infinity."""
        return f"{self.eps:g}" if self.norm == "l2" else f"linf:{self.eps:g}"

    def distance(self, x_adv: Float[Tensor, "batch ..."], x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """Distance of each row pair in this norm, in float64 whatever the inputs are."""
        delta = x_adv.detach().double().flatten(1) - x.detach().double().flatten(1)
        return torch.linalg.vector_norm(delta, ord=2 if self.norm == "l2" else math.inf, dim=1)

    def project(self, x_adv: Float[Tensor, "batch ..."], x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Bring each row of `x_adv` into the budget around the same row of `x`, and into the box.

        Clamping to the box after the ball cannot leave the ball, because x itself lies in the box.
        """
        delta = x_adv - x
        # Rounding x + delta moves each coordinate by half a unit in its last place: aim that much shorter.
        rounding = torch.finfo(x.dtype).eps
        if self.norm == "l2":
            lost = rounding * (torch.linalg.vector_norm(x.flatten(1), dim=1) + self.eps)
            reach = (self.eps * (1 - SAFETY) - lost).clamp_min(0.0)
            length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            delta = delta * per_row((reach / length).clamp_max(1.0), delta)
        else:
            reach = (self.eps * (1 - SAFETY) - rounding * (x.abs() + self.eps)).clamp_min(0.0)
            delta = delta.clamp(-reach, reach)
        projected = x + delta
        return projected if self.box is None else projected.clamp(*self.box)

    def contains(self, x_adv: Float[Tensor, "batch ..."], x: Float[Tensor, "batch ..."]) -> Tensor:
        """Whether each row of `x_adv` lies in the budget and in the box, bool of shape (batch,)."""
        inside = self.distance(x_adv, x) <= self.eps
        if self.box is not None:
            flat = x_adv.flatten(1)
            inside &= (flat >= self.box[0]).all(dim=1) & (flat <= self.box[1]).all(dim=1)
        return inside


@dataclass(frozen=True)
class AttackerKnowledge:
    """What the attacker knows beside the model itself; each part is optional, and attacks that need a missing
    part cannot run.

    Attributes:
        x_train: training samples in the shape the model takes, (n_train, ...).
        y_train: their class indices, (n_train,).
        backbone: the undefended network, inputs -> logits: the source of transfer attacks.
        smoothed: factor -> a surrogate of the model with wider smoothing (factor < 1, smaller is wider), same
            shapes; its gradients replace the model's own where these vanish.
        embedding: inputs -> coordinates (batch, ...) in which the model looks up its nearest training points; None
            for a model that retrieves nothing. `evaluate` and `run_attacks` take an `OTAD` model's own, whatever is
            given here.
        cells: an isometry from inputs to points, and the power diagram of points that decides; None for other models.
            Taken from the model likewise.
        relatives: further sources of transfer attacks, such as the exact model that a network imitates.
        own_backbone: whether the backbone is what the model was made of; from any other network the audit does not ask
            that transfer does more harm than noise.
    """

    x_train: Float[Tensor, "n ..."] | None = None
    y_train: Int[Tensor, " labels"] | None = None
    backbone: nn.Module | None = None
    smoothed: Callable[[float], nn.Module] | None = None
    embedding: Callable[[Tensor], Tensor] | None = None
    cells: tuple[nn.Module, PowerDiagram] | None = None
    relatives: tuple[nn.Module, ...] = ()
    own_backbone: bool = True

    def __post_init__(self) -> None:
        if (self.x_train is None) != (self.y_train is None):
            raise ValueError("x_train and y_train must be given together")
        if self.x_train is not None and self.y_train is not None and len(self.x_train) != len(self.y_train):
            raise ValueError(f"x_train has {len(self.x_train)} rows, y_train {len(self.y_train)}; they must agree")

    def about(self, model: nn.Module) -> "AttackerKnowledge":
        """The same with the model's own `retrieval_space` and `cells`, where it has them."""
        own = {"embedding": getattr(model, "retrieval_space", None), "cells": getattr(model, "cells", None)}
        return replace(self, **{part: value for part, value in own.items() if value is not None})


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """One number a row, shaped so that it multiplies `like`: (batch,) -> (batch, 1, ..., 1)."""
    return values.view(-1, *([1] * (like.ndim - 1)))
