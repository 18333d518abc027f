"""What the audit asks for: budgets attacked afresh, weaker attacks, distances of what was found."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from otad import audit
from otad.attacks.cells import nearest_cells
from otad.attacks.exact_gradient import exact_gradient
from otad.attacks.foolbox import decision_based
from otad.attacks.gradients import is_flat, loss_and_gradient
from otad.attacks.lines import lines, shrink
from otad.attacks.packages import autoattack
from otad.attacks.sets import ATTACKS
from otad.attacks.suite import Outcome, worst_case
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.attacks.transfer import noise, transfer
from otad.certificate import Certificate
from otad.defense import OTAD
from otad.results import AuditCheck

__all__ = ["gather"]

AUDIT_SAMPLES = 64
AUDIT_STEPS = 20
STEPS = (5, 20, 40)
RESTARTS = (1, 2)
BLACK_BOX_SAMPLES = 24  # survivors that a black-box attack is tried on, each with so many queries:
BLACK_BOX_QUERIES = 200


def gather(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    predicted: Tensor,
    threats: Sequence[ThreatModel],
    outcomes: dict[str, dict[str, Outcome]],
    certificate: Certificate | None,
    radius: np.ndarray | None,
    knowledge: AttackerKnowledge,
    batch_size: int,
    seed: int,
) -> dict[str, AuditCheck]:
    """All checks on one model; those that attack use the first few samples the model gets right.

    Args:
        model: inputs -> logits, in evaluation mode.
        x: the attacked samples.
        y: their true classes.
        predicted: the model's classes.
        threats: the budgets.
        outcomes: budget -> attack -> what it found.
        certificate: of at least these samples, in their order; None without one.
        radius: its radii that count, (at least n,).
        knowledge: what the attacker knows.
        batch_size: samples a forward pass.
        seed: of directions, noise and random starts.

    Returns:
        check -> its outcome.
    """
    worst = {key: worst_case(found) for key, found in outcomes.items()}
    correct = predicted == y
    certified, same = None, None
    if certificate is not None and radius is not None:
        certified = torch.as_tensor(radius[: len(x)], device=x.device)
        label = torch.as_tensor(np.asarray(certificate.label)[: len(x)].astype(np.int64), device=x.device)
        same = (label == predicted) | (certified <= 0)
    distance = {}
    if certified is not None:
        distance = {key: _distances(model, x, y, correct, found, batch_size) for key, found in worst.items()}
    checks = {
        "certified_attacked_clean": audit.certified_attacked_clean(
            correct,
            {key: found.survived for key, found in worst.items()},
            certified_radius=certified,
            same_label=same,
            distance=distance,
        )
    }
    rows = correct.nonzero().squeeze(1)[:AUDIT_SAMPLES]
    sample, labels = x[rows], y[rows]
    if len(rows) == 0:
        return checks
    _, value, gradient = loss_and_gradient(model, sample, labels)
    flat = is_flat(value, gradient, min(threat.eps for threat in threats))
    return checks | {
        **_attack_order(model, sample, labels, rows, threats, outcomes, knowledge, seed),
        **_fresh_attacks(
            model, sample, labels, threats, knowledge, certified[rows] if certified is not None else None, seed
        ),
        **_longer_attacks(model, sample, labels, threats, knowledge, seed),
        "black_box_adds": _black_box(model, x, y, rows, threats, outcomes, certified, knowledge, seed),
        "finite_differences": audit.finite_differences(model, sample, labels, seed=seed),
        "zero_gradients": audit.zero_gradients(flat, surrogate=knowledge.smoothed is not None),
        "deterministic": audit.deterministic(model, sample),
        "batch_invariant": audit.batch_invariant(model, sample),
        **_inside(model, sample, [found.x_adv[rows] for found in worst.values()]),
    }


def _distances(model: nn.Module, x: Tensor, y: Tensor, correct: Tensor, found: Outcome, batch_size: int) -> Tensor:
    """L2 distance of the adversarial examples, pulled back as far as the label stays wrong; else infinite."""
    distance = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for rows in (correct & ~found.survived).nonzero().squeeze(1).split(batch_size):
        closest = shrink(model, x[rows], found.x_adv[rows], y[rows])
        distance[rows] = torch.linalg.vector_norm((closest.double() - x[rows].double()).flatten(1), dim=1)
    return distance


def _attack_order(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    threats: Sequence[ThreatModel],
    outcomes: dict[str, dict[str, Outcome]],
    knowledge: AttackerKnowledge,
    seed: int,
) -> dict[str, AuditCheck]:
    """Unrefined transfer, and noise, against what the white-box attacks found on the same samples."""
    noisy = {t.key: _survived(model, noise(model, x, y, t, seed=seed), y) for t in threats}
    moved: dict[str, Tensor] = {}
    # From the model itself there is nothing to transfer.
    if knowledge.backbone is not None and knowledge.backbone is not model:
        for threat in threats:
            x_adv = transfer(
                model, x, y, threat, source=knowledge.backbone, steps=AUDIT_STEPS, refine_steps=0, seed=seed
            )
            moved[threat.key] = _survived(model, x_adv, y)
    white = {key: alive[rows] for key, found in outcomes.items() if (alive := _white_box_survivors(found)) is not None}
    weaker = {key: [alive[key] for alive in (noisy, moved) if key in alive] for key in white}
    return {
        "attack_order": audit.attack_order(white, weaker),
        "transfer_over_noise": audit.transfer_over_noise(moved if knowledge.own_backbone else {}, noisy),
    }


def _white_box_survivors(found: dict[str, Outcome]) -> Tensor | None:
    """Which samples survived every white-box attack, None where there was none."""
    white = [outcome.survived for outcome in _white_box(found)]
    return torch.stack(white).all(dim=0) if white else None


def _white_box(found: dict[str, Outcome]) -> list[Outcome]:
    """White-box attacks; of those spared what others broke only the ones that no other kind of attack preceded."""
    chosen, alone = [], True
    for name, outcome in found.items():
        if ATTACKS[name].kind != "white":
            alone = False
        elif alone or not outcome.inherited:
            chosen.append(outcome)
    return chosen


def _fresh_attacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Sequence[ThreatModel],
    knowledge: AttackerKnowledge,
    certified: Tensor | None,
    seed: int,
) -> dict[str, AuditCheck]:
    """The first threat's norm attacked afresh at every budget, up to one where nothing may survive."""
    first = threats[0]
    large = _large_eps(x, y, first, knowledge, certified)
    alive: dict[float, Tensor] = {}
    for eps in [*(threat.eps for threat in threats if threat.norm == first.norm), large]:
        threat = ThreatModel(first.norm, eps, first.box)
        x_adv = exact_gradient(
            model, x, y, threat, smoothed=knowledge.smoothed, losses=("margin",), steps=AUDIT_STEPS, seed=seed
        )
        alive[eps] = _survived(model, x_adv, y)
    shares = {eps: float(a.double().mean()) for eps, a in alive.items()}
    left = alive[large]
    threat = ThreatModel(first.norm, large, first.box)
    more: list[Callable[..., Tensor]] = []
    if knowledge.x_train is not None and knowledge.y_train is not None:
        more.append(partial(lines, x_train=knowledge.x_train, y_train=knowledge.y_train))
    if knowledge.cells is not None:
        more.append(partial(nearest_cells, cells=knowledge.cells))
    for attack in more:
        if bool(left.any()):
            moved = attack(model, x[left], y[left], threat)
            left = left.masked_scatter(left, _survived(model, moved, y[left]))
    return {
        "never_rises": audit.never_rises(shares),
        "zero_at_large_eps": audit.zero_at_large_eps(float(left.double().mean()), large, first.norm),
    }


def _longer_attacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Sequence[ThreatModel],
    knowledge: AttackerKnowledge,
    seed: int,
) -> dict[str, AuditCheck]:
    """The middle budget attacked afresh with more and more steps, and restarts."""
    threat = sorted(threats, key=lambda t: (t.norm != threats[0].norm, t.eps))[_middle(threats)]

    def share(steps: int, restarts: int) -> float:
        x_adv = exact_gradient(
            model,
            x,
            y,
            threat,
            smoothed=knowledge.smoothed,
            losses=("margin",),
            steps=steps,
            restarts=restarts,
            seed=seed,
        )
        return float(_survived(model, x_adv, y).double().mean())

    by_steps = {float(steps): share(steps, 1) for steps in STEPS}
    by_restarts = {float(r): by_steps[AUDIT_STEPS] if r == 1 else share(AUDIT_STEPS, r) for r in RESTARTS}
    return {
        "never_rises_with_steps": audit.never_rises(by_steps, along="number of steps", n=len(x)),
        "never_rises_with_restarts": audit.never_rises(by_restarts, along="number of restarts", n=len(x)),
    }


def _middle(threats: Sequence[ThreatModel]) -> int:
    """Position of the middle budget of the first norm."""
    return (sum(t.norm == threats[0].norm for t in threats) - 1) // 2


def _black_box(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    threats: Sequence[ThreatModel],
    outcomes: dict[str, dict[str, Outcome]],
    certified: Tensor | None,
    knowledge: AttackerKnowledge,
    seed: int,
) -> AuditCheck:
    """Square, and HopSkipJump where foolbox is installed, on audited samples that no white-box attack broke."""
    threat = sorted(threats, key=lambda t: (t.norm != threats[0].norm, t.eps))[_middle(threats)]
    alive = _white_box_survivors(outcomes[threat.key])
    if alive is None:
        return audit.black_box_adds({}, queries=BLACK_BOX_QUERIES)
    # A sample that is proven safe at this budget cannot be broken; that is what another check is about.
    left = (
        alive[rows] & (certified[rows] <= threat.eps) if certified is not None and threat.norm == "l2" else alive[rows]
    )
    positions = left.nonzero().squeeze(1)[:BLACK_BOX_SAMPLES]
    attacks = {"Square": partial(autoattack, parts=("square",), square_queries=BLACK_BOX_QUERIES)}
    if find_spec("foolbox") is not None:
        train = {} if knowledge.x_train is None else {"x_train": knowledge.x_train, "y_train": knowledge.y_train}
        attacks["HopSkipJump"] = partial(decision_based, queries=BLACK_BOX_QUERIES, **train)
    added = {name: torch.zeros(len(rows), dtype=torch.bool, device=x.device) for name in attacks}
    if len(positions):
        sample, labels = x[rows[positions]], y[rows[positions]]
        for name, attack in attacks.items():
            x_adv = attack(model, sample, labels, threat, seed=seed)
            added[name][positions] = ~_survived(model, x_adv, labels)
    return audit.black_box_adds(added, queries=BLACK_BOX_QUERIES)


def _inside(model: nn.Module, x: Tensor, adversarial: Sequence[Tensor]) -> dict[str, AuditCheck]:
    """What an OTAD model shows of its inside, at the samples and at the worst examples of every budget."""
    if not isinstance(model, OTAD):
        return {}
    with torch.no_grad():
        clean = model.features(x).stats
        attacked = [model.features(x_adv).stats for x_adv in adversarial]
    checks = {
        "active_set": audit.active_set(
            _active(clean["weights"]), torch.cat([_active(stats["weights"]) for stats in attacked])
        )
    }
    if model.retrieval_space is not None:
        before = clean["indices"].sort(dim=1).values
        changed = [(stats["indices"].sort(dim=1).values != before).any(dim=1) for stats in attacked]
        checks["neighbor_changes"] = audit.neighbor_changes(torch.cat(changed))
    return checks


def _active(weights: Tensor) -> Tensor:
    return (weights > 1e-9).sum(dim=1).double()


def _large_eps(
    x: Tensor, y: Tensor, threat: ThreatModel, knowledge: AttackerKnowledge, certified: Tensor | None
) -> float:
    """A budget that reaches training samples of other classes, or else covers the box or the spread of x.

    And one within which nothing is certified: a model may be sure of its label where samples of other classes lie.
    """
    reach = 0.0
    if knowledge.x_train is not None and knowledge.y_train is not None:
        for sample, label in zip(x, y, strict=True):
            others = knowledge.x_train[knowledge.y_train != label]
            if len(others):
                reach = max(reach, float(threat.distance(others, sample[None].expand_as(others)).min()))
    if reach == 0.0:
        width = threat.box[1] - threat.box[0] if threat.box is not None else 10 * max(float(x.std()), threat.eps)
        reach = width * (x[0].numel() ** 0.5 if threat.norm == "l2" else 1.0)
    finite = [] if certified is None else certified[certified.isfinite()].tolist()
    proven = max(finite, default=0.0) / (1.0 if threat.norm == "l2" else x[0].numel() ** 0.5)
    return 1.05 * max(reach, threat.eps, proven)


def _survived(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x_adv).argmax(dim=1) == y
