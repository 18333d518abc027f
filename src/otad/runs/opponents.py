"""The models of a run, each measured in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from otad.attacks.sets import ATTACKS
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.baselines.nearest import NearestNeighbor
from otad.certificate import Certificate, certify
from otad.data import Dataset
from otad.estimator import OTADClassifier
from otad.evaluation import evaluate, package_versions
from otad.report import Report
from otad.results import ExampleResults

__all__ = [
    "Opponent",
    "assess",
    "backbone_opponent",
    "map_opponent",
    "model_opponent",
    "nearest_opponent",
    "relatives",
    "retrieval_space",
    "solved_opponent",
]


@dataclass(frozen=True)
class Opponent:
    """A model to measure.

    Attributes:
        name: how tables call it.
        module: inputs -> logits.
        certificate: of every test sample, with class indices as labels; None where the model has none.
        smoothed: whether the attacker's smoothed surrogate, retrieval space and relatives belong to this model.
        within: what perturbations the certificate is about, where not any.
    """

    name: str
    module: nn.Module
    certificate: Certificate | None = None
    smoothed: bool = False
    within: str = ""


def model_opponent(clf: OTADClassifier, x: np.ndarray, box: tuple[float, float] | None) -> Opponent:
    """The defended classifier, certified on the samples x, cells within the box; a network has no certificate."""
    if clf.interpolation == "network":
        return Opponent("OTAD, CIP-net", clf.module_, smoothed=True)
    certificate = clf.certify(x, box=box)
    index = {label: i for i, label in enumerate(clf.classes_.tolist())}
    labels = np.array([index[label] for label in certificate.label.tolist()], dtype=np.int64)
    within = _within(box) if "cells-in-box" in certificate.kind else ""
    return Opponent("OTAD", clf.module_, replace(certificate, label=labels), smoothed=True, within=within)


def _within(box: tuple[float, float] | None) -> str:
    return "" if box is None else f"perturbations that keep every value in [{box[0]:g}, {box[1]:g}]"


def map_opponent(clf: OTADClassifier, x: np.ndarray) -> Opponent:
    """The interpolated transport map that a refined classifier left, certified on the samples x."""
    module = clf.interpolated()
    return Opponent("interpolated map", module, certify(module, torch.as_tensor(x)))


def solved_opponent(clf: OTADClassifier, x: np.ndarray) -> Opponent:
    """What the network of a classifier imitates: the exact solution, certified on the samples x."""
    module = clf.module_.solved()
    return Opponent("OTAD, solved", module, certify(module, torch.as_tensor(x)), smoothed=True)


def backbone_opponent(clf: OTADClassifier) -> Opponent:
    """The network before interpolation; nothing is known about it but its weights."""
    return Opponent("undefended backbone", clf.backbone_)


def nearest_opponent(clf: OTADClassifier, data: Dataset) -> Opponent:
    """1-NN on the same training samples, with its certificate on the test samples."""
    index = {label: i for i, label in enumerate(clf.classes_.tolist())}
    y = torch.tensor([index[label] for label in data.y_train.tolist()])
    module = NearestNeighbor(torch.as_tensor(data.x_train), y)
    certificate = module.certify(torch.as_tensor(data.x_test), box=data.box)
    return Opponent("1-NN", module, certificate, within=_within(data.box))


def retrieval_space(clf: OTADClassifier) -> nn.Module | None:
    """Inputs -> coordinates in which the model looks its neighbours up; None where it looks none up."""
    return clf.module_.retrieval_space


def relatives(clf: OTADClassifier) -> tuple[nn.Module, ...]:
    """Models to transfer from beside the backbone: the exact one, where a network imitates it."""
    return (clf.module_.solved(),) if clf.interpolation == "network" else ()


def assess(
    opponent: Opponent,
    x: np.ndarray,
    y: np.ndarray,
    *,
    threats: Sequence[ThreatModel],
    attacks: str | Sequence[str],
    rows: np.ndarray,
    knowledge: AttackerKnowledge,
    seed: int,
    data: str,
    n_train: int | None,
    progress: bool,
    results_dir: Path | None = None,
) -> Report:
    """Clean and certified accuracy on all samples, attacked accuracy on `rows` where there are attacks."""
    # `evaluate` attacks the first samples it gets, so those to attack come first.
    order = np.concatenate([rows, np.setdiff1d(np.arange(len(x)), rows)])
    certificate = opponent.certificate
    if certificate is not None:
        certificate = replace(
            certificate,
            label=certificate.label[order],
            radius=certificate.radius[order],
            kind=certificate.kind[order],
        )
    if not opponent.smoothed:
        knowledge = replace(knowledge, smoothed=None, embedding=None, relatives=(), own_backbone=False)
        if not isinstance(attacks, str):
            attacks = [name for name in attacks if name not in ATTACKS or "embedding" not in ATTACKS[name].needs]
    extra = {"within": opponent.within} if opponent.within else {}
    if not attacks:
        report = _unattacked(opponent, x, y, threats, seed=seed, data=data, n_train=n_train)
        return replace(report, extra=report.extra | extra)
    report = evaluate(
        opponent.module,
        x[order],
        y[order],
        threats,
        attacks=attacks,
        seed=seed,
        certificate=certificate,
        knowledge=knowledge,
        name=opponent.name,
        data=data,
        n_train=n_train,
        n_attacked=len(rows),
        progress=progress,
        results_dir=results_dir,
    )
    report = replace(report, extra=report.extra | extra)
    found = report.examples
    return report if found is None else replace(report, examples=_in_order(found, order, rows))


def _in_order(found: ExampleResults, order: np.ndarray, rows: np.ndarray) -> ExampleResults:
    """Results of every sample in the order of the test set; those of attacks stay in the order of `rows`."""
    back = np.argsort(order)
    return replace(
        found,
        y=found.y[back],
        predicted=found.predicted[back],
        certified_radius=None if found.certified_radius is None else found.certified_radius[back],
        attacked=rows if len(rows) < len(order) else None,
    )


def _unattacked(
    opponent: Opponent,
    x: np.ndarray,
    y: np.ndarray,
    threats: Sequence[ThreatModel],
    *,
    seed: int,
    data: str,
    n_train: int | None,
) -> Report:
    """Clean and certified accuracy alone."""
    certificate = opponent.certificate
    predicted = _predict(opponent.module, x) if certificate is None else certificate.label
    radius, certified = None, {}
    if certificate is not None:
        radius = certificate.proven
        certified = {t.key: float(((predicted == y) & (radius > t.eps)).mean()) for t in threats if t.norm == "l2"}
    return Report(
        name=opponent.name,
        data=data,
        n_train=n_train,
        n_test=len(y),
        seed=seed,
        clean_accuracy=float((predicted == y).mean()),
        certified_accuracy=certified,
        examples=ExampleResults(y, predicted, radius),
        versions=package_versions(),
    )


def _predict(module: nn.Module, x: np.ndarray, *, batch_size: int = 500) -> np.ndarray:
    """Class indices, in batches."""
    first = next((t for t in (*module.parameters(), *module.buffers())), torch.zeros(0))
    with torch.no_grad():
        parts = [
            module(torch.as_tensor(x[i : i + batch_size], device=first.device)).argmax(dim=1)
            for i in range(0, len(x), batch_size)
        ]
    return torch.cat(parts).cpu().numpy()
