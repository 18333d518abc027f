"""Power diagrams in a comparison: their settings chosen on held-out training samples, within a budget of time."""

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.certificate import certify
from otad.data.splits import held_out, stratified_subset
from otad.defense import OTAD, CellInterpolation, identity_head
from otad.fitting import train_cells, usual_cells
from otad.nn import CenteredFlatten
from otad.runs.fitted import Fitted
from otad.train import Deformations, Noise, usual_epochs
from otad.train.loop import Augment

__all__ = ["Cells", "fit_cells"]

logger = logging.getLogger("otad.runs")


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
        noise: on the values of tables while training, all columns being kept, see `Noise`.
        learning_rate: None: the usual one.
        longer: epochs, times as many as usual.
        poses: of every piece, the first of `USUAL_POSES`; `pieces` are counted without them.
    """

    pieces: int | None
    deformed: str | None
    reach: float
    temperature: float
    encoder: str | None = None
    components: int | None = None
    ramp: float | None = None
    noise: float | None = None
    learning_rate: float | None = None
    longer: int = 1
    poses: int = 1


class Trial(NamedTuple):
    """Scores of a candidate, one a split, of the longest trainings it had: of so many epochs, times `longer`."""

    epochs: int
    scores: list[float]


# In the order they are tried while the budget lasts; none need be the estimator's default. Few pieces, a high
# temperature and noise (for which training takes longer) learn less by heart, which small tables need, and a low
# temperature suits classes that many samples keep apart; pieces of photographs want an encoder below them, while
# those of grey images live by the box, which an encoder does not keep.
CELLS_OF_GREY_IMAGES = (
    Cells(None, None, 1.0, 0.16),
    Cells(None, "usual", 1.0, 0.16, poses=9),
    Cells(None, "gentle", 1.0, 0.12, ramp=1.0),
    Cells(None, "usual", 1.0, 0.16),
)
CELLS_OF_PHOTOGRAPHS = (Cells(1, "usual", 1.7, 1.7, "patches"),)
CELLS_OF_TABLES = (
    Cells(4, None, 1.6, 0.25, noise=0.1, longer=2),
    Cells(4, None, 1.35, 0.05, "dense"),
    Cells(10, None, 1.8, 0.4, "dense", noise=0.2, learning_rate=1e-2, longer=2),
    Cells(1, None, 1.6, 0.5, "dense"),
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
MEASURED_CELLS = 1000  # held-out samples that cells are chosen by in a round, on one split or on several
MOST_SPLITS = 8
APART = 1000  # splits of one seed and the next
COUNTED = 1.6  # times the threat's radius: up to it a certified radius counts in that choice
TIMED_CELLS = 2048  # samples of the epoch that tells the time of training


def fit_cells(
    x: Tensor, y: Tensor, threat: ThreatModel, *, minutes: float, seed: int = 0, progress: bool = False
) -> Fitted:
    """A power diagram trained for its certificate at the threat's radius, within a budget of training time.

    An epoch over some samples tells the time of training. Then each of the settings for such data is trained on four
    fifths of the training samples, for a fifth of the usual epochs (its own usual ones, see `Cells`) or for more where
    that takes less than a quarter of the budget for all, and certified on the rest (at most 1,000); its score is the
    accuracy plus the mean of the certified radius, which is 0 for wrong labels and counts in units of 1.6 times the
    threat's, up to one. Where there are fewer held-out samples a round goes over up to eight splits, until it has seen
    1,000 or used its share of time. The better half goes on to another round, with other splits and twice the epochs
    (where these are no more than the usual ones), and so on; scores after equally many epochs are averaged, those after
    fewer are dropped. What would not leave the time of the longest training, or half of the budget, for the final one
    is left out: the last settings of the first round, and the worse ones of later rounds. Where the budget is so short
    that the final training may be cut, all have equally many epochs. Images are certified for perturbations that stay
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
    if int(torch.bincount(y).max()) < 2:
        candidates = candidates[:1]  # nothing can be held out

    def trained(rows: Tensor, tried: Cells, epochs: int) -> tuple[OTAD, dict[str, Any]]:
        inputs, labels, start = x[rows], y[rows], time.perf_counter()
        stem, found, pieces = train_cells(
            CenteredFlatten(inputs.mean(0)),
            inputs,
            labels,
            torch.arange(len(labels)),
            labels,
            most=usual_cells(len(y), tried.poses) if tried.pieces is None else tried.pieces * classes,
            encoder=tried.encoder,
            components=tried.components,
            poses=tried.poses,
            target_radius=tried.reach * threat.eps,
            temperature=tried.temperature,
            ramp=tried.ramp,
            learning_rate=tried.learning_rate,
            epochs=epochs,
            augment=_changes(x, tried),
            box=None if tried.encoder else threat.box,
            seed=seed,
            progress=progress,
        )
        module = OTAD(stem, CellInterpolation(found.diagram), identity_head(classes))
        facts = {
            "pieces": len(pieces),
            "epochs": len(found.history),
            "seconds": found.history[-1].seconds,
            "other_seconds": time.perf_counter() - start - found.history[-1].seconds,
            "before": found.before,
            "after": found.after,
        }
        return module, facts

    every = torch.arange(len(y))
    some = torch.from_numpy(stratified_subset(y.numpy(), min(len(y), TIMED_CELLS), seed))
    most = max(candidates, key=_cost)
    trained(some, most, 1)  # what is set up once does not count
    timed = trained(some, most, 1)[1]
    epoch, beside = (timed[name] / len(some) * len(y) for name in ("seconds", "other_seconds"))
    usual = usual_epochs(len(y))
    left = deadline - time.perf_counter()
    longest = usual * max(tried.longer for tried in candidates)
    if longest > usual and longest * epoch > left / 2:  # may be cut short: equally many for all
        candidates, longest = [tried._replace(longer=1) for tried in candidates], usual
        logger.info("%g minutes may cut the final training: no setting takes more than %d epochs", minutes, usual)
    brief = max(1, usual // 5, min(usual, math.floor(left / 4 / (sum(tried.longer for tried in candidates) * epoch))))
    latest = deadline - min(longest * epoch + beside, left / 2)  # for the final training to begin
    seconds: dict[Cells, tuple[float, float]] = {}  # of an epoch over all samples, and of what is beside epochs

    def score(tried: Cells, split: int, epochs: int) -> float:
        held = torch.from_numpy(held_out(y.numpy(), VALIDATION_SHARE, APART * seed + split))
        measured = every[held]
        measured = measured[stratified_subset(y[measured].numpy(), min(len(measured), MEASURED_CELLS), seed)]
        module, facts = trained(every[~held], tried, tried.longer * epochs)
        more = len(y) / int((~held).sum())
        seconds[tried] = facts["seconds"] / facts["epochs"] * more, facts["other_seconds"] * more
        certificate = certify(module, x[measured], box=threat.box)
        right = certificate.label == y[measured].numpy()
        return float((right * (1 + (certificate.radius / (COUNTED * threat.eps)).clip(max=1))).mean())

    splits = min(MOST_SPLITS, math.ceil(MEASURED_CELLS / (VALIDATION_SHARE * len(y))))
    chosen, trials = _rounds(candidates, score, brief, usual, splits, brief * epoch, latest)
    full = chosen.longer * usual
    epoch, beside = seconds.get(chosen, (epoch, beside))
    epochs = max(1, min(full, math.floor((deadline - time.perf_counter() - beside) / epoch)))
    if epochs < full:
        logger.warning("%g minutes are enough for %d of the usual %d epochs", minutes, epochs, full)
    module, facts = trained(every, chosen, epochs)
    facts |= {"settings": chosen._asdict(), "train_accuracy": facts["after"]["accuracy"]}
    facts["validation"] = [
        tried._asdict()
        | {"score": mean(trial.scores), "splits": len(trial.scores), "epochs": tried.longer * trial.epochs}
        for tried, trial in trials.items()
    ]
    knowledge = AttackerKnowledge(smoothed=module.smoothed)
    return Fitted(module, functools.partial(certify, module, box=threat.box), facts, knowledge)


def _rounds(
    candidates: Sequence[Cells],
    score: Callable[[Cells, int, int], float],
    epochs: int,
    most: int,
    splits: int,
    expected: float,
    latest: float,
) -> tuple[Cells, dict[Cells, Trial]]:
    """The best candidate, and what was tried: the better half of a round goes on to the next.

    A round begins where two rivals at least fit into what time is left, and begins no further split beyond its share.

    Args:
        candidates: in the order they are tried.
        score: (candidate, split, epochs) -> score.
        epochs: of the first round; each has twice those of the one before where these are not more than `most`.
        most: epochs of any round.
        splits: of any round, at most.
        expected: seconds of a candidate in the first round, of one that is trained `longer` so many times as much.
        latest: when all must be done, by `time.perf_counter`.
    """
    trials: dict[Cells, Trial] = {}
    rivals, lasted, split = list(candidates), {tried: tried.longer * expected for tried in candidates}, 0
    while True:
        began = time.perf_counter()
        while len(rivals) > 1 and began + sum(lasted[tried] for tried in rivals) > latest:
            rivals.pop()
        if len(rivals) == 1:
            return rivals[0], trials
        until = began + (latest - began) / math.ceil(math.log2(len(rivals)))
        for turn in range(splits):
            if turn and time.perf_counter() + sum(lasted[tried] for tried in rivals) > until:
                break
            for tried in rivals:
                start = time.perf_counter()
                if tried not in trials or trials[tried].epochs < epochs:
                    trials[tried] = Trial(epochs, [])
                trials[tried].scores.append(score(tried, split, epochs))
                lasted[tried] = time.perf_counter() - start
            split += 1
        rivals = sorted(rivals, key=lambda tried: -mean(trials[tried].scores))[: math.ceil(len(rivals) / 2)]
        if 2 * epochs <= most:
            lasted = {tried: 2 * lasted[tried] for tried in rivals}
            epochs *= 2


def _changes(x: Tensor, tried: Cells) -> Augment | None:
    """What is done to samples while training."""
    if tried.deformed:
        return getattr(Deformations, tried.deformed)(x)
    return Noise(tried.noise) if tried.noise else None


def _cost(tried: Cells) -> tuple[str, float, int, bool, str]:
    """Grows with the time of an epoch."""
    pieces = math.inf if tried.pieces is None else tried.pieces
    return tried.encoder or "", pieces, tried.poses, tried.components is None, tried.deformed or ""


def _cells_for(x: Tensor) -> Sequence[Cells]:
    """Settings to choose among, by the kind of data."""
    if x.ndim != 4:
        return (*CELLS_OF_WIDE_TABLES, *CELLS_OF_TABLES) if x.shape[1] >= WIDE else CELLS_OF_TABLES
    return CELLS_OF_GREY_IMAGES if x.shape[1] == 1 else CELLS_OF_PHOTOGRAPHS
