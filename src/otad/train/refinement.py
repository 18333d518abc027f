"""What every refinement shares: its history, what it reached, and its way through the training loop."""

import logging
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.errors import OTADError
from otad.train.loop import Augment, EpochRow, digest, train

__all__ = ["Objective", "RefinementEpoch", "refined"]

logger = logging.getLogger(__name__)

FIRST_RATE = 1e-2
SAMPLES_AT_ONCE = 512


@dataclass(frozen=True)
class RefinementEpoch(EpochRow):
    """Of a refinement, over the training samples, augmented where they are.

    Attributes:
        accuracy: share classified correctly while training.
        certified: share whose radius exceeds the target.
    """

    accuracy: float
    certified: float

    @classmethod
    def of(cls, epoch: int, seconds: float, means: list[float]) -> Self:
        loss, accuracy, certified = means
        return cls(epoch, loss, seconds, accuracy, certified)

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, accuracy {self.accuracy:.1%}, certified {self.certified:.1%}"


class Objective(nn.Module):
    """A batch of inputs and classes -> loss, accuracy and certified share."""

    target_radius: float

    @abstractmethod
    def radius(self, inputs: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
        """Certified L2 radius of the label y, negative where another one is predicted."""

    @abstractmethod
    def facts(self) -> dict[str, float]:
        """What else is to be said before and after."""


def refined(
    name: str,
    model: nn.ModuleDict,
    objective: Objective,
    inputs: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    optimizer: torch.optim.Optimizer,
    *,
    settings: dict[str, Any] | None = None,
    epochs: int,
    learning_rate: float,
    augment: Augment | None,
    device: str | None,
    mixed_precision: str,
    **options: Any,
) -> tuple[dict[str, float], dict[str, float], list[RefinementEpoch]]:
    """Train the model in place and leave it on the CPU; what was reached before and after, and the history.

    Args:
        name: of the checkpoint and the bar.
        model: what is learned, part of the objective.
        objective: of batches of inputs and y.
        inputs: training samples.
        y: class indices.
        optimizer: of the model's parameters; "share" of a group multiplies its rate.
        settings: what else must be the same for a checkpoint to be gone on from.
        epochs: at least 1.
        learning_rate: see `train`.
        augment: see `train`.
        device: see `train`.
        mixed_precision: see `train`.
        options: what else `train` takes.

    Raises:
        ValueError: inputs and y of different lengths, target radius or epochs not positive.
        OTADError: training diverged.
    """
    target_radius = objective.target_radius
    if len(inputs) != len(y) or len(y) == 0:
        raise ValueError(f"inputs and y need the same number of rows, at least one; got {len(inputs)} and {len(y)}")
    if not (0 < target_radius < math.inf and epochs >= 1):
        raise ValueError(f"target_radius and epochs must be positive; got {target_radius} and {epochs}")
    settings = {"target_radius": target_radius, "augment": None if augment is None else _named(augment)} | (
        settings or {}
    )
    settings["start"] = digest(*(value for _, value in sorted(model.state_dict().items())))
    engine = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision).device
    model.to(engine)
    before = _reached(objective, inputs, y, engine)
    history = train(
        name,
        model,
        objective,
        (inputs, y),
        optimizer,
        RefinementEpoch,
        settings=settings,
        epochs=epochs,
        learning_rate=learning_rate,
        device=device,
        mixed_precision=mixed_precision,
        first_rate=FIRST_RATE,
        augment=augment,
        **options,
    )
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise OTADError("refinement diverged: parameters are not finite; scale the columns of x, or lower the rate")
    after = _reached(objective, inputs, y, engine)
    if after["accuracy"] < before["accuracy"] and after["certified"] < before["certified"]:
        lost = f"accuracy {before['accuracy']:.1%} to {after['accuracy']:.1%}, and certified share"
        logger.warning("%s: training lost %s; try a smaller target radius or a lower rate", name, lost)
    model.to("cpu")
    return before, after, history


def _named(augment: Augment) -> str:
    """A function by its name, anything else, such as `Deformations`, by what it says of itself."""
    return getattr(augment, "__qualname__", None) or repr(augment)


@torch.no_grad()
def _reached(objective: Objective, inputs: Tensor, y: Tensor, device: torch.device) -> dict[str, float]:
    objective.eval()
    parts = zip(inputs.split(SAMPLES_AT_ONCE), y.split(SAMPLES_AT_ONCE), strict=True)
    radius = torch.cat([objective.radius(*(side.to(device) for side in part)) for part in parts])
    reached = {
        "accuracy": float((radius > 0).double().mean()),
        "certified": float((radius > objective.target_radius).double().mean()),
    }
    return reached | objective.facts()
