"""A trained model on new data: attack it, explain it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.data import Features
from otad.errors import DataError
from otad.estimator import OTADClassifier
from otad.report import Report
from otad.runs.model_folder import DataCard
from otad.runs.opponents import assess, model_opponent, relatives, retrieval_space
from otad.runs.selection import attacked_rows, class_indices

__all__ = ["ExplanationRow", "attack_model", "explanation_rows"]


@dataclass(frozen=True)
class ExplanationRow:
    """One training sample behind a prediction; `distance` is Euclidean, after the stem."""

    index: int
    label: str
    weight: float
    distance: float


def attack_model(
    clf: OTADClassifier,
    card: DataCard,
    found: Features,
    budgets: Sequence[float],
    *,
    norm: str = "l2",
    attacks: str | Sequence[str] = "standard",
    n: int = 200,
    seed: int = 0,
    progress: bool = False,
    results_dir: Path | None = None,
) -> Report:
    """Attack `n` samples drawn with the seed; clean and certified accuracy are over the same samples.

    Args:
        clf: a fitted classifier.
        card: the card of its data.
        found: samples with labels.
        budgets: budgets of the attacker, in units of the model's input.
        norm: "l2" or "linf".
        attacks: "quick", "demo", "standard", "strong" or names of attacks.
        n: how many samples; all where there are fewer.
        seed: of the choice and of the attacks.
        progress: show progress bars on stderr.
        results_dir: where finished attacks are kept, and found again; see `evaluate`.

    Raises:
        DataError: no samples to attack, or a label the model does not know.
        ValueError: a budget out of range.
    """
    if found.y is None:
        raise DataError(f"{found.name}: an attack needs the true classes")
    threats = [ThreatModel(norm, float(eps), card.box) for eps in sorted(budgets)]  # pyright: ignore[reportArgumentType]
    y = class_indices(clf.classes_, found.y, found.name)
    rows = attacked_rows(len(y), n, seed)
    x = found.x[rows]
    report = assess(
        model_opponent(clf, x, card.box),
        x,
        y[rows],
        threats=threats,
        attacks=attacks,
        rows=np.arange(len(rows)),
        knowledge=_knowledge(clf),
        seed=seed,
        data=found.name,
        n_train=card.n_train,
        progress=progress,
        results_dir=results_dir,
    )
    lipschitz = None if clf.lipschitz_ is None else float(clf.lipschitz_)
    smoothness = None if clf.regularity_ is None else float(clf.regularity_.L)
    extra = report.extra | {"units": card.units, "feature_names": list(card.feature_names)}
    if clf.interpolation == "network":
        extra["network"] = clf.network_error_ | {"attacked samples": clf.measure_network(x)}
    return replace(report, extra=extra, smoothness=smoothness, lipschitz=lipschitz)


def explanation_rows(clf: OTADClassifier, card: DataCard, x: np.ndarray, k: int) -> list[ExplanationRow]:
    """The at most `k` training samples of largest weight behind the prediction for one sample x (1, ...)."""
    explanation = clf.explain(x, k)
    transport = clf.transport_
    position = {sample: i for i, sample in enumerate(transport.samples.tolist())}
    with torch.no_grad():
        point = clf.backbone_.stem(torch.as_tensor(x))[0]
    rows = []
    for sample, weight in zip(explanation.indices[0].tolist(), explanation.weights[0].tolist()):
        if weight > 1e-9:
            i = position[sample]
            distance = float(torch.linalg.vector_norm(transport.x[i] - point))
            label = card.class_name(clf.classes_[int(transport.y[i])])
            rows.append(ExplanationRow(sample, label, weight, distance))
    return rows


def training_inputs(clf: OTADClassifier) -> np.ndarray:
    """The training points of the transport map as inputs, (n, ...)."""
    with torch.no_grad():
        return clf.backbone_.stem.inverse(clf.transport_.x).cpu().numpy()  # type: ignore[operator]


def _knowledge(clf: OTADClassifier) -> AttackerKnowledge:
    """What a saved model tells: backbone, smoothing, and its training points."""
    return AttackerKnowledge(
        x_train=torch.as_tensor(training_inputs(clf)),
        y_train=clf.transport_.y.cpu().long(),
        backbone=clf.backbone_,
        smoothed=clf.module_.smoothed,
        embedding=retrieval_space(clf),
        relatives=relatives(clf),
    )
