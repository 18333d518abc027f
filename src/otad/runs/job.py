"""The one place where a run is put together."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.data import Dataset
from otad.estimator import OTADClassifier
from otad.files import refuse_file
from otad.report import Report, TransportPicture
from otad.runs.model_folder import DataCard, check_free, write_model
from otad.runs.opponents import (
    Opponent,
    assess,
    backbone_opponent,
    map_opponent,
    model_opponent,
    nearest_opponent,
    relatives,
    retrieval_space,
    solved_opponent,
)
from otad.runs.outputs import OUTPUTS, write_outputs
from otad.runs.samples import NOTE, gallery
from otad.runs.selection import attacked_rows, check_attacks, class_indices
from otad.runs.stages import Stages

__all__ = ["health_without_transport", "run"]

logger = logging.getLogger("otad.runs")


def run(
    data: Dataset,
    folder: str | os.PathLike[str],
    *,
    classifier: Mapping[str, Any] | None = None,
    radii: Sequence[float] = (0.5, 1.0, 1.5),
    norm: str = "l2",
    attacks: str | Sequence[str] = "standard",
    n_attack: int | None = None,
    rivals: bool = True,
    compare_health: int = 0,
    seed: int = 0,
    label: str = "label",
    resume: bool = False,
    progress: bool = False,
    reproduce: Sequence[str] = (),
) -> Report:
    """Train, interpolate, certify, attack, report.

    Leaves metrics.json, report.html, examples.npz and model/ in `folder`, each whole or not at all.

    Args:
        data: training and test samples.
        folder: the run folder; made where it is missing. Its checkpoint/ holds the state of training and, until the run
            ends, the result of every finished attack.
        classifier: keywords of `OTADClassifier`.
        radii: budgets of the attacks and radii of the certified accuracy, in units of the model's input.
        norm: of the attacks, "l2" or "linf"; certificates are L2.
        attacks: "quick", "demo", "standard", "strong" or names of attacks; empty for none.
        n_attack: attack so many test samples, drawn with the seed; None: all.
        rivals: attack the undefended backbone and 1-NN as well.
        compare_health: epochs of a second backbone trained without transport cost, to compare; 0: none.
        seed: of training and attacks.
        label: name of the label column, kept with the model.
        resume: continue from the checkpoint in `folder`, with the attacks that were finished there.
        progress: show progress bars on stderr.
        reproduce: commands that make this run again, for the page.

    Returns:
        the report of OTAD, with those of its rivals in it.

    Raises:
        DataError: n_attack is below 1, or a test label has no training sample.
        ValueError: a setting is out of range.
        InfeasibleError: no potential of the asked regularity fits.
    """
    folder = Path(folder)
    # What can be wrong with the settings is found before an hour of training, not after it.
    refuse_file(folder)
    check_free(folder / "model")
    check_attacks(attacks)
    threats = [ThreatModel(norm, float(r), data.box) for r in sorted(radii)]  # pyright: ignore[reportArgumentType]
    rows = attacked_rows(len(data.x_test), n_attack, seed)
    attacking = bool(attacks)
    settings = dict(classifier or {})
    network = settings.get("interpolation") == "network"
    refined = settings.get("target_radius") is not None
    stages = Stages(count=4 + refined + (2 + network if rivals and attacking else 0) + bool(compare_health))

    finished = folder / "checkpoint" / "finished_attacks"
    if not resume:
        shutil.rmtree(finished, ignore_errors=True)

    clf = OTADClassifier(
        random_state=seed, verbose=progress, checkpoint=folder / "checkpoint", resume=resume, **settings
    )
    with stages.stage("train", f"train and interpolate: {len(data.x_train):,} samples of {data.name}"):
        clf.fit(data.x_train, data.y_train)
    card = DataCard.of(data, label=label, seed=seed)
    write_model(clf, card, folder / "model")
    _remove_stale(folder)

    y = class_indices(clf.classes_, data.y_test, data.name)
    knowledge = _knowledge(clf, data)
    common: dict[str, Any] = {
        "threats": threats,
        "attacks": attacks,
        "rows": rows,
        "seed": seed,
        "data": data.name,
        "n_train": len(data.x_train),
        "progress": progress,
        "results_dir": finished,
    }
    with stages.stage("certify", f"certify {len(y):,} test samples"):
        own = model_opponent(clf, data.x_test, data.box)
    report = _attack(stages, "attack", own, data.x_test, y, knowledge, common)
    others: dict[str, Report] = {}
    if clf.refinement_ is not None:
        with stages.stage("certify_map", "certify the interpolated map"):
            left = map_opponent(clf, data.x_test)
            others[left.name] = _measure(left, data.x_test, y, knowledge, common | {"attacks": ()})
    if rivals and attacking and network:
        solved = solved_opponent(clf, data.x_test)
        mutual = replace(knowledge, smoothed=clf.module_.solved().smoothed, relatives=(clf.module_,))
        others[solved.name] = _attack(stages, "attack_solved", solved, data.x_test, y, mutual, common)
    if rivals and attacking:
        backbone = backbone_opponent(clf)
        others[backbone.name] = _attack(stages, "attack_backbone", backbone, data.x_test, y, knowledge, common)
        nearest = nearest_opponent(clf, data)
        others[nearest.name] = _attack(stages, "attack_nearest", nearest, data.x_test, y, knowledge, common)
    health = {"with transport cost": dict(clf.health_)}
    if compare_health:
        with stages.stage("train_without_transport", "train a second backbone without transport cost, to compare"):
            health["without it"] = health_without_transport(data, settings, epochs=compare_health, seed=seed)

    report = _complete(
        report, clf, data, stages, others, {"health": health, "settings": _settings(clf, attacks, radii)}
    )
    with stages.stage("report", f"write {folder / 'report.html'}"):
        write_outputs(
            report,
            folder,
            history=clf.history_,
            transport=_picture(clf, card),
            gallery=gallery(clf, data, report.examples, card.class_name),
            gallery_note=NOTE,
            reproduce=reproduce,
        )
    shutil.rmtree(finished, ignore_errors=True)  # large, and of no use to a run that has ended
    return report


def health_without_transport(data: Dataset, settings: Mapping[str, Any], *, epochs: int, seed: int) -> dict[str, Any]:
    """The health of the map of the same backbone trained without transport cost and margin.

    Args:
        data: the data of the run; its training part is used.
        settings: keywords of `OTADClassifier` of the run.
        epochs: how long to train; fewer than the run itself suffice, for the map only tears further.
        seed: of the training.
    """
    # Neighbourhoods are solved when asked for, so a torn map costs no more than its training.
    own = dict(settings) | {"interpolation": "neighborhood", "alpha": 0.0, "margin": 0.0, "epochs": epochs}
    # Nobody asks it anything.
    own |= {"retrieval": "euclidean", "embedding_epochs": None, "embedding_width": None, "target_radius": None}
    own |= {"encoder": None, "components": None, "refinement_options": None}
    clf = OTADClassifier(random_state=seed, **own)
    clf.fit(data.x_train, data.y_train)
    return dict(clf.health_)


def _remove_stale(folder: Path) -> None:
    """What an earlier run wrote tells of another model from now on."""
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def _knowledge(clf: OTADClassifier, data: Dataset) -> AttackerKnowledge:
    """Everything: training samples, backbone, and the model's own smoothing."""
    return AttackerKnowledge(
        x_train=torch.as_tensor(data.x_train),
        y_train=torch.as_tensor(class_indices(clf.classes_, data.y_train, data.name)),
        backbone=clf.backbone_,
        smoothed=clf.module_.smoothed,
        embedding=retrieval_space(clf),
        relatives=relatives(clf),
    )


def _attack(
    stages: Stages,
    stage: str,
    opponent: Opponent,
    x: np.ndarray,
    y: np.ndarray,
    knowledge: AttackerKnowledge,
    common: Mapping[str, Any],
) -> Report:
    """Measure one model as a stage of the run."""
    count = f"attack {opponent.name}: {len(common['rows']):,} test samples"
    with stages.stage(stage, count if common["attacks"] else f"measure {opponent.name}"):
        return _measure(opponent, x, y, knowledge, common)


def _measure(
    opponent: Opponent, x: np.ndarray, y: np.ndarray, knowledge: AttackerKnowledge, common: Mapping[str, Any]
) -> Report:
    return assess(opponent, x, y, knowledge=knowledge, **common)


def _settings(clf: OTADClassifier, attacks: str | Sequence[str], radii: Sequence[float]) -> dict[str, Any]:
    """All that decides the numbers; not where checkpoints lie or how progress is shown."""
    kept = {k: v for k, v in clf.get_params().items() if k not in ("checkpoint", "resume", "verbose", "random_state")}
    chosen = attacks if isinstance(attacks, str) else list(attacks)
    return kept | {"attacks": chosen, "radii": sorted(float(r) for r in radii)}


def _complete(
    report: Report,
    clf: OTADClassifier,
    data: Dataset,
    stages: Stages,
    rivals: dict[str, Report],
    extra: dict[str, Any],
) -> Report:
    """The report of OTAD with all that only the whole run knows."""
    facts = {
        "units": data.units,
        "split": data.split,
        "feature_names": list(data.feature_names),
        "training_fit": dict(clf.training_fit()),
        "map_fit": dict(clf.training_fit(clf.interpolated())) if clf.refinement_ is not None else None,
        "history": [dict(epoch) for epoch in clf.history_],
        **extra,
    }
    if clf.refinement_ is not None:
        facts["refinement"] = {"target_radius": clf.target_radius, **clf.refinement_}
    if clf.interpolation == "network":
        facts["network"] = clf.network_error_ | {"test samples": clf.measure_network(data.x_test)}
    seconds = stages.seconds | {f"train, {k}": v for k, v in clf.seconds_.items()}
    return replace(
        report,
        smoothness=None if clf.regularity_ is None else float(clf.regularity_.L),
        lipschitz=None if clf.lipschitz_ is None else float(clf.lipschitz_),
        seconds=seconds | {"total": sum(stages.seconds.values())},
        extra=report.extra | facts,
        rivals={name: replace(r, extra=r.extra | {"units": data.units}) for name, r in rivals.items()},
    )


def _picture(clf: OTADClassifier, card: DataCard, *, count: int = 2000) -> TransportPicture:
    """At most `count` points of the transport map, for drawing."""
    transport = clf.transport_
    rows = np.unique(np.linspace(0, len(transport.x) - 1, min(count, len(transport.x))).astype(int))
    return TransportPicture(
        x=transport.x[rows].cpu().numpy(),
        z=transport.z[rows].cpu().numpy(),
        y=transport.y[rows].cpu().numpy(),
        class_names=[card.class_name(c) for c in clf.classes_],
    )
