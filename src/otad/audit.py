"""Is a robust number real? Checks that are printed beside it.

Every check is a pure function of tensors, shares or a module and returns an `AuditCheck`. None of them runs
an attack: the evaluation does, and hands over what it found.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from otad.results import AuditCheck

__all__ = [
    "active_set",
    "attack_order",
    "batch_invariant",
    "black_box_adds",
    "certified_attacked_clean",
    "deterministic",
    "finite_differences",
    "neighbor_changes",
    "never_rises",
    "transfer_over_noise",
    "zero_at_large_eps",
    "zero_gradients",
]

ROUNDING = 1e-3  # share of a radius that float32 rounding in model and attack may explain
AGREEMENT = 1e-3  # relative error of a directional derivative that counts as agreement
ENOUGH = 0.9  # share of samples whose derivatives must agree; the rest may sit on kinks
TOLERATED = 0.02  # share of samples by which a weaker attack may do better
BY_CHANCE = 2  # samples of a small audit that may differ from run to run


def certified_attacked_clean(
    correct: Bool[Tensor, " n"],
    survived: Mapping[str, Bool[Tensor, " n"]],
    *,
    certified_radius: Float[Tensor, " n"] | None = None,
    same_label: Bool[Tensor, " n"] | None = None,
    distance: Mapping[str, Float[Tensor, " n"]] | None = None,
) -> AuditCheck:
    """Certified <= attacked <= clean, sample by sample.

    Args:
        correct: whether the model is right on the unchanged sample.
        survived: budget -> whether the sample survived every attack.
        certified_radius: L2 radius within which the label cannot change; None without a certificate.
        same_label: whether the certificate speaks of the label the model predicts; None where it does by
            construction.
        distance: budget -> L2 distance of the adversarial example found, infinite where there is none.

    Returns:
        value: number of samples that contradict it: right only under attack, broken inside their certified
        radius, or certified for a label the model does not give.
    """
    wrong = torch.zeros_like(correct)
    for alive in survived.values():
        wrong |= alive & ~correct
    if certified_radius is not None:
        for key, lengths in (distance or {}).items():
            broken = correct & ~survived[key]
            wrong |= broken & (lengths.double() < certified_radius.double() * (1 - ROUNDING))
        if same_label is not None:
            wrong |= ~same_label
    count = int(wrong.sum())
    return AuditCheck(
        passed=count == 0,
        value=float(count),
        meaning=(
            "Samples that contradict certified <= attacked <= clean, one by one (broken inside a "
            "certified radius, say); any at all means that the certificate, or its use, is wrong."
        ),
    )


def zero_at_large_eps(accuracy: float, eps: float, norm: str = "l2") -> AuditCheck:
    """Accuracy must reach zero when the budget is large enough to replace the sample altogether."""
    return AuditCheck(
        passed=accuracy <= 0.0,
        value=float(accuracy),
        meaning=(
            f"Accuracy under attack with a budget ({norm} {eps:.3g}) that reaches samples of other "
            "classes and exceeds every certificate; above zero means that the attack, not the attacked, is weak."
        ),
    )


def never_rises(accuracy: Mapping[float, float], *, along: str = "budget", n: int | None = None) -> AuditCheck:
    """Accuracy under one attack, run afresh for every budget, must not rise with the budget (or steps, or restarts).

    Args:
        accuracy: budget, steps or restarts -> share still correct.
        along: what the keys are, for the reader.
        n: samples behind the shares: of few, two may differ by chance.

    Returns:
        value: the largest rise from one key to the next larger.
    """
    shares = [accuracy[key] for key in sorted(accuracy)]
    rise = max((b - a for a, b in pairwise(shares)), default=0.0)
    allowed = TOLERATED if n is None else max(TOLERATED, BY_CHANCE / n)
    return AuditCheck(
        passed=rise <= allowed + 1e-9,
        value=max(0.0, float(rise)),
        meaning=(
            f"Largest rise of accuracy from one {along} to the next larger, each attacked afresh; "
            f"above {allowed:.2g} means that gradients mislead the attack."
        ),
    )


def attack_order(
    white_box: Mapping[str, Bool[Tensor, " n"]], weaker: Mapping[str, Sequence[Bool[Tensor, " n"]]]
) -> AuditCheck:
    """White-box attacks must be at least as strong as transfer and noise.

    Args:
        white_box: budget -> whether the sample survived the white-box attacks.
        weaker: budget -> the same for each weaker attack.

    Returns:
        value: largest share of samples, over budgets, that a weaker attack broke and the white-box attacks
            did not.
    """
    shares = [
        float((alive & ~other).double().mean())
        for key, alive in white_box.items()
        for other in weaker.get(key, ())
        if len(alive)
    ]
    worst = max(shares, default=0.0)
    return AuditCheck(
        passed=worst <= TOLERATED if shares else None,
        value=worst,
        meaning=(
            "Share of samples that transfer or noise broke and the white-box attacks did not; "
            f"above {TOLERATED:g} means masked gradients."
        ),
    )


def transfer_over_noise(
    transfer: Mapping[str, Bool[Tensor, " n"]], noise: Mapping[str, Bool[Tensor, " n"]]
) -> AuditCheck:
    """An undefended network's adversarial examples must do at least as much harm as noise of the same size.

    Args:
        transfer: budget -> whether the sample survived examples of the source network.
        noise: budget -> whether it survived noise.

    Returns:
        value: largest difference of accuracy, over budgets, by which noise does better than transfer.
    """
    gaps = [float(alive.double().mean() - noise[key].double().mean()) for key, alive in transfer.items() if len(alive)]
    worst = max(gaps, default=0.0)
    allowed = max(TOLERATED, BY_CHANCE / max([1, *(len(alive) for alive in transfer.values())]))
    return AuditCheck(
        passed=worst <= allowed + 1e-9 if gaps else None,
        value=max(0.0, worst),
        meaning=(
            f"By how much noise lowers accuracy further than transferred examples; above {allowed:.2g} means that the "
            "source of the transfer tells nothing about this model."
        ),
    )


def black_box_adds(added: Mapping[str, Bool[Tensor, " n"]], *, queries: int) -> AuditCheck:
    """Attacks without gradients must find next to nothing that the white-box attacks missed.

    Args:
        added: black-box attack -> whether it broke a sample that the white-box attacks had not, of all audited.
        queries: of each attack and sample.

    Returns:
        value: the largest share that one of them added.
    """
    shares = {name: float(broken.double().mean()) for name, broken in added.items() if len(broken)}
    worst = max(shares.values(), default=0.0)
    # One sample of a small audit is more than two points, and no more than chance.
    allowed = max([TOLERATED, *(1.5 / len(broken) for broken in added.values() if len(broken))])
    return AuditCheck(
        passed=worst < allowed if shares else None,
        value=worst,
        meaning=(
            f"Largest share of samples that {' or '.join(shares) or 'a black-box attack'} ({queries} queries) broke "
            f"and the white-box attacks did not; {allowed:.2g} or more means masked gradients."
        ),
    )


def active_set(clean: Float[Tensor, " n"], attacked: Float[Tensor, " m"]) -> AuditCheck:
    """How many training points carry weight: with one alone the map is flat or linear there. Informs only.

    Args:
        clean: number of active points at the samples.
        attacked: the same at their adversarial examples.

    Returns:
        value: the mean at the samples.
    """
    one = float((clean <= 1).double().mean()) if len(clean) else 0.0
    after = float(attacked.double().mean()) if len(attacked) else 0.0
    return AuditCheck(
        passed=None,
        value=float(clean.double().mean()) if len(clean) else 0.0,
        meaning=(
            f"Mean number of training points behind a feature; {after:.3g} at the adversarial examples; "
            f"{100 * one:.0f} % of the samples have one alone, where the map bends nowhere."
        ),
    )


def neighbor_changes(changed: Bool[Tensor, " n"]) -> AuditCheck:
    """How often the attack changed which training points are looked up. Informs only.

    Args:
        changed: whether sample and adversarial example have different neighbours.
    """
    return AuditCheck(
        passed=None,
        value=float(changed.double().mean()) if len(changed) else 0.0,
        meaning=(
            "Share of samples whose set of neighbours changed under attack; where it did, a bound that holds while the "
            "neighbours stay says nothing."
        ),
    )


def finite_differences(
    model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], *, directions: int = 4, seed: int = 0
) -> AuditCheck:
    """Does the gradient that attacks follow agree with what the model does?

    Central differences of the margin along random directions and along the gradient itself, in float64 on a
    copy of the model, or in its own precision (with wider steps and a tolerance of 5 %) where it does not
    take float64. A sample agrees when the median of its errors is small, so that a kink in one direction does
    not count.

    Args:
        model: inputs -> logits, in evaluation mode.
        x: samples.
        y: their true classes.
        directions: random directions for each sample.
        seed: of the directions.

    Returns:
        value: share of samples that agree.
    """
    double, x_double = _in_double(model, x)
    step, tolerance = (1e-5, AGREEMENT) if double is not None else (1e-2, 5e-2)
    judged, points = (double, x_double) if double is not None else (model, x)
    slope = _margin_gradient(judged, points, y)
    generator = torch.Generator(device=points.device).manual_seed(seed)
    ways = [
        torch.randn(points.shape, generator=generator, device=points.device, dtype=points.dtype)
        for _ in range(directions)
    ]
    errors = []
    with torch.no_grad():
        for way in [*ways, slope]:
            lengths = torch.linalg.vector_norm(way.flatten(1), dim=1).clamp_min(1e-30)
            way = way / lengths.view(-1, *([1] * (way.ndim - 1)))
            ahead, behind = _margins(judged(points + step * way), y), _margins(judged(points - step * way), y)
            measured = (ahead - behind) / (2 * step)
            claimed = (slope * way).flatten(1).sum(dim=1)
            # Rounding of the margins themselves, which a difference quotient magnifies.
            noise = 10 * torch.finfo(points.dtype).eps * ahead.abs() / step
            errors.append(
                ((measured - claimed).abs() - noise).clamp_min(0)
                / measured.abs().maximum(claimed.abs()).clamp_min(1e-30)
            )
    error = torch.stack(errors).median(dim=0).values
    share = float((error <= tolerance).double().mean()) if len(error) else 1.0
    precision = "float64" if double is not None else "its own precision"
    return AuditCheck(
        passed=share >= ENOUGH,
        value=share,
        meaning=(
            f"Share of samples whose gradient agrees with finite differences ({precision}, within "
            f"{tolerance:g}); below {ENOUGH:g} means that attacks follow a gradient that is not "
            "the model's."
        ),
    )


def zero_gradients(flat: Bool[Tensor, " n"], *, surrogate: bool) -> AuditCheck:
    """How many samples have no gradient to follow; an honest attack then needs a surrogate that has one.

    Args:
        flat: whether the margin's gradient vanishes at the sample.
        surrogate: whether the attacks had a smoothed model to climb where it does.
    """
    share = float(flat.double().mean()) if len(flat) else 0.0
    return AuditCheck(
        passed=share == 0.0 or surrogate,
        value=share,
        meaning="Share of samples where the margin's gradient vanishes"
        + (" (attacks had a smoothed model to climb there)." if surrogate else "; gradient attacks cannot see there."),
    )


def deterministic(model: nn.Module, x: Float[Tensor, "n ..."]) -> AuditCheck:
    """The same input must give the same logits: a random answer hides from attacks that measure it once."""
    with torch.no_grad():
        first = model(x)
        difference = max(float(_relative(model(x), first)) for _ in range(2))
    return AuditCheck(
        passed=difference <= 1e-6,
        value=difference,
        meaning=(
            "Largest relative difference of logits between repeated forward passes; above 1e-6 "
            "means a randomised model, for which these numbers do not hold."
        ),
    )


def batch_invariant(model: nn.Module, x: Float[Tensor, "n ..."], *, alone: int = 8) -> AuditCheck:
    """A sample's logits must not depend on what else is in the batch."""
    with torch.no_grad():
        together = model(x)
        differences = [float(_relative(model(x[i : i + 1]), together[i : i + 1])) for i in range(min(alone, len(x)))]
    difference = max(differences, default=0.0)
    return AuditCheck(
        passed=difference <= 1e-3,
        value=difference,
        meaning=(
            "Largest relative difference of logits between a sample alone and in a batch; above "
            "1e-3 means that answers depend on the company a sample keeps."
        ),
    )


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().max() / b.abs().max().clamp_min(1e-30)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], -torch.inf).amax(dim=1) - true


def _margin_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = _margins(model(x), y)
        if not value.requires_grad:
            return torch.zeros_like(x)
        gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0]
    return torch.zeros_like(x) if gradient is None else gradient


def _in_double(model: nn.Module, x: Tensor) -> tuple[nn.Module | None, Tensor]:
    """A float64 copy of the model and the samples for it; None where the model does not take float64."""
    try:
        double, points = copy.deepcopy(model).double(), x.double()
        with torch.no_grad():
            logits = double(points)
    except (RuntimeError, TypeError, ValueError):
        return None, x
    return (double, points) if logits.dtype == torch.float64 else (None, x)
