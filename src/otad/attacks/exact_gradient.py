"""White box: the model's own gradient, and a smoothed model's where it vanishes."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.auto_projected_gradient_descent import apgd, climb
from otad.attacks.best import Best
from otad.attacks.gradients import Loss, is_flat, loss_and_gradient
from otad.attacks.threat_model import ThreatModel

__all__ = ["apgd", "best_wrong_classes", "exact_gradient", "refine"]


def exact_gradient(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    smoothed: Callable[[float], nn.Module] | None = None,
    factors: Sequence[float] = (0.1, 0.3),
    losses: Sequence[Loss] = ("margin", "ce"),
    n_targets: int = 0,
    steps: int = 100,
    restarts: int = 1,
    start: Float[Tensor, "batch ..."] | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Auto-PGD with every loss in turn, continued from wide smoothing to none for samples on a plateau.

    Where the model's gradient at x vanishes, margin runs with the smoothed models (widest first, each from
    where the last one ended) come before the runs on the model itself; there too the narrowest smoothed model
    helps out wherever a gradient vanishes on the way.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        smoothed: factor -> a smoothed model; None for a model that has none.
        factors: how much smoothing, widest (smallest) first.
        losses: each is run on the rows the ones before left unbroken.
        n_targets: after them, one targeted run for each of so many best wrong classes; 0 for none.
        steps: gradient steps a run; the runs on smoothed models together take as many once more.
        restarts: runs for each loss and target.
        start: where the first run starts, in place of x.
        seed: of random starts.

    Returns:
        one input a row inside the budget and box: misclassified where the attack succeeded, else the iterate
            of highest margin.

    Raises:
        ValueError: steps or restarts below 1, an unknown loss.
    """
    best = Best(x, y)
    fallback = None
    if smoothed is not None and factors:
        fallback = smoothed(factors[-1])
        start = _continuation(best, model, threat, smoothed, factors, steps, start, seed)
    for number, loss in enumerate(losses):
        climb(
            best,
            model,
            threat,
            loss=loss,
            steps=steps,
            restarts=restarts,
            surrogate=fallback,
            start=start,
            seed=seed + number,
        )
    rows = best.rows_left()
    if n_targets > 0 and len(rows) > 0:
        chosen = best_wrong_classes(model, x[rows], y[rows], n_targets)
        targets = torch.zeros(len(x), chosen.shape[1], dtype=torch.long, device=x.device)
        targets[rows] = chosen
        climb(
            best,
            model,
            threat,
            targets=targets,
            steps=steps,
            restarts=restarts,
            surrogate=fallback,
            start=start,
            seed=seed,
        )
    return best.x_adv


def refine(
    best: Best,
    model: nn.Module,
    threat: ThreatModel,
    *,
    smoothed: Callable[[float], nn.Module] | None,
    steps: int,
    seed: int,
) -> None:
    """`exact_gradient` on the margin from the best candidates of the rows that are left; 0 steps do nothing."""
    rows = best.rows_left()
    if steps == 0 or len(rows) == 0:
        return
    x, y, start = best.x[rows], best.y[rows], best.x_adv[rows]
    refined = exact_gradient(
        model, x, y, threat, smoothed=smoothed, losses=("margin",), steps=steps, start=start, seed=seed
    )
    with torch.no_grad():
        best.offer(rows, refined, model(refined))


def _continuation(
    best: Best,
    model: nn.Module,
    threat: ThreatModel,
    smoothed: Callable[[float], nn.Module],
    factors: Sequence[float],
    steps: int,
    start: Tensor | None,
    seed: int,
) -> Tensor:
    """Where the runs start: for rows on a plateau, the end of a climb on ever less smoothed models."""
    first = (best.x if start is None else start).clone()
    _, value, gradient = loss_and_gradient(model, first, best.y)
    plateau = is_flat(value, gradient, threat.eps)
    for factor in factors:
        rows = (plateau & ~best.broken).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        part = Best(best.x[rows], best.y[rows])
        climb(
            part,
            model,
            threat,
            steps=max(1, steps // len(factors)),
            surrogate=smoothed(factor),
            start=first[rows],
            seed=seed,
        )
        with torch.no_grad():
            best.offer(rows, part.x_adv, model(part.x_adv))
        first[rows] = part.x_adv
    return first


def best_wrong_classes(model: nn.Module, x: Tensor, y: Tensor, n_targets: int) -> Int[Tensor, "batch targets"]:
    """The wrong classes of highest logit at x, best first, (batch, at most n_targets)."""
    with torch.no_grad():
        logits = model(x)
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.topk(min(n_targets, logits.shape[1] - 1), dim=1).indices
