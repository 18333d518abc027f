"""Fit a backbone under the transport cost: the same way for every network."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.nn.backbone import Backbone
from otad.train.loop import EpochRow, train
from otad.train.margin import row_distances

__all__ = ["Epoch", "fit_backbone"]


@dataclass(frozen=True)
class Epoch(EpochRow):
    """Of a backbone; its loss is cross entropy plus alpha times the transport cost.

    Attributes:
        transport_cost: mean over the training samples, in squared stem units.
        accuracy: share of training samples classified correctly while training.
        block_costs: each block's part of the transport cost, first block first.
    """

    transport_cost: float
    accuracy: float
    block_costs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, epoch: int, seconds: float, means: list[float]) -> Self:
        loss, accuracy, *costs = means
        return cls(epoch, loss, seconds, sum(costs), accuracy, costs)

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, transport {self.transport_cost:.2f}, accuracy {self.accuracy:.1%}"


def fit_backbone(
    backbone: Backbone,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    alpha: float = 1e-3,
    margin: float = 0.0,
    epochs: int = 30,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> list[Epoch]:
    """Minimise cross entropy + alpha * transport cost by AdamW with a cosine schedule, in place.

    Args:
        backbone: trained in place and left in eval mode on the CPU.
        x: training inputs.
        y: class indices.
        alpha: weight of the transport cost; 0 trains an ordinary network.
        margin: weight of a margin in feature units: adds margin * Q * |w_j - w_y| to the wrong logits, Q the largest
            |z_i - z_j| / |x_i - x_j| in the batch, so that the loss counts what the Lipschitz bound will cost.
        epochs: passes over the data.
        batch_size: samples a step, per process.
        learning_rate: the largest of the schedule.
        weight_decay: of AdamW.
        seed: of the batch order; the caller seeds the weights.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16".
        progress: show a bar with loss, transport cost and accuracy.

    Returns:
        One `Epoch` per epoch, those before a resumed checkpoint included.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the checkpoint of the last finished epoch stays.

    Source: Gai, Wang, Zhang, arXiv 2408.00329, Section 3; docs/method.md, "Transport map".
    """
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=learning_rate, weight_decay=weight_decay)
    history = train(
        "backbone",
        backbone,
        _Objective(backbone, alpha, margin),
        (x, y),
        optimizer,
        Epoch,
        settings={"alpha": alpha, "margin": margin, "weight_decay": weight_decay},
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    backbone.to("cpu").eval().requires_grad_(False)
    return history


class _Objective(nn.Module):
    """Loss, accuracy and cost of each block for a batch; a module of its own so that any engine can wrap it."""

    def __init__(self, backbone: Backbone, alpha: float, margin: float) -> None:
        super().__init__()
        self.backbone, self.alpha, self.margin = backbone, alpha, margin

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = self.backbone.stem(inputs)
        z, costs = self.backbone.path(points)
        logits = self.backbone.head(z)
        accuracy = (logits.argmax(1) == labels).float().mean()
        if self.margin:
            logits = logits + self.margin * _quotient(points, z) * row_distances(self.backbone.head.weight, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.alpha:
            loss = loss + self.alpha * costs.sum(1).mean()
        return loss, accuracy, costs.detach().mean(0)


def _quotient(points: Float[Tensor, "batch d"], z: Float[Tensor, "batch d"]) -> Tensor:
    """Largest |z_i - z_j| / |x_i - x_j| of the batch."""
    apart = torch.pdist(points)
    return torch.where(apart > 0, torch.pdist(z) / apart.clamp(min=1e-12), 0).amax() if len(z) > 1 else z.new_ones(())
