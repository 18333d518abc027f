"""Refinement: train a potential's pieces and the head for the certified radius; the Lipschitz bound always holds."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import BrenierPotential, Regularity
from otad.errors import OTADError
from otad.train.affine_potential import AffinePotential
from otad.train.loop import Augment, EpochRow, digest, train
from otad.train.margin import row_distances

__all__ = ["Refinement", "RefinementEpoch", "anchored_potential", "refine"]

BEYOND = 1.75  # times the target radius: what the loss asks for, so that unseen samples reach the target
TEMPERATURE = 0.25  # of the cross entropy, times the target radius
INTERCEPTS = 10.0  # their rate, times that of slopes: they are in squared units
FIRST_RATE = 1e-2
BETAS = (0.9, 0.99)
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


@dataclass(frozen=True)
class Refinement:
    """What came of it.

    Attributes:
        potential: the learned potential with its 1-Lipschitz gradient; evaluate its "lower" branch.
        head: features to logits.
        before, after: on the training samples, without augmentation: "accuracy", "certified" (share beyond the target
            radius), "feature_error" (mean distance of grad phi(x_i) from the z_i at the start, over the pieces). The
            radii are those of the fast path in float32; `otad.certify` gives proven ones.
        history: one row per epoch, those before a resumed checkpoint included.
    """

    potential: BrenierPotential
    head: nn.Linear
    before: dict[str, float]
    after: dict[str, float]
    history: list[RefinementEpoch]


def anchored_potential(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    head: nn.Linear,
    distance: float,
    regularity: Regularity | None = None,
) -> AffinePotential:
    """A start that needs no transport map: every point's feature is its class's row of the head, at one length.

    Args:
        x: points, in stem units.
        y: class indices.
        head: features to logits; only directions of its rows count.
        distance: length of the features; about the target radius.
        regularity: numbers l < L with max(|l|, L) = 1; (-1, 1) where not given, whose map loses no gradient.
    """
    rows = nn.functional.normalize(head.weight.detach(), dim=1)
    return AffinePotential(x, distance * rows[y], torch.zeros_like(x[:, 0]), regularity or Regularity(-1.0, 1.0))


def refine(
    potential: AffinePotential,
    head: nn.Linear,
    stem: nn.Module,
    inputs: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    target_radius: float,
    epochs: int = 40,
    batch_size: int = 128,
    learning_rate: float = 5e-3,
    augment: Augment | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> Refinement:
    """Minimise a cross entropy that takes the price of the target radius off every margin, by AdamW, in place.

    The radius of a sample is min_j (f_y - f_j) / (Lip |w_y - w_j|), Lip that of stem and potential together. The loss
    adds R Lip |w_y - w_j| to each wrong logit, R beyond the target. Both sides are measured in units of the root mean
    square of |w_i - w_j|, so the head's length is free: without that it would shrink the price instead of earning it.

    Args:
        potential: trained in place and left on the CPU, as are head and stem; see `AffinePotential.of` and
            `anchored_potential` for starts.
        head: features to logits; trained in place unless its parameters are frozen.
        stem: inputs to points, with its Lipschitz constant `stem.lipschitz`, which training must not move; trained in
            place where it has parameters (`EncodedStem`).
        inputs: training inputs; best not only those that the pieces started from, which are soon learned by heart.
        y: class indices.
        target_radius: L2 radius, in units of the inputs, to be certified at.
        epochs: passes over the data.
        batch_size: samples a step, per process.
        learning_rate: the largest of the schedule; ten times it for the intercepts.
        augment: inputs and a generator for its random numbers -> inputs of the same shape, at every step. A checkpoint
            is gone on from with the same one only: a function of the same name, or an object of the same `repr`.
        seed: of the batch order and the augmentation.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16", for the stem; the potential and the head stay in single precision.
        progress: show a bar.

    Raises:
        ValueError: target_radius or epochs not positive, or inputs and y of different lengths.
        OTADError: training diverged.

    Source: METHOD section 3, "Global"; margin loss of Tsuzuku et al., NeurIPS 2018, arXiv 1802.04034.
    """
    if len(inputs) != len(y) or len(y) == 0:
        raise ValueError(f"inputs and y need the same number of rows, at least one; got {len(inputs)} and {len(y)}")
    if not (0 < target_radius < math.inf and epochs >= 1):
        raise ValueError(f"target_radius and epochs must be positive; got {target_radius} and {epochs}")
    model = nn.ModuleDict({"potential": potential, "head": head, "stem": stem})
    settings = {"target_radius": target_radius, "augment": None if augment is None else _named(augment)}
    settings["start"] = digest(*(value for _, value in sorted(model.state_dict().items())))
    learned = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in learned if p is not potential.intercepts]
    groups = [{"params": others}, {"params": [potential.intercepts], "share": INTERCEPTS}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, weight_decay=0.0)
    model.to(Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision).device)
    objective = _Objective(stem, potential, head, target_radius)
    started_from = potential.features.detach().clone()
    before = _facts(objective, inputs, y, started_from)
    history = train(
        "potential",
        model,
        objective,
        (inputs, y),
        optimizer,
        RefinementEpoch,
        settings=settings,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
        first_rate=FIRST_RATE,
        augment=augment,
    )
    if not all(bool(p.isfinite().all()) for p in learned):
        raise OTADError("refinement diverged: parameters are not finite; scale the columns of x, or lower the rate")
    after = _facts(objective, inputs, y, started_from)
    model.to("cpu")
    return Refinement(potential.fixed(), head, before, after, history)


def _named(augment: Augment) -> str:
    """A function by its name, anything else, such as `Deformations`, by what it says of itself."""
    return getattr(augment, "__qualname__", None) or repr(augment)


class _Objective(nn.Module):
    """Loss, accuracy and certified share of a batch; a module of its own so that any engine can wrap it."""

    def __init__(self, stem: nn.Module, potential: AffinePotential, head: nn.Linear, target_radius: float) -> None:
        super().__init__()
        self.stem, self.potential, self.head, self.target_radius = stem, potential, head, target_radius
        self.lipschitz = float(stem.lipschitz) * float(potential.regularity.lipschitz)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = self.stem(inputs)
        # Scores of single precision decide which pieces are active.
        with torch.autocast(points.device.type, enabled=False):
            logits, price = self.priced(points.to(self.potential.x), y)
            beyond = logits + BEYOND * self.target_radius * price
            # By the largest possible step of the feature, sqrt(2) for orthonormal rows, logits and price have one unit.
            loss = nn.functional.cross_entropy(beyond * math.sqrt(2) / (TEMPERATURE * self.target_radius), y)
            radius = _radius(logits.detach(), price.detach(), y)
        return loss, (radius > 0).float().mean(), (radius > self.target_radius).float().mean()

    def radius(self, inputs: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
        """Certified L2 radius of the label y, negative where another one is predicted."""
        return _radius(*self.priced(self.stem(inputs), y), y)

    def priced(self, points: Tensor, y: Tensor) -> tuple[Tensor, Float[Tensor, "batch classes"]]:
        """Logits over the Lipschitz constant, and |w_j - w_y|, both in units of the head's length."""
        apart = row_distances(self.head.weight, torch.arange(len(self.head.weight), device=y.device))
        unit = (apart.square().sum() / (len(apart) * (len(apart) - 1))).sqrt()
        return self.head(self.potential(points)) / (self.lipschitz * unit), apart[y] / unit


def _radius(logits: Tensor, price: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, y[:, None], False)
    margin = (logits.gather(1, y[:, None]) - logits) / price.clamp(min=1e-12)
    return torch.where(others, margin, torch.inf).amin(1)


def _facts(
    objective: _Objective, inputs: Tensor, y: Tensor, started_from: Float[Tensor, "pieces d"]
) -> dict[str, float]:
    potential = objective.potential
    with torch.no_grad():
        parts = zip(inputs.split(SAMPLES_AT_ONCE), y.split(SAMPLES_AT_ONCE), strict=True)
        radius = torch.cat([objective.radius(*(side.to(potential.x.device) for side in part)) for part in parts])
        features = torch.cat([potential(part) for part in potential.x.split(SAMPLES_AT_ONCE)])
    return {
        "accuracy": float((radius > 0).double().mean()),
        "certified": float((radius > objective.target_radius).double().mean()),
        "feature_error": float((features - started_from).norm(dim=1).mean()),
    }
