"""Straight lines towards training samples of other classes: an attack that needs no gradient."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.best import Best
from otad.attacks.threat_model import ThreatModel, per_row

__all__ = ["lines", "shrink"]

BLOCK = 20_000_000  # numbers in one block of distances, about 80 MB


def lines(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    x_train: Float[Tensor, "n ..."],
    y_train: Int[Tensor, " n"],
    neighbors: int = 10,
    points: int = 5,
    bisections: int = 6,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Walk from each sample to its nearest training samples of other classes, as far as the budget reaches.

    On each line several points are tried, the farthest first, because a classifier may flip on the way and
    flip back. Under L-infinity two ways are tried: the straight one, and one where every coordinate moves at
    full speed until it arrives. Where the label flips, bisection between the nearest point known to flip and
    the sample finds a smaller distance.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        x_train: training samples, shaped like x.
        y_train: their classes.
        neighbors: lines for each sample, to the nearest (L2) wrong-class training samples.
        points: points tried on each line.
        bisections: halvings of the flipping distance at the end; 0 keeps the point as found.
        seed: not used; the attack is deterministic.

    Returns:
        one input a row inside the budget and box, misclassified where the attack succeeded.

    Raises:
        ValueError: neighbors or points below 1; x_train of another shape than x.
    """
    if neighbors < 1 or points < 1:
        raise ValueError(f"neighbors and points must be at least 1, not {neighbors} and {points}")
    if x_train.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"samples have shape {tuple(x_train.shape[1:])} in x_train and {tuple(x.shape[1:])} in x; they must agree"
        )
    best = Best(x, y)
    nearest, found = _nearest_of_other_classes(x, y, x_train, y_train, neighbors)
    straight = (True,) if threat.norm == "l2" else (True, False)
    with torch.no_grad():
        for neighbor in range(nearest.shape[1]):
            for way in straight:
                for share in torch.linspace(1.0, 0.0, points + 1)[:-1].tolist():
                    rows = best.rows_left()
                    rows = rows[found[rows, neighbor]]
                    if len(rows) == 0:
                        break
                    goal = x_train[nearest[rows, neighbor]].to(x)
                    candidates = _on_the_way(x[rows], goal, threat, share, straight=way)
                    best.offer(rows, candidates, model(candidates))
        broken = best.broken.nonzero().squeeze(1)
        if bisections and len(broken):
            best.x_adv[broken] = shrink(model, x[broken], best.x_adv[broken], y[broken], steps=bisections)
    return best.x_adv


def shrink(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    x_adv: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    *,
    steps: int = 8,
) -> Float[Tensor, "batch ..."]:
    """Bisect from misclassified inputs towards their samples; every returned row is still misclassified.

    Rows of `x_adv` that are not misclassified are returned as they are.
    """
    kept, low, high = x_adv.clone(), x.new_zeros(len(x)), x.new_ones(len(x))
    with torch.no_grad():
        for _ in range(steps):
            middle = (low + high) / 2
            candidates = x + per_row(middle, x) * (x_adv - x)
            flips = model(candidates).argmax(dim=1) != y
            kept = torch.where(per_row(flips, x), candidates, kept)
            high = torch.where(flips, middle, high)
            low = torch.where(flips, low, middle)
    return kept


def _on_the_way(x: Tensor, goal: Tensor, threat: ThreatModel, share: float, *, straight: bool) -> Tensor:
    """The point at `share` of the way that the budget allows from x to goal (never beyond goal)."""
    delta = goal - x
    if straight:
        order = 2 if threat.norm == "l2" else math.inf
        length = torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        delta = delta * per_row((threat.eps / length).clamp_max(1.0) * share, delta)
    else:
        delta = delta.clamp(-threat.eps * share, threat.eps * share)
    return threat.project(x + delta, x)


def _nearest_of_other_classes(x: Tensor, y: Tensor, x_train: Tensor, y_train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k nearest wrong-class training samples, (batch, k), and whether each exists."""
    train = x_train.flatten(1).to(x)
    squares = train.square().sum(dim=1)
    y_train = y_train.to(y.device)
    indices, found = [], []
    rows = max(1, BLOCK // len(train))
    for x_part, y_part in zip(x.flatten(1).split(rows), y.split(rows), strict=True):
        # The square of x itself is the same for all training samples, and does not matter for their order.
        distance = squares - 2 * x_part @ train.T
        distance = distance.masked_fill(y_part[:, None] == y_train[None], torch.inf)
        nearest = distance.topk(min(k, len(train)), dim=1, largest=False)
        indices.append(nearest.indices)
        found.append(torch.isfinite(nearest.values))
    return torch.cat(indices), torch.cat(found)
