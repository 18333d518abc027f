"""evaluate: one model, one test set, several budgets, many attacks -> Report."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otad.attacks.gradients import frozen
from otad.attacks.kept import KeptResults
from otad.attacks.sets import choose
from otad.attacks.suite import Outcome, run_attacks, worst_case
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.certificate import Certificate
from otad.evaluation.evidence import gather
from otad.evaluation.inputs import as_tensors, check_inputs, on_device
from otad.report import Report
from otad.results import ExampleResults

__all__ = ["evaluate"]

Outcomes = dict[str, dict[str, Outcome]]


def evaluate(
    model: nn.Module,
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    threats: Sequence[ThreatModel],
    attacks: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = "standard",
    seed: int = 0,
    *,
    certificate: Certificate | None = None,
    knowledge: AttackerKnowledge | None = None,
    name: str = "model",
    data: str = "",
    n_train: int | None = None,
    n_attacked: int | None = None,
    batch_size: int = 500,
    progress: bool = False,
    examples: bool = True,
    results_dir: str | os.PathLike[str] | None = None,
) -> Report:
    """Clean, certified and attacked accuracy of a classifier, and the audit that says whether to believe
    them.

    An adversarial example found for a small budget counts for every larger one of the same norm, so the worst
    case never rises with the budget; budgets are therefore attacked in growing order, each going on with the
    samples the last one left.

    Args:
        model: inputs -> logits. Attacked in evaluation mode on its own device; left as it was.
        x: test samples in the shape the model takes, (n, ...), inside the boxes of the threats.
        y: their true class indices, (n,).
        threats: the budgets, each (norm, eps) once.
        attacks: "quick", "demo", "standard", "strong", names of attacks, or names with settings.
        seed: of all random numbers.
        certificate: labels (class indices) and L2 radii of all n samples; rows of kind "conditional" count as
            not certified. Certified samples are spared the longer attacks.
        knowledge: what the attacker knows beside the model; attacks of a named set that lack a part are left
            out, and `extra["attacks_left_out"]` says why.
        name: of the model, for the report.
        data: name of the data set, for the report.
        n_train: number of training samples, for the report.
        n_attacked: attack only the first so many samples; clean and certified accuracy are over all.
        batch_size: samples a forward pass.
        progress: show progress bars.
        examples: keep the results of every sample in `Report.examples`; arrays of attacks have `n_attacked`
            rows.
        results_dir: a folder in which the result of every finished attack is kept; what is already there, for the same
            model, samples, settings and seed, is not run again (see `KeptResults`).

    Returns:
        the report, without rivals.

    Raises:
        ValueError: no samples, lengths or shapes that disagree, values that are not finite, labels out of
            range, samples outside a box, a budget named twice, an unknown attack, logits that are not finite, a
            certificate of kind "randomised".
        MissingExtraError: an attack's package is not installed.
    """
    knowledge = (knowledge or AttackerKnowledge()).about(model)
    x, y = as_tensors(model, x, y)
    check_inputs(x, y, threats, certificate, n_attacked)
    chosen, left_out = choose(attacks, knowledge)
    attacked = len(x) if n_attacked is None else min(n_attacked, len(x))
    knowledge = on_device(knowledge, x)
    with frozen(model, knowledge.backbone, *knowledge.relatives):
        began = time.perf_counter()
        predicted = _predict(model, x, y, batch_size)
        seconds = {"predict": time.perf_counter() - began}
        radius = None if certificate is None else certificate.proven
        certified = _certified(certificate, radius, y.cpu().numpy(), threats)
        began = time.perf_counter()
        outcomes = _attack(
            model,
            x[:attacked],
            y[:attacked],
            threats,
            chosen,
            knowledge,
            batch_size,
            seed,
            progress,
            certified,
            results_dir,
        )
        seconds["attack"] = time.perf_counter() - began
        began = time.perf_counter()
        checks = gather(
            model,
            x[:attacked],
            y[:attacked],
            predicted[:attacked],
            threats,
            outcomes,
            certificate,
            radius,
            knowledge,
            batch_size,
            seed,
        )
        seconds["audit"] = time.perf_counter() - began
    truth, guess = y.cpu().numpy(), predicted.cpu().numpy()
    extra: dict[str, Any] = {"attacks": {k: dict(v) for k, v in chosen.items()}, "n_attacked": attacked}
    if left_out:
        extra["attacks_left_out"] = left_out
    notes = {attack: o.note for found in outcomes.values() for attack, o in found.items() if o.note}
    if notes:
        extra["attack_notes"] = notes
    if attacked < len(x):
        extra["attacked_subset"] = {
            "clean_accuracy": float((guess == truth)[:attacked].mean()),
            "certified_accuracy": {key: float(ok[:attacked].mean()) for key, ok in certified.items()},
        }
    return Report(
        name=name,
        data=data,
        n_train=n_train,
        n_test=len(x),
        seed=seed,
        clean_accuracy=float((guess == truth).mean()),
        certified_accuracy={key: float(ok.mean()) for key, ok in certified.items()},
        robust_accuracy={key: _shares(found) for key, found in outcomes.items()},
        audit=checks,
        smoothness=_number(model, "smoothness"),
        lipschitz=_number(model, "lipschitz"),
        seconds=seconds,
        versions=package_versions(),
        attack_cost=_cost(outcomes),
        extra=extra,
        examples=_examples(truth, guess, radius, outcomes) if examples else None,
    )


def _predict(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(batch_size)])
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model returns logits that are not finite; accuracy under attack would mean nothing")
    if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"y must lie in 0..{logits.shape[1] - 1}, the model's classes; "
            f"it reaches from {int(y.min())} to {int(y.max())}"
        )
    return logits.argmax(dim=1)


def _attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Sequence[ThreatModel],
    chosen: Mapping[str, Mapping[str, Any]],
    knowledge: AttackerKnowledge,
    batch_size: int,
    seed: int,
    progress: bool,
    certified: Mapping[str, np.ndarray],
    results_dir: str | os.PathLike[str] | None,
) -> Outcomes:
    """Outcomes in the order of `threats`; smaller budgets go first and hand on what they broke."""
    kept = None
    if results_dir is not None:
        kept = KeptResults(results_dir, model, x, y, knowledge, seed=seed, batch_size=batch_size)
    found: Outcomes = {}
    last: dict[tuple[str, tuple[float, float] | None], dict[str, Outcome]] = {}
    for threat in sorted(threats, key=lambda t: (t.norm, t.eps)):
        found[threat.key] = run_attacks(
            model,
            x,
            y,
            threat,
            chosen,
            knowledge=knowledge,
            previous=last.get((threat.norm, threat.box)),
            proven=torch.from_numpy(certified[threat.key][: len(x)]) if threat.key in certified else None,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            kept=kept,
        )
        last[threat.norm, threat.box] = found[threat.key]
    return {threat.key: found[threat.key] for threat in threats}


def _certified(
    certificate: Certificate | None, radius: np.ndarray | None, y: np.ndarray, threats: Sequence[ThreatModel]
) -> dict[str, np.ndarray]:
    """L2 budget -> whether each sample is right and certified to it."""
    if certificate is None or radius is None:
        return {}
    right = np.asarray(certificate.label) == y
    return {threat.key: right & (radius > threat.eps) for threat in threats if threat.norm == "l2"}


def _shares(found: Mapping[str, Outcome]) -> dict[str, float]:
    shares = {name: float(outcome.survived.double().mean()) for name, outcome in found.items()}
    return shares | {"worst_case": float(worst_case(found).survived.double().mean())}


def _cost(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    cost: dict[str, dict[str, float]] = {}
    for found in outcomes.values():
        for name, outcome in found.items():
            spent = cost.setdefault(name, {"seconds": 0.0, "queries": 0.0})
            spent["seconds"] += outcome.seconds
            spent["queries"] += outcome.queries
    return cost


def _examples(y: np.ndarray, predicted: np.ndarray, radius: np.ndarray | None, outcomes: Outcomes) -> ExampleResults:
    worst = {key: worst_case(found) for key, found in outcomes.items()}
    return ExampleResults(
        y=y,
        predicted=predicted,
        certified_radius=radius,
        adversarial={key: found.x_adv.cpu().numpy() for key, found in worst.items()},
        survived={
            key: {name: outcome.survived.cpu().numpy() for name, outcome in found.items()}
            | {"worst_case": worst[key].survived.cpu().numpy()}
            for key, found in outcomes.items()
        },
    )


def _number(model: nn.Module, attribute: str) -> float | None:
    value = getattr(model, attribute, None)
    return float(value) if isinstance(value, int | float) else None


def package_versions() -> dict[str, str]:
    """Of Python and what figures depend on."""
    versions = {"python": platform.python_version()}
    for package in ("otad", "torch", "numpy", "pyautoattack", "foolbox"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
