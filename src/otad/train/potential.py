"""Refinement: train a potential's pieces and the head for the certified radius; the Lipschitz bound always holds."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import BrenierPotential, Regularity
from otad.train.affine_potential import AffinePotential
from otad.train.loop import Augment
from otad.train.margin import row_distances
from otad.train.refinement import Objective, RefinementEpoch, refined

__all__ = ["Refinement", "anchored_potential", "refine"]

BEYOND = 1.75  # times the target radius: what the loss asks for, so that unseen samples reach the target
TEMPERATURE = 0.25  # of the cross entropy, times the target radius
BETAS = (0.9, 0.99)
INTERCEPTS = 10.0  # their rate, times that of slopes: they are in squared units
SAMPLES_AT_ONCE = 512


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

    Source: docs/potentials.md, "Smooth potentials"; margin loss of Tsuzuku et al., NeurIPS 2018, arXiv 1802.04034.
    """
    model = nn.ModuleDict({"potential": potential, "head": head, "stem": stem})
    before, after, history = refined(
        "potential",
        model,
        _Objective(stem, potential, head, target_radius),
        inputs,
        y,
        torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.requires_grad and p is not potential.intercepts]},
                {"params": [potential.intercepts], "share": INTERCEPTS},
            ],
            lr=learning_rate,
            betas=BETAS,
            weight_decay=0.0,
        ),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        augment=augment,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    return Refinement(potential.fixed(), head, before, after, history)


class _Objective(Objective):
    """Loss, accuracy and certified share of a batch; a module of its own so that any engine can wrap it."""

    def __init__(self, stem: nn.Module, potential: AffinePotential, head: nn.Linear, target_radius: float) -> None:
        super().__init__()
        self.stem, self.potential, self.head, self.target_radius = stem, potential, head, target_radius
        self.started_from = potential.features.detach().clone()
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

    def facts(self) -> dict[str, float]:
        """How far the features at the pieces' points are from where they started, in the mean."""
        features = torch.cat([self.potential(part) for part in self.potential.x.split(SAMPLES_AT_ONCE)])
        return {"feature_error": float((features - self.started_from.to(features)).norm(dim=1).mean())}


def _radius(logits: Tensor, price: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, y[:, None], False)
    margin = (logits.gather(1, y[:, None]) - logits) / price.clamp(min=1e-12)
    return torch.where(others, margin, torch.inf).amin(1)
