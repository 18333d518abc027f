"""Auto projected gradient descent: gradient ascent on a loss whose step size halves when progress stalls."""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.best import Best
from otad.attacks.gradients import Loss, is_flat, length, loss_and_gradient
from otad.attacks.threat_model import ThreatModel, per_row

__all__ = ["apgd", "climb"]

MOMENTUM = 0.25  # share of the last move kept, as published
SHARE_OF_RISES = 0.75  # fewer rising steps than this between two checkpoints halve the step


def apgd(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    loss: Loss = "margin",
    targets: Int[Tensor, "..."] | None = None,
    steps: int = 100,
    restarts: int = 1,
    surrogate: nn.Module | None = None,
    start: Float[Tensor, "batch ..."] | None = None,
    stop_when_broken: bool = True,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """Auto-PGD: momentum, step halving at checkpoints, best iterate by the true model's forward pass.

    The first run starts from `start` (else from x), further restarts from random points of the budget. Rows
    leave the batch as soon as they are misclassified.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        loss: what to raise; see `loss_and_gradient`.
        targets: wrong classes to aim at, (batch,) or (batch, m): one run for each column, with the loss
            "margin" or "dlr".
        steps: gradient steps a run.
        restarts: runs (for each column of targets).
        surrogate: where the model's own gradient vanishes, climb the sum of its loss and this module's from
            then on.
        start: where the first run starts; projected into the budget.
        stop_when_broken: False goes on to the highest margin, as transfer attacks want it.
        seed: of random starts.

    Returns:
        one input a row inside the budget and box: misclassified where the attack succeeded, else the iterate
            of highest margin.

    Raises:
        ValueError: steps or restarts below 1, an unknown loss.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690.
    """
    best = Best(x, y)
    climb(
        best,
        model,
        threat,
        loss=loss,
        targets=targets,
        steps=steps,
        restarts=restarts,
        surrogate=surrogate,
        start=start,
        stop_when_broken=stop_when_broken,
        seed=seed,
    )
    return best.x_adv


def climb(
    best: Best,
    model: nn.Module,
    threat: ThreatModel,
    *,
    loss: Loss = "margin",
    targets: Int[Tensor, "..."] | None = None,
    steps: int = 100,
    restarts: int = 1,
    surrogate: nn.Module | None = None,
    everywhere: bool = False,
    start: Float[Tensor, "batch ..."] | None = None,
    stop_when_broken: bool = True,
    seed: int = 0,
) -> None:
    """`apgd` for the rows of `best` that are not broken yet; what it finds goes into `best`.

    With `everywhere` all rows climb the sum of both losses from the start, not only those on a plateau.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    generator = torch.Generator(device=best.x.device).manual_seed(seed)
    columns = [None] if targets is None else list(targets.view(len(best.x), -1).unbind(dim=1))
    for target in columns:
        for restart in range(restarts):
            rows = best.rows_left() if stop_when_broken else torch.arange(len(best.x), device=best.x.device)
            if len(rows) == 0:
                return
            x = best.x[rows]
            if restart > 0:
                point = _random_point(x, threat, generator)
            else:
                point = x.clone() if start is None else threat.project(start[rows], x)
            state = _begin(rows, x, best.y[rows], None if target is None else target[rows], point, threat)
            state.flat = state.flat | (everywhere and surrogate is not None)
            _run(best, state, model, surrogate, threat, loss, steps, stop_when_broken, generator)


@dataclass
class _Rows:
    """The state of one run; every field has one row for each sample still under attack."""

    index: Tensor
    x: Tensor
    y: Tensor
    target: Tensor | None
    point: Tensor  # current iterate
    previous: Tensor  # the one before, for the momentum
    value: Tensor  # loss at the iterate
    gradient: Tensor
    top_point: Tensor  # iterate of highest loss, where a halved step starts again
    top_value: Tensor
    top_gradient: Tensor
    top_at_check: Tensor  # highest loss at the last checkpoint
    step: Tensor  # step size
    rises: Tensor  # rising steps since the last checkpoint
    halved: Tensor  # whether the last checkpoint halved the step
    flat: Tensor  # whether the model's own gradient vanished on the way

    def keep(self, mask: Tensor) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                setattr(self, field.name, value[mask])


def _begin(rows: Tensor, x: Tensor, y: Tensor, target: Tensor | None, point: Tensor, threat: ThreatModel) -> _Rows:
    lowest = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return _Rows(
        index=rows,
        x=x,
        y=y,
        target=target,
        point=point,
        previous=point.clone(),
        value=lowest.clone(),
        gradient=torch.zeros_like(x),
        top_point=point.clone(),
        top_value=lowest.clone(),
        top_gradient=torch.zeros_like(x),
        top_at_check=lowest.clone(),
        step=torch.full_like(lowest, 2 * threat.eps),
        rises=torch.zeros_like(lowest),
        halved=~no,  # as if the step had just changed: the first checkpoint judges by rises alone
        flat=no,
    )


def _run(
    best: Best,
    state: _Rows,
    model: nn.Module,
    surrogate: nn.Module | None,
    threat: ThreatModel,
    loss: Loss,
    steps: int,
    stop_when_broken: bool,
    generator: torch.Generator,
) -> None:
    checkpoints = _checkpoints(steps)
    last_check = 0
    for step in range(steps + 1):
        if step > 0:
            _advance(state, threat, momentum=MOMENTUM if step > 1 else 0.0)
        value_before = state.value
        logits = _measure(state, model, surrogate, threat, loss, generator)
        broken = best.offer(state.index, state.point, logits)
        state.rises += state.value > value_before
        _remember_top(state)
        if step in checkpoints:
            _halve_where_stalled(state, window=step - last_check)
            last_check = step
        if stop_when_broken and bool(broken.any()):
            state.keep(~broken)
        if len(state.index) == 0:
            return


def _checkpoints(steps: int) -> set[int]:
    """Steps at which progress is judged: after 22 % of them, then at ever shorter windows of at least 6 %."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:] if share <= 1}


def _measure(
    state: _Rows,
    model: nn.Module,
    surrogate: nn.Module | None,
    threat: ThreatModel,
    loss: Loss,
    generator: torch.Generator,
) -> Tensor:
    """Logits of the true model at the iterates; sets value and gradient of the objective each row climbs."""
    logits, value, gradient = loss_and_gradient(model, state.point, state.y, loss, state.target)
    flat_here = is_flat(value, gradient, threat.eps)
    newly_flat = flat_here & ~state.flat
    state.flat = state.flat | flat_here
    if surrogate is not None and bool(state.flat.any()):
        # From its first flat point on a row climbs the sum: values stay comparable from step to step.
        rows = state.flat.nonzero().squeeze(1)
        target = None if state.target is None else state.target[rows]
        _, more, slope = loss_and_gradient(surrogate, state.point[rows], state.y[rows], loss, target)
        value[rows] += more
        gradient[rows] += slope
        state.top_value[newly_flat] = -torch.inf
    nowhere = length(gradient) == 0
    if bool(nowhere.any()):
        # With no direction to follow, a random one at least leaves the plateau.
        noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
        gradient = torch.where(per_row(nowhere, gradient), noise, gradient)
    state.value, state.gradient = value, gradient
    return logits


def _advance(state: _Rows, threat: ThreatModel, momentum: float) -> None:
    """One projected step with momentum."""
    if threat.norm == "l2":
        largest = state.gradient.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(state.x.dtype).tiny)
        scaled = state.gradient / per_row(largest, state.x)
        direction = scaled / per_row(torch.linalg.vector_norm(scaled.flatten(1), dim=1), state.x)
    else:
        direction = state.gradient.sign()
    ahead = threat.project(state.point + per_row(state.step, state.x) * direction, state.x)
    move = (1 - momentum) * (ahead - state.point) + momentum * (state.point - state.previous)
    state.previous = state.point
    state.point = threat.project(state.point + move, state.x)


def _remember_top(state: _Rows) -> None:
    higher = state.value > state.top_value
    state.top_value = torch.where(higher, state.value, state.top_value)
    state.top_point = torch.where(per_row(higher, state.x), state.point, state.top_point)
    state.top_gradient = torch.where(per_row(higher, state.x), state.gradient, state.top_gradient)


def _halve_where_stalled(state: _Rows, window: int) -> None:
    """Where the loss rose too rarely or its best value stood still: halve the step, go back to the top."""
    stalled = state.rises < SHARE_OF_RISES * window
    stalled |= ~state.halved & (state.top_value <= state.top_at_check)
    state.step = torch.where(stalled, state.step / 2, state.step)
    back = per_row(stalled, state.x)
    state.point = torch.where(back, state.top_point, state.point)
    state.previous = torch.where(back, state.top_point, state.previous)
    state.gradient = torch.where(back, state.top_gradient, state.gradient)
    state.value = torch.where(stalled, state.top_value, state.value)
    state.halved = stalled
    state.top_at_check = state.top_value
    state.rises = torch.zeros_like(state.rises)


def _random_point(x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """A random point of the budget: on its sphere for L2, uniform in its cube for L-infinity."""
    if threat.norm == "l2":
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        noise = noise / per_row(torch.linalg.vector_norm(noise.flatten(1), dim=1), x)
    else:
        noise = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
    return threat.project(x + threat.eps * noise, x)
