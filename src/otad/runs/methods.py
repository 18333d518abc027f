"""The methods a comparison knows: OTAD under a budget of training time, and the rivals, behind one signature."""

import functools
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.baselines import BASELINES, NearestNeighbor
from otad.certificate import certify
from otad.data.splits import held_out
from otad.defense import NeighborhoodInterpolation
from otad.errors import MissingExtraError
from otad.estimator import OTADClassifier
from otad.nn import BACKBONES
from otad.runs.diagrams import fit_cells
from otad.runs.fitted import Fit, Fitted
from otad.runs.opponents import relatives, retrieval_space
from otad.train import imitate

__all__ = ["METHODS", "fit_otad", "method_named"]

logger = logging.getLogger("otad.runs")


class Candidate(NamedTuple):
    """Settings of OTAD that may be chosen; `longer` multiplies the usual number of epochs."""

    alpha: float
    margin: float
    longer: int


# In the order they are tried while the budget lasts; the first is the estimator's default.
CANDIDATES = (
    Candidate(1e-3, 0.5, 1),
    Candidate(1e-2, 0.5, 1),
    Candidate(1e-3, 0.0, 1),
    Candidate(1e-3, 0.5, 4),
    Candidate(1e-2, 0.5, 4),
)
VALIDATION_SHARE = 0.2
TIMED = 32  # samples certified to learn the time of it
LEAST_STEPS = 500  # as the estimator: a small data set gets more epochs than a large one
LEAST_EPOCHS = 12
TRIAL_PROBLEMS, MOST_PROBLEMS = 512, 50_000


def fit_otad(
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    minutes: float,
    seed: int = 0,
    progress: bool = False,
    interpolation: str = "global",
    backbone: str = "mlp",
) -> Fitted:
    """OTAD within a budget of training time.

    A trial of two epochs tells the seconds of an epoch, and of certifying. Then each of `CANDIDATES` is trained on four
    fifths of the training samples and measured on the rest, as long as the budget holds that and the final training;
    the one of the largest certified accuracy at the threat's radius is taken (ties: clean accuracy). Where it holds not
    even the first, that one is taken with as many epochs as fit. All of this counts as training time. A network
    imitates the settings that "neighborhood" would choose, from as many solved problems as a third of the budget holds.

    Args:
        x: training samples, (n, ...).
        y: their classes 0, 1, ..
        threat: its radius is what the settings are chosen for.
        minutes: the budget.
        seed: of the held-out samples, the weights and the order of the batches.
        progress: show progress bars.
        interpolation: "global", "neighborhood" or "network".
        backbone: name of the network, in its default size.
    """
    deadline = time.perf_counter() + 60 * minutes
    inputs, labels = x.numpy(), y.numpy()
    network = interpolation == "network"
    common: dict[str, Any] = {"backbone": backbone, "random_state": seed, "verbose": progress}
    common["interpolation"] = interpolation
    final = dict(common)
    if network:
        common["interpolation"] = "neighborhood"
    trial = OTADClassifier(epochs=2, **common).fit(inputs, labels)
    # The second epoch, because the first also pays for what is set up once.
    epoch = trial.history_[1]["seconds"] - trial.history_[0]["seconds"]
    rest = trial.seconds_["transport map"] + trial.seconds_["potential"]
    if network:
        problem = _seconds_to_imitate(trial, seed) / TRIAL_PROBLEMS
        final["network_problems"] = max(TRIAL_PROBLEMS, min(MOST_PROBLEMS, int(20 * minutes / problem)))
        rest += problem * final["network_problems"]
    usual = max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / math.ceil(len(y) / trial.batch_size)))

    started = time.perf_counter()
    trial.certify(inputs[:TIMED])
    scoring = (time.perf_counter() - started) / min(TIMED, len(y)) * VALIDATION_SHARE * len(y)

    def cost(candidate: Candidate) -> float:
        return usual * candidate.longer * epoch + rest

    chosen, scores = CANDIDATES[0], {}
    for candidate in CANDIDATES:
        if time.perf_counter() + cost(candidate) + scoring + max(cost(candidate), cost(chosen)) < deadline:
            scores[candidate] = _score(inputs, labels, threat.eps, usual, candidate, seed, common)
            chosen = max(scores, key=lambda tried: scores[tried])
    affordable = math.floor((deadline - time.perf_counter() - rest) / epoch)
    epochs = max(1, min(usual * chosen.longer, affordable))
    if epochs < usual:
        logger.warning("%g minutes are enough for %d of the usual %d epochs", minutes, epochs, usual)
    clf = OTADClassifier(epochs=epochs, alpha=chosen.alpha, margin=chosen.margin, **final).fit(inputs, labels)
    facts: dict[str, Any] = {
        "epochs": epochs,
        "train_accuracy": clf.history_[-1]["accuracy"],
        "settings": chosen._asdict(),
        "validation": [
            tried._asdict() | {"certified": certified, "clean": clean} for tried, (certified, clean) in scores.items()
        ],
        "lipschitz": None if clf.lipschitz_ is None else float(clf.lipschitz_),
    }
    module = clf.module_
    knowledge = AttackerKnowledge(
        backbone=clf.backbone_,
        smoothed=module.smoothed,
        embedding=retrieval_space(clf),
        relatives=relatives(clf),
    )
    if network:
        return Fitted(module, None, facts | {"network": clf.network_error_}, knowledge)
    return Fitted(module, functools.partial(certify, module), facts, knowledge)


def _seconds_to_imitate(trial: OTADClassifier, seed: int) -> float:
    """What it takes a network to imitate the neighbourhoods of a model, from `TRIAL_PROBLEMS` of them."""
    solver = trial.module_.interpolation
    assert isinstance(solver, NeighborhoodInterpolation)
    started = time.perf_counter()
    imitate(solver, trial.backbone_.head, n_problems=TRIAL_PROBLEMS, seed=seed)
    return time.perf_counter() - started


def _score(
    x: np.ndarray, y: np.ndarray, eps: float, usual: int, candidate: Candidate, seed: int, common: Mapping[str, Any]
) -> tuple[float, float]:
    """Certified and clean accuracy on held-out training samples."""
    held = held_out(y, VALIDATION_SHARE, seed)
    clf = OTADClassifier(epochs=usual * candidate.longer, alpha=candidate.alpha, margin=candidate.margin, **common).fit(
        x[~held], y[~held]
    )
    certificate = clf.certify(x[held])
    return certificate.certified(eps, y[held]), float(np.mean(certificate.label == y[held]))


def _rival(fit: Callable[..., nn.Module]) -> Fit:
    """A baseline in the comparison's signature; its certificate is a method of its module, where it has one."""

    def fitted(x: Tensor, y: Tensor, threat: ThreatModel, **options: Any) -> Fitted:
        module = fit(x, y, threat, **options)
        certificate = getattr(module, "certify", None)
        if isinstance(module, NearestNeighbor):
            certificate = functools.partial(module.certify, box=threat.box)
        return Fitted(module, certificate, dict(getattr(module, "fitted", {})))

    return fitted


def method_named(name: str) -> Fit:
    """A method by name, or METHOD@BACKBONE for one that trains OTAD's backbone, such as "pgd@resnet".

    Raises:
        ValueError: no such method or backbone, or a method that trains no backbone.
        MissingExtraError: its package is not installed.
    """
    method, _, backbone = name.partition("@")
    if method not in METHODS or ("@" in name and backbone not in BACKBONES):
        known = f"{', '.join(METHODS)}; with @{', @'.join(BACKBONES)} behind it: {', '.join(ON_A_BACKBONE)}"
        raise ValueError(f"unknown method {name!r}; known: {known}")
    if method == "lipschitz" and importlib.util.find_spec("deel") is None:
        raise MissingExtraError("deel-torchlip", "rivals")  # before any work, not after the methods before it
    if not backbone:
        return METHODS[method]
    if method not in ON_A_BACKBONE:
        raise ValueError(f"{method!r} does not train OTAD's backbone: leave @{backbone} out")
    return functools.partial(METHODS[method], backbone=backbone)


METHODS: dict[str, Fit] = {
    "otad-global": functools.partial(fit_otad, interpolation="global"),
    "otad-neighborhood": functools.partial(fit_otad, interpolation="neighborhood"),
    "otad-network": functools.partial(fit_otad, interpolation="network"),
    "otad-cells": fit_cells,
    **{name: _rival(fit) for name, fit in BASELINES.items()},
}
ON_A_BACKBONE = ("otad-global", "otad-neighborhood", "otad-network", "undefended", "pgd", "trades", "smoothing")
