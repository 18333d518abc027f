"""Attacks that come from elsewhere: an undefended network's adversarial examples, and plain noise."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.auto_projected_gradient_descent import apgd
from otad.attacks.best import Best
from otad.attacks.exact_gradient import refine
from otad.attacks.gradients import Loss
from otad.attacks.threat_model import ThreatModel, per_row

__all__ = ["noise", "transfer"]


def transfer(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    source: nn.Module,
    relatives: Sequence[nn.Module] = (),
    losses: tuple[Loss, ...] = ("margin", "ce"),
    steps: int = 100,
    refine_steps: int = 50,
    smoothed: Callable[[float], nn.Module] | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Attack another network, try the result on the model, and go on from there with the model's own
    gradient.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        source: the network to attack, usually the undefended backbone.
        relatives: further networks, attacked after it.
        losses: one transfer for each, from each network.
        steps: gradient steps on the network, which go on to its highest margin.
        refine_steps: steps with `exact_gradient` on the model from the transferred points; 0 for transfer
            alone.
        smoothed: as in `exact_gradient`, for the refinement.
        seed: of random starts.

    Returns:
        one input a row inside the budget and box: misclassified where the attack succeeded, else the one of
            highest margin.
    """
    best = Best(x, y)
    for number, (network, loss) in enumerate(product((source, *relatives), losses)):
        rows = best.rows_left()
        if len(rows) == 0:
            break
        transferred = apgd(
            network,
            x[rows],
            y[rows],
            threat,
            loss=loss,
            steps=steps,
            stop_when_broken=False,
            seed=seed + number,
        )
        with torch.no_grad():
            best.offer(rows, transferred, model(transferred))
    refine(best, model, threat, smoothed=smoothed, steps=refine_steps, seed=seed)
    return best.x_adv


def noise(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    draws: int = 10,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Random points at the full budget, the weakest attack of all.

    Gaussian directions for L2, random corners for L-infinity.
    """
    best = Best(x, y)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    with torch.no_grad():
        for _ in range(draws):
            direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            if threat.norm == "l2":
                direction = direction / per_row(torch.linalg.vector_norm(direction.flatten(1), dim=1), x)
            else:
                direction = direction.sign()
            rows = best.rows_left()
            if len(rows) == 0:
                break
            candidates = threat.project(x + threat.eps * direction, x)[rows]
            best.offer(rows, candidates, model(candidates))
    return best.x_adv
