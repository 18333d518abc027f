"""Refinement: train a potential's pieces and the head for the certified radius; the Lipschitz bound always holds."""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from otad.cip import BrenierPotential, Regularity
from otad.errors import OTADError
from otad.train.affine_potential import AffinePotential
from otad.train.state import TrainingState

__all__ = ["Refinement", "RefinementEpoch", "anchored_potential", "refine"]

logger = logging.getLogger(__name__)

Augment = Callable[[Tensor, torch.Generator], Tensor]

BEYOND = 1.75  # times the target radius: what the loss asks for, so that unseen samples reach the target
TEMPERATURE = 0.25  # of the cross entropy, times the target radius
INTERCEPTS = 10.0  # their rate, times that of slopes: they are in squared units
WARM_UP = 0.05
BETAS = (0.9, 0.99)
SAMPLES_AT_ONCE = 512


@dataclass(frozen=True)
class RefinementEpoch:
    """What the progress bar shows.

    Attributes:
        epoch: from 1.
        loss: mean training loss.
        accuracy: share of training samples, augmented where they are, classified correctly while training.
        certified: share of them whose radius exceeds the target.
        seconds: wall time since training began.
    """

    epoch: int
    loss: float
    accuracy: float
    certified: float
    seconds: float


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
    progress: bool = False,
) -> Refinement:
    """Minimise a cross entropy that takes the price of the target radius off every margin, by AdamW, in place.

    The radius of a sample is min_j (f_y - f_j) / (Lip |w_y - w_j|), Lip that of stem and potential together. The loss
    adds R Lip |w_y - w_j| to each wrong logit, R beyond the target. Both sides are measured in units of the root mean
    square of |w_i - w_j|, so the head's length is free: without that it would shrink the price instead of earning it.

    Args:
        potential: trained in place; see `AffinePotential.of` and `anchored_potential` for starts.
        head: features to logits; trained in place unless its parameters are frozen.
        stem: inputs to points, with its Lipschitz constant `stem.lipschitz`, which training must not move; trained in
            place where it has parameters (`EncodedStem`).
        inputs: training inputs; best not only those that the pieces started from, which are soon learned by heart.
        y: class indices.
        target_radius: L2 radius, in units of the inputs, to be certified at.
        epochs: passes over the data.
        batch_size: samples a step.
        learning_rate: the largest of the schedule; ten times it for the intercepts.
        augment: inputs and a generator for its random numbers -> inputs of the same shape, at every step.
        seed: of the batch order and the augmentation.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
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
    scale = float(stem.lipschitz) * float(potential.regularity.lipschitz)  # type: ignore[arg-type]
    objective = _Objective(potential, head, scale, target_radius)
    learned = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in learned if p is not potential.intercepts]
    groups = [{"params": others, "share": 1.0}, {"params": [potential.intercepts], "share": INTERCEPTS}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, weight_decay=0.0)
    settings = {"target_radius": target_radius, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    settings |= {"learning_rate": learning_rate, "augment": getattr(augment, "__name__", None)}
    settings |= {
        "data": _digest(inputs, y),
        "start": _digest(*(value for _, value in sorted(model.state_dict().items()))),
    }
    state = TrainingState(checkpoint, "potential", settings)
    started_from = potential.features.detach().clone()
    before = _facts(objective, stem, inputs, y, started_from)
    history = [RefinementEpoch(**row) for row in state.load(model, optimizer)] if resume else []
    started = time.perf_counter() - (history[-1].seconds if history else 0.0)
    steps = math.ceil(len(y) / batch_size)
    with tqdm(total=epochs, initial=len(history), desc="refining", unit="epoch", disable=not progress) as bar:
        for epoch in range(len(history), epochs):
            # Of seed and epoch alone, so that a resumed run draws what it would have drawn.
            draws = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            sums = torch.zeros(3, dtype=torch.float64)
            for step, rows in enumerate(torch.randperm(len(y), generator=draws).split(batch_size)):
                _set_rate(optimizer, learning_rate, (epoch * steps + step) / (epochs * steps))
                batch = inputs[rows] if augment is None else augment(inputs[rows], draws)
                loss, radius = objective(stem(batch), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                facts = torch.stack([loss.detach(), (radius > 0).float().mean(), _share(radius, target_radius)])
                sums += len(rows) * facts.double().cpu()
            loss, accuracy, certified = (sums / len(y)).tolist()
            history.append(RefinementEpoch(epoch + 1, loss, accuracy, certified, time.perf_counter() - started))
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", certified=f"{certified:.1%}")
            bar.update()
            logger.debug("%s", history[-1])
            state.save(model, optimizer, [asdict(row) for row in history])
    optimizer.zero_grad(set_to_none=True)
    if not all(bool(p.isfinite().all()) for p in learned):
        raise OTADError("refinement diverged: parameters are not finite; scale the columns of x, or lower the rate")
    after = _facts(objective, stem, inputs, y, started_from)
    return Refinement(potential.fixed(), head, before, after, history)


class _Objective(nn.Module):
    """Loss and radii of points."""

    def __init__(self, potential: AffinePotential, head: nn.Linear, lipschitz: float, target_radius: float) -> None:
        super().__init__()
        self.potential, self.head, self.lipschitz, self.target_radius = potential, head, lipschitz, target_radius

    def forward(self, points: Tensor, y: Tensor) -> tuple[Tensor, Float[Tensor, " batch"]]:
        logits, apart = self.head(self.potential(points)), _row_distances(self.head.weight)
        unit = (apart.square().sum() / (len(apart) * (len(apart) - 1))).sqrt()
        logits, price = logits / (self.lipschitz * unit), apart[y] / unit
        others = torch.ones_like(logits, dtype=torch.bool).scatter(1, y[:, None], False)
        priced = logits + BEYOND * self.target_radius * price
        # By the largest possible step of the feature, sqrt(2) for orthonormal rows, logits and price have one unit.
        loss = nn.functional.cross_entropy(priced * math.sqrt(2) / (TEMPERATURE * self.target_radius), y)
        with torch.no_grad():
            margin = (logits.gather(1, y[:, None]) - logits) / price.clamp(min=1e-12)
            radius = torch.where(others, margin, torch.inf).amin(1)
        return loss, radius


def _row_distances(rows: Float[Tensor, "classes d"]) -> Float[Tensor, "classes classes"]:
    """|w_i - w_j|, 0 on the diagonal, differentiable there too."""
    squared = (rows[:, None] - rows[None]).square().sum(2)
    same = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return torch.where(same, 0, squared.masked_fill(same, 1).clamp(min=1e-12).sqrt())


def _share(radius: Tensor, target: float) -> Tensor:
    return (radius > target).float().mean()


def _facts(
    objective: _Objective, stem: nn.Module, inputs: Tensor, y: Tensor, z: Float[Tensor, "pieces d"]
) -> dict[str, float]:
    potential = objective.potential
    with torch.no_grad():
        parts = zip(inputs.split(SAMPLES_AT_ONCE), y.split(SAMPLES_AT_ONCE), strict=True)
        radius = torch.cat([objective(stem(part), labels)[1] for part, labels in parts])
        features = torch.cat([potential(part) for part in potential.x.split(SAMPLES_AT_ONCE)])
    return {
        "accuracy": float((radius > 0).double().mean()),
        "certified": float((radius > objective.target_radius).double().mean()),
        "feature_error": float((features - z).norm(dim=1).mean()),
    }


def _digest(*parts: Tensor) -> str:
    """Of data and start, so that a checkpoint is gone on from with its own only."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float, progress: float) -> None:
    """Linear warm-up, then a half cosine to zero."""
    warm = min(1.0, progress / WARM_UP + 1e-2)
    for group in optimizer.param_groups:
        group["lr"] = group["share"] * learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
