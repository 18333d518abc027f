"""Steer which training points the model retrieves, then go on with its own gradient."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.auto_projected_gradient_descent import apgd, climb
from otad.attacks.best import Best
from otad.attacks.exact_gradient import refine
from otad.attacks.gradients import margin
from otad.attacks.soft_neighbors import SoftNeighbors
from otad.attacks.threat_model import ThreatModel

__all__ = ["joint", "retrieval"]


def retrieval(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    x_train: Float[Tensor, "n ..."],
    y_train: Int[Tensor, " n"],
    embedding: Callable[[Tensor], Tensor] | None = None,
    guides: int = 5,
    n_targets: int | None = None,
    temperatures: Sequence[float] = (0.3, 0.05, 0.01),
    steps: int = 20,
    refine_steps: int = 50,
    smoothed: Callable[[float], nn.Module] | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Push each sample towards training points of every wrong class in turn, where the model looks its neighbours up.

    For each class Auto-PGD climbs a soft vote of the nearest training points (`SoftNeighbors`), looked up anew at
    every step, with the gradient through the embedding; the temperature falls from stage to stage, so that in the end
    the vote is that of the retrieval itself. What every stage reaches is shown to the model; from the best of it
    `exact_gradient` goes on.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        x_train: training samples, shaped like x.
        y_train: their classes.
        embedding: inputs -> coordinates of the retrieval; None: the inputs themselves (Euclidean neighbours).
        guides: nearest training points of each class that pull.
        n_targets: wrong classes to try, nearest first; None: all.
        temperatures: of the soft vote, one stage each, in units of `SoftNeighbors.scale`.
        steps: gradient steps a stage.
        refine_steps: steps with the model's own gradient afterwards; 0 for none.
        smoothed: as in `exact_gradient`, for the refinement.
        seed: of random starts.

    Returns:
        one input a row inside the budget and box: misclassified where the attack succeeded, else the one of highest
        margin.

    Source: docs/method.md, "Retrieval".
    """
    best = Best(x, y)
    with torch.no_grad():
        best.offer(best.rows_left(), x, model(x))
        n_classes = model(x[:1]).shape[1]
    soft = SoftNeighbors(x_train, y_train, n_classes, embedding=embedding, k=guides)
    for target in _nearest_classes(soft, x, y, n_targets).unbind(dim=1):
        _stages(best, model, soft, threat, target, temperatures, steps, seed)
    refine(best, model, threat, smoothed=smoothed, steps=refine_steps, seed=seed)
    return best.x_adv


def joint(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    x_train: Float[Tensor, "n ..."],
    y_train: Int[Tensor, " n"],
    embedding: Callable[[Tensor], Tensor] | None = None,
    guides: int = 5,
    n_targets: int = 3,
    weights: Sequence[float] = (1.0, 0.3, 0.1),
    temperature: float = 0.1,
    steps: int = 20,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """One loss for both: the margin of the true logits plus a weight times the retrieval's, the weight falling.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        x_train: training samples, shaped like x.
        y_train: their classes.
        embedding: inputs -> coordinates of the retrieval; None: the inputs themselves.
        guides: nearest training points of each class that pull.
        n_targets: wrong classes to try, those nearest in the retrieval first.
        weights: of the retrieval term, one stage of Auto-PGD each; a last stage climbs the true margin alone. A
            weight of 1 gives both terms the same size on training points.
        temperature: of the soft vote.
        steps: gradient steps a stage.
        seed: of random starts.

    Returns:
        as `retrieval`.

    Source: docs/method.md, "Retrieval".
    """
    best = Best(x, y)
    with torch.no_grad():
        best.offer(best.rows_left(), x, model(x))
        n_classes = model(x[:1]).shape[1]
    soft = SoftNeighbors(x_train, y_train, n_classes, embedding=embedding, k=guides, temperature=temperature)
    size = _relative_size(model, soft, x_train, y_train)
    for target in _nearest_classes(soft, x, y, n_targets).unbind(dim=1):
        point = x.clone()
        for weight in (*weights, 0.0):
            rows = best.rows_left()
            if len(rows) == 0:
                return best.x_adv
            part = Best(x[rows], y[rows])
            climb(
                part,
                model,
                threat,
                targets=target[rows],
                steps=steps,
                surrogate=_Scaled(soft, weight * size) if weight > 0 else None,
                everywhere=weight > 0,
                start=point[rows],
                seed=seed,
            )
            with torch.no_grad():
                best.offer(rows, part.x_adv, model(part.x_adv))
            point[rows] = part.x_adv
    return best.x_adv


def _stages(
    best: Best,
    model: nn.Module,
    soft: SoftNeighbors,
    threat: ThreatModel,
    target: Tensor,
    temperatures: Sequence[float],
    steps: int,
    seed: int,
) -> None:
    """Climb the soft vote for one target class of each row, at ever lower temperatures."""
    point = best.x.clone()
    for temperature in temperatures:
        rows = best.rows_left()
        if len(rows) == 0:
            return
        moved = apgd(
            soft.at(temperature),
            best.x[rows],
            best.y[rows],
            threat,
            targets=target[rows],
            steps=steps,
            start=point[rows],
            stop_when_broken=False,
            seed=seed,
        )
        with torch.no_grad():
            best.offer(rows, moved, model(moved))
        point[rows] = moved


def _nearest_classes(soft: SoftNeighbors, x: Tensor, y: Tensor, n_targets: int | None) -> Int[Tensor, "batch targets"]:
    """Wrong classes with training points, that of the nearest first."""
    with torch.no_grad():
        scores = soft(x)
    wrong = scores.scatter(1, y[:, None], -torch.inf)
    available = int(wrong.isfinite().sum(dim=1).amin()) if len(x) else 0
    return wrong.topk(available if n_targets is None else min(n_targets, available), dim=1).indices


def _relative_size(model: nn.Module, soft: nn.Module, x_train: Tensor, y_train: Tensor, n: int = 64) -> float:
    """Typical margin of the model over that of the soft vote, on training points: fixed, whatever is attacked."""
    some = torch.linspace(0, len(x_train) - 1, min(n, len(x_train))).long()
    with torch.no_grad():
        ours, theirs = (margin(part(x_train[some]), y_train[some]).abs().median() for part in (model, soft))
    ratio = float(ours / theirs.clamp_min(torch.finfo(theirs.dtype).tiny))
    return ratio if 0 < ratio < float("inf") else 1.0


class _Scaled(nn.Module):
    """Logits times a number."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.factor * self.inner(x)
