"""Backward pass differentiable approximation: the published protocol, kept for comparison."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from otad.attacks.best import Best
from otad.attacks.threat_model import ThreatModel, per_row

__all__ = ["bpda"]


def bpda(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    backbone: nn.Module,
    steps: int = 20,
    step_size: float = 0.25,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """PGD on the cross entropy of the model's logits, with the backbone's derivative in place of the model's.

    The forward pass and the verdict are the defended model's, at every iterate; only the backward pass pretends that
    the defence is the undefended network. Weaker than the exact gradient: for comparison with published numbers only.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        backbone: the undefended network, same inputs and classes.
        steps: gradient steps, 20 as published.
        step_size: share of the budget that a step takes.
        seed: of the random start.

    Returns:
        one input a row inside the budget and box: misclassified where the attack succeeded, else the iterate of
        highest margin.

    Source: Athalye, Carlini, Wagner, ICML 2018, arXiv 1802.00420; as used in arXiv 2408.00329, Section 5.
    """
    best = Best(x, y)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
    if threat.norm == "l2":
        noise = noise / per_row(torch.linalg.vector_norm(noise.flatten(1), dim=1), x)
    point = threat.project(x + threat.eps * noise, x)
    for step in range(steps + 1):
        rows = best.rows_left()
        if len(rows) == 0:
            break
        logits, gradient = _borrowed_gradient(model, backbone, point[rows], y[rows])
        best.offer(rows, point[rows], logits)
        if step < steps:
            if threat.norm == "l2":
                length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(torch.finfo(x.dtype).tiny)
                way = gradient / per_row(length, gradient)
            else:
                way = gradient.sign()
            point[rows] = threat.project(point[rows] + step_size * threat.eps * way, x[rows])
    return best.x_adv


def _borrowed_gradient(model: nn.Module, backbone: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The model's logits, and the gradient of their cross entropy as if the backbone had made them."""
    with torch.no_grad():
        logits = model(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        ours = backbone(x)
        loss = functional.cross_entropy(ours + (logits - ours).detach(), y, reduction="sum")
        gradient = torch.autograd.grad(loss, x)[0]
    return logits, gradient.nan_to_num(0.0, 0.0, 0.0)
