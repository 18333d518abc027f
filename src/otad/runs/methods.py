"""The methods a comparison knows: OTAD under a budget of training time, and the rivals, behind one signature."""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from otad.attacks.threat_model import ThreatModel
from otad.baselines import BASELINES
from otad.certificate import Certificate, certify
from otad.data.splits import stratified_split
from otad.estimator import OTADClassifier

__all__ = ["METHODS", "Fit", "Fitted", "fit_otad"]

logger = logging.getLogger("otad.runs")

# What may be chosen on validation samples where the budget allows it; the first is the estimator's own default.
CANDIDATES: tuple[dict[str, float], ...] = (
    {"alpha": 1e-3, "margin": 0.5},
    {"alpha": 1e-3, "margin": 0.0},
    {"alpha": 1e-2, "margin": 0.5},
    {"alpha": 1e-2, "margin": 0.0},
)
VALIDATION_SHARE = 0.2
LEAST_STEPS = 500  # as the estimator: a small data set gets more epochs than a large one
LEAST_EPOCHS = 12


@dataclass(frozen=True)
class Fitted:
    """A trained method, ready to be measured.

    Attributes:
        module: inputs -> logits.
        certify: inputs -> certificate with class indices as labels; None where the method has none.
        facts: what the training says of itself, in the types of JSON.
        backbone: a network of the method's own from which attacks transfer; None: the comparison's.
        smoothed: factor -> surrogate with wider smoothing, see `AttackerKnowledge`.
    """

    module: nn.Module
    certify: Callable[[Tensor], Certificate] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    backbone: nn.Module | None = None
    smoothed: Callable[[float], nn.Module] | None = None


# (x, y, threat, *, minutes, seed, progress) -> Fitted: x (n, ...), y class indices 0, 1, .. (n,).
Fit = Callable[..., Fitted]


def fit_otad(
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
    interpolation: str = "global",
) -> Fitted:
    """OTAD within a budget of training time.

    A trial of two epochs tells the seconds of an epoch. Where the budget holds the usual number of epochs for every
    one of `CANDIDATES` and for the final training, the candidate of the largest certified accuracy at the threat's
    radius is taken (ties: clean accuracy), measured on a fifth of the training samples that it was not trained on;
    else the estimator's defaults, with as many epochs as fit. Trial and choice count as training time.

    Args:
        x: training samples, (n, ...).
        y: their classes 0, 1, ..
        threat: its radius is what the settings are chosen for.
        minutes: the budget.
        seed: of the held-out samples, the weights and the order of the batches.
        progress: show progress bars.
        interpolation: "global" or "neighborhood".
    """
    started, inputs, labels = time.perf_counter(), x.numpy(), y.numpy()

    def left() -> float:
        return 60 * minutes - (time.perf_counter() - started)

    common = {"interpolation": interpolation, "random_state": seed, "verbose": progress}
    trial = OTADClassifier(epochs=2, **common).fit(inputs, labels)
    # The second epoch, because the first also pays for what is set up once.
    epoch = trial.history_[1]["seconds"] - trial.history_[0]["seconds"]
    rest = trial.seconds_["transport map"] + trial.seconds_["potential"]
    usual = _usual_epochs(len(y), trial.batch_size)
    chosen, scores = CANDIDATES[0], {}
    if left() > (len(CANDIDATES) + 1) * (usual * epoch + rest):
        chosen, scores = _choose(inputs, labels, threat.eps, epochs=usual, seed=seed, common=common)
    epochs = max(1, min(usual, math.floor((left() - rest) / epoch)))
    if epochs < usual:
        logger.warning("%g minutes are enough for %d of the usual %d epochs", minutes, epochs, usual)
    clf = OTADClassifier(epochs=epochs, **chosen, **common).fit(inputs, labels)
    facts: dict[str, Any] = {"epochs": epochs, "train_accuracy": clf.history_[-1]["accuracy"], "settings": chosen}
    if scores:
        facts["validation"] = scores
    if clf.lipschitz_ is not None:
        facts["lipschitz"] = float(clf.lipschitz_)
    module = clf.module_
    return Fitted(module, functools.partial(certify, module), facts, backbone=clf.backbone_, smoothed=module.smoothed)


def _usual_epochs(n: int, batch_size: int) -> int:
    return max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(n / batch_size)))


def _choose(
    x: np.ndarray, y: np.ndarray, eps: float, *, epochs: int, seed: int, common: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The best candidate on held-out training samples, and [certified, clean] accuracy of each."""
    held_out = _held_out(y, seed)
    scores = []
    for candidate in CANDIDATES:
        clf = OTADClassifier(epochs=epochs, **candidate, **common).fit(x[~held_out], y[~held_out])
        certificate = clf.certify(x[held_out])
        clean = float(np.mean(certificate.label == y[held_out]))
        scores.append([certificate.certified(eps, y[held_out]), clean])
    best = max(range(len(scores)), key=lambda i: scores[i])
    names = [", ".join(f"{k} {v:g}" for k, v in candidate.items()) for candidate in CANDIDATES]
    return CANDIDATES[best], dict(zip(names, scores))


def _held_out(y: np.ndarray, seed: int) -> np.ndarray:
    """A fifth of every class with at least two samples, bool (n,)."""
    counts = np.bincount(y)
    divisible = np.flatnonzero(counts[y] > 1)
    held_out = np.zeros(len(y), dtype=bool)
    held_out[divisible] = stratified_split(y[divisible], VALIDATION_SHARE, seed, "training samples")
    return held_out


def _rival(fit: Callable[..., nn.Module]) -> Fit:
    """A baseline in the comparison's signature; its certificate is a method of its module, where it has one."""

    def fitted(x: Tensor, y: Tensor, threat: ThreatModel, **options: Any) -> Fitted:
        module = fit(x, y, threat, **options)
        return Fitted(module, getattr(module, "certify", None), dict(getattr(module, "fitted", {})))

    return fitted


METHODS: dict[str, Fit] = {
    "otad-global": functools.partial(fit_otad, interpolation="global"),
    "otad-neighborhood": functools.partial(fit_otad, interpolation="neighborhood"),
    **{name: _rival(fit) for name, fit in BASELINES.items()},
}
