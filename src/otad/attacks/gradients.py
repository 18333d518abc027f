"""Losses an attacker climbs, and their gradients with respect to the input alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Loss", "frozen", "is_flat", "loss_and_gradient", "margin"]

Loss: TypeAlias = Literal["margin", "ce", "dlr"]

# A gradient is flat when walking the whole budget along it would change the loss by less than this share of
# its value.
FLAT = 1e-6


def loss_and_gradient(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    loss: Loss = "margin",
    target: Int[Tensor, " batch"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the loss to be raised, and its gradient with respect to `x`; no parameter receives a gradient.

    Args:
        model: inputs -> logits.
        x: where to look.
        y: true classes.
        loss: "margin", the best wrong logit minus the true one; "ce", cross entropy; "dlr", the margin
            divided by the spread of the logits, so that their scale does not matter.
        target: the wrong class that "margin" and "dlr" look at in place of the best one.

    Returns:
        logits (batch, classes), loss (batch,), gradient in the shape of x. Where the model passes no gradient
        on, or one that is not finite, the gradient is zero.

    Raises:
        ValueError: an unknown loss; a target with "ce"; fewer than three classes with "dlr".
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        value = _loss(loss)(logits, y, target)
        gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        gradient = torch.zeros_like(x)
    return logits.detach(), value.detach(), torch.nan_to_num(gradient, 0.0, 0.0, 0.0)


def margin(
    logits: Float[Tensor, "batch classes"],
    y: Int[Tensor, " batch"],
    target: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """The best wrong logit (or the target's) minus the true one: positive where misclassified."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    if target is not None:
        return logits.gather(1, target[:, None]).squeeze(1) - true
    wrong = logits.masked_fill(functional.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return wrong.amax(dim=1) - true


def is_flat(loss: Float[Tensor, " batch"], gradient: Float[Tensor, "batch ..."], eps: float) -> Tensor:
    """Whether each row's gradient is too small to follow, bool of shape (batch,).

    Flat means: the whole budget `eps` along the gradient would change the loss by less than a millionth of
        its value.
    """
    return length(gradient) * eps <= FLAT * loss.abs()


def length(gradient: Tensor) -> Float[Tensor, " batch"]:
    """Euclidean length of each row, the largest entry taken out first: squares of tiny numbers underflow."""
    flat = gradient.flatten(1)
    largest = flat.abs().amax(dim=1)
    return largest * torch.linalg.vector_norm(flat / largest.clamp_min(torch.finfo(flat.dtype).tiny)[:, None], dim=1)


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters inside the block; everything as before after it."""
    parts = [part for module in modules if module is not None for part in module.modules()]
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    training = [part.training for part in parts]
    learned = [p.requires_grad for p in parameters]
    try:
        for part in parts:
            part.training = False
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for part, mode in zip(parts, training, strict=True):
            part.training = mode
        for p, mode in zip(parameters, learned, strict=True):
            p.requires_grad_(mode)


def _loss(name: Loss) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    if name not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, not {name!r}")
    return _LOSSES[name]


def _cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if target is not None:
        raise ValueError("the loss 'ce' takes no targets; use 'margin' or 'dlr'")
    return functional.cross_entropy(logits, y, reduction="none")


def _margin_over_spread(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if logits.shape[1] < 3:
        # Of two logits margin and spread are the same number, and their ratio is constant.
        raise ValueError(f"the loss 'dlr' needs at least 3 classes, the model has {logits.shape[1]}; use 'margin'")
    return margin(logits, y, target) / (logits.std(dim=1) + torch.finfo(logits.dtype).tiny)


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "margin": margin,
    "ce": _cross_entropy,
    "dlr": _margin_over_spread,
}
