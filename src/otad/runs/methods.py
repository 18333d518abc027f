"""The methods a comparison knows: OTAD under a budget of training time, and the rivals, behind one signature."""

import functools
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.baselines import BASELINES, NearestNeighbor
from otad.certificate import Certificate, certify
from otad.data.splits import held_out, stratified_subset
from otad.defense import OTAD, CellInterpolation, NeighborhoodInterpolation, identity_head
from otad.errors import MissingExtraError
from otad.estimator import OTADClassifier
from otad.fitting import train_cells, usual_cells
from otad.nn import BACKBONES, CenteredFlatten
from otad.runs.opponents import relatives, retrieval_space
from otad.train import Deformations, imitate, usual_epochs

__all__ = ["METHODS", "Fit", "Fitted", "fit_cells", "fit_otad", "method_named"]

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


class Cells(NamedTuple):
    """Settings of a power diagram that may be chosen.

    Attributes:
        pieces: of a class in the mean; None: as many as `usual_cells` in all.
        deformed: how images are while training: "usual" or "gentle", as `Deformations` names them, or None.
        reach: of the loss, times the threat's radius.
        temperature: of the loss, see `refine_diagram`.
        encoder: below the pieces: "dense", "patches" or None, as `OTADClassifier` names them.
        components: principal ones that are kept; None: all.
        ramp: of the loss, see `refine_diagram`.
    """

    pieces: int | None
    deformed: str | None
    reach: float
    temperature: float
    encoder: str | None = None
    components: int | None = None
    ramp: float | None = None


# Likewise in order, though none need be the estimator's default. Few pieces and a high temperature learn less by heart,
# which small tables need; pieces of photographs want an encoder below them, while those of grey images live by the box,
# which an encoder does not keep.
CELLS_OF_GREY_IMAGES = (
    Cells(None, None, 1.0, 0.16),
    Cells(None, "usual", 1.0, 0.16),
    Cells(None, "gentle", 1.0, 0.12, ramp=1.0),
    Cells(50, "usual", 1.0, 0.16),
)
CELLS_OF_PHOTOGRAPHS = (Cells(1, "usual", 1.7, 1.7, "patches"),)
CELLS_OF_TABLES = (
    Cells(4, None, 1.6, 0.25),
    Cells(1, None, 1.6, 0.25, "dense", ramp=1.0),
    Cells(10, None, 1.6, 0.5),
    Cells(100, None, 1.0, 0.25),
    Cells(1, None, 2.5, 0.3, "dense"),
    Cells(30, None, 1.6, 0.5),
    Cells(1, None, 1.6, 0.5, "dense"),
    Cells(1, None, 1.6, 0.25, "dense"),
    Cells(10, None, 1.0, 0.5),
    Cells(None, None, 1.0, 0.16),
)
# Before those: what varies in so many columns, as expressions of genes do, is mostly noise.
CELLS_OF_WIDE_TABLES = (
    Cells(1, None, 1.6, 0.5, "dense", components=20),
    Cells(4, None, 1.6, 0.25, components=20),
    Cells(1, None, 1.6, 0.5, "dense", components=50),
    Cells(10, None, 1.6, 0.5, components=50),
)
WIDE = 200  # columns
VALIDATION_SHARE = 0.2
TIMED = 32  # samples certified to learn the time of it
LEAST_STEPS = 500  # as the estimator: a small data set gets more epochs than a large one
LEAST_EPOCHS = 12
MEASURED_CELLS = 1000  # held-out samples that cells are chosen by in a round
ROUNDS = 4
COUNTED = 1.6  # times the threat's radius: up to it a certified radius counts in that choice
TIMED_CELLS = 2048  # samples of the epoch that tells the time of training
TRIAL_PROBLEMS, MOST_PROBLEMS = 512, 50_000


@dataclass(frozen=True)
class Fitted:
    """A trained method, ready to be measured.

    Attributes:
        module: inputs -> logits.
        certify: inputs -> certificate with class indices as labels; None where the method has none.
        facts: what the training says of itself, in the types of JSON.
        knowledge: what an attacker knows of the model beside its weights; the comparison adds the training samples,
            and an undefended network where there is no backbone.
    """

    module: nn.Module
    certify: Callable[[Tensor], Certificate] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    knowledge: AttackerKnowledge = field(default_factory=AttackerKnowledge)


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


def fit_cells(
    x: Tensor, y: Tensor, threat: ThreatModel, *, minutes: float, seed: int = 0, progress: bool = False
) -> Fitted:
    """A power diagram trained for its certificate at the threat's radius, within a budget of training time.

    One epoch over some samples tells the time of training. Then each of the settings for such data is trained on four
    fifths of the training samples, for a fifth of the usual epochs or for more where that takes less than a quarter of
    the budget for all, and certified on the rest (at most 1,000); its score is the mean of the certified radius, 0 for
    wrong labels and at most 1.6 times the threat's. The better half goes on to another round, with other held-out
    samples and twice the epochs (at most the usual ones), and so on; the one with the best mean over all rounds is
    taken. What would not leave the time of the usual epochs, or half of the budget, for the final training is left out:
    the last settings of the first round, and later rounds as a whole. Images are certified for perturbations that stay
    images where there is no encoder.

    Args:
        x: training samples, (n, ...).
        y: their classes 0, 1, ..
        threat: its radius is what is trained for, its box holds the perturbations.
        minutes: the budget.
        seed: of the held-out samples, the pieces and the order of the batches.
        progress: show progress bars.
    """
    deadline, classes = time.perf_counter() + 60 * minutes, int(y.max()) + 1
    candidates = _cells_for(x)

    def trained(rows: Tensor, tried: Cells, epochs: int) -> tuple[OTAD, dict[str, Any]]:
        inputs, labels = x[rows], y[rows]
        stem, found, pieces = train_cells(
            CenteredFlatten(inputs.mean(0)),
            inputs,
            labels,
            torch.arange(len(labels)),
            labels,
            most=usual_cells(len(y)) if tried.pieces is None else tried.pieces * classes,
            encoder=tried.encoder,
            components=tried.components,
            target_radius=tried.reach * threat.eps,
            temperature=tried.temperature,
            ramp=tried.ramp,
            epochs=epochs,
            augment=getattr(Deformations, tried.deformed)(x) if tried.deformed else None,
            box=None if tried.encoder else threat.box,
            seed=seed,
            progress=progress,
        )
        module = OTAD(stem, CellInterpolation(found.diagram), identity_head(classes))
        facts = {
            "pieces": len(pieces),
            "epochs": len(found.history),
            "seconds": found.history[-1].seconds,
            "before": found.before,
            "after": found.after,
        }
        return module, facts

    every = torch.arange(len(y))
    some = torch.from_numpy(stratified_subset(y.numpy(), min(len(y), TIMED_CELLS), seed))
    most = max(candidates, key=_cost)
    epoch = float(trained(some, most, 1)[1]["seconds"]) / len(some) * len(y)
    usual = usual_epochs(len(y))
    left = deadline - time.perf_counter()
    brief = max(1, usual // 5, min(usual, math.floor(left / 4 / (len(candidates) * epoch))))
    latest = deadline - min(usual * epoch, left / 2)  # for the final training to begin
    seconds: dict[Cells, float] = {}  # of an epoch over all samples

    def score(tried: Cells, turn: int, epochs: int) -> float:
        held = torch.from_numpy(held_out(y.numpy(), VALIDATION_SHARE, seed + turn))
        measured = every[held]
        measured = measured[stratified_subset(y[measured].numpy(), min(len(measured), MEASURED_CELLS), seed)]
        module, facts = trained(every[~held], tried, epochs)
        seconds[tried] = facts["seconds"] / epochs * len(y) / int((~held).sum())
        certificate = certify(module, x[measured], box=threat.box)
        right = certificate.label == y[measured].numpy()
        return float((right * certificate.radius.clip(max=COUNTED * threat.eps)).mean())

    scores = _rounds(candidates, score, brief, usual, brief * epoch, latest) if len(candidates) > 1 else {}
    chosen = max(scores, key=lambda tried: (len(scores[tried]), mean(scores[tried])), default=candidates[0])
    epochs = max(1, min(usual, math.floor((deadline - time.perf_counter()) / seconds.get(chosen, epoch))))
    if epochs < usual:
        logger.warning("%g minutes are enough for %d of the usual %d epochs", minutes, epochs, usual)
    module, facts = trained(every, chosen, epochs)
    facts |= {"settings": chosen._asdict(), "train_accuracy": facts["after"]["accuracy"]}
    facts["validation"] = [
        tried._asdict() | {"mean_radius": mean(found), "rounds": len(found)} for tried, found in scores.items()
    ]
    knowledge = AttackerKnowledge(smoothed=module.smoothed)
    return Fitted(module, functools.partial(certify, module, box=threat.box), facts, knowledge)


def _rounds(
    candidates: Sequence[Cells],
    score: Callable[[Cells, int, int], float],
    epochs: int,
    most: int,
    expected: float,
    latest: float,
) -> dict[Cells, list[float]]:
    """Scores of each candidate in the rounds that it took part in: the better half of a round goes on to the next.

    Args:
        candidates: in the order they are tried.
        score: (candidate, round, epochs) -> score.
        epochs: of the first round; each has twice those of the one before.
        most: epochs of any round.
        expected: seconds of the first candidate.
        latest: when all must be done, by `time.perf_counter`.
    """
    scores: dict[Cells, list[float]] = {}
    rivals, lasted = list(candidates), dict.fromkeys(candidates, 0.0) | {candidates[0]: expected}
    for turn in range(ROUNDS):
        if turn and time.perf_counter() + sum(lasted[tried] for tried in rivals) > latest:
            break
        for tried in rivals:
            if (began := time.perf_counter()) + max(lasted.values()) * (turn == 0) > latest:
                continue
            scores.setdefault(tried, []).append(score(tried, turn, epochs))
            lasted[tried] = time.perf_counter() - began
        rivals = sorted((tried for tried in rivals if tried in scores), key=lambda tried: -mean(scores[tried]))
        rivals = rivals[: math.ceil(len(rivals) / 2)]
        if len(rivals) < 2:
            break
        longer = min(most, 2 * epochs)
        lasted = {tried: lasted[tried] * longer / epochs for tried in rivals}
        epochs = longer
    return scores


def _cost(tried: Cells) -> tuple[str, bool, bool, str]:
    """Grows with the time of an epoch."""
    return tried.encoder or "", tried.pieces is None, tried.components is None, tried.deformed or ""


def _cells_for(x: Tensor) -> Sequence[Cells]:
    """Settings to choose among, by the kind of data."""
    if x.ndim != 4:
        return (*CELLS_OF_WIDE_TABLES, *CELLS_OF_TABLES) if x.shape[1] >= WIDE else CELLS_OF_TABLES
    return CELLS_OF_GREY_IMAGES if x.shape[1] == 1 else CELLS_OF_PHOTOGRAPHS


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
