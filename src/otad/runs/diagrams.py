"""Power diagrams in a comparison: their settings chosen on held-out training samples, within a budget of time."""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    """Scores of a candidate, one a split, of the longest trainings it had: that share of the whole one."""

    share: float
    scores: list[float]


class Seconds(NamedTuple):
    """Time of a training over all samples: of an epoch, and of what is beside epochs."""

    epoch: float
    beside: float

    def of(self, epochs: int) -> float:
        """All of it."""
        return epochs * self.epoch + self.beside

    def epochs(self, seconds: float) -> int:
        """That fit into so much time."""
        return math.floor((seconds - self.beside) / self.epoch)


# In the order they are tried while the budget lasts; none need be the estimator's default. Few pieces, a high
# temperature and noise (for which training takes longer) learn less by heart, which small tables need, and a low
# temperature suits classes that many samples keep apart; pieces of photographs want an encoder below them, while
# those of many grey images live by the box, which an encoder does not keep.
CELLS_OF_GREY_IMAGES = (
    Cells(None, None, 1.0, 0.16),
    Cells(None, "usual", 1.0, 0.16, poses=9),
    Cells(None, "gentle", 1.0, 0.12, ramp=1.0),
    Cells(None, "usual", 1.0, 0.16),
)
# Clothes, some of which nothing tells apart, so that a ramp gives them up; and digits.
CELLS_OF_FEW_GREY_IMAGES = (
    Cells(2, "gentle", 1.3, 0.25, "dense", ramp=0.5),
    Cells(None, "usual", 1.2, 0.16, poses=9),
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
MANY_IMAGES = 20_000
LEAST_SHARE = 0.2  # of a whole training
MEASURED_CELLS = 1000  # held-out samples that cells are chosen by in a round, on one split or on several
MOST_SPLITS = 8
APART = 1000  # splits of one seed and the next
COUNTED = 1.6  # times the threat's radius: up to it a certified radius counts in that choice
TIMED_CELLS = 2048  # samples of the epoch that tells the time of training


def fit_cells(
    x: Tensor, y: Tensor, threat: ThreatModel, *, minutes: float, seed: int = 0, progress: bool = False
) -> Fitted:
    """A power diagram trained for its certificate at the threat's radius, within a budget of training time.

    An epoch over some samples tells how long each of the settings for such data takes: its whole training has the usual
    epochs (its own usual ones, see `Cells`), or as many as fit into half of the budget. Then each is trained on four
    fifths of the training samples, for a fifth of that or for more where all take less than a quarter of the budget,
    and certified on the rest (at most 1,000); its score is the accuracy plus the mean of the certified radius, which is
    0 for wrong labels and counts in units of 1.6 times the threat's, up to one. Where there are fewer held-out samples
    a round goes over up to eight splits, until it has seen 1,000 or used its share of time. The better half goes on to
    another round, with other splits and for twice as long (but no longer than a whole training), and so on; scores
    after equal shares of the whole training are averaged, those after lesser ones are dropped. What would not leave the
    time of the longest training, or half of the budget, for the final one is left out: the last settings of the first
    round, and the worse ones of later rounds. The final one has the usual epochs, or what time is left. Images are
    certified for perturbations that stay images where there is no encoder.

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
    many = min(len(y), max(TIMED_CELLS, usual_cells(len(y))))  # as many as there are pieces to start at
    some = torch.from_numpy(stratified_subset(y.numpy(), many, seed))
    seconds: dict[Cells, Seconds] = {}  # over all samples

    def timed(rows: Tensor, tried: Cells, epochs: int) -> tuple[OTAD, dict[str, Any]]:
        module, facts = trained(rows, tried, epochs)
        more = len(y) / len(rows)
        seconds[tried] = Seconds(facts["seconds"] / facts["epochs"] * more, facts["other_seconds"] * more)
        return module, facts

    trained(some, candidates[0], 1)  # what is set up once does not count
    for tried in candidates:
        timed(some, tried, 1)
    usual, left = usual_epochs(len(y)), deadline - time.perf_counter()
    full = {tried: max(1, min(tried.longer * usual, seconds[tried].epochs(left / 2))) for tried in candidates}
    whole = {tried: seconds[tried].of(full[tried]) for tried in candidates}
    share = max(LEAST_SHARE, min(1.0, left / 4 / sum(whole.values())))
    latest = deadline - min(max(whole.values()), left / 2)  # for the final training to begin

    def partial(tried: Cells, share: float) -> int:
        return max(1, round(share * full[tried]))

    def score(tried: Cells, split: int, share: float) -> float:
        held = torch.from_numpy(held_out(y.numpy(), VALIDATION_SHARE, APART * seed + split))
        measured = every[held]
        measured = measured[stratified_subset(y[measured].numpy(), min(len(measured), MEASURED_CELLS), seed)]
        module, _ = timed(every[~held], tried, partial(tried, share))
        certificate = certify(module, x[measured], box=threat.box)
        right = certificate.label == y[measured].numpy()
        return float((right * (1 + (certificate.radius / (COUNTED * threat.eps)).clip(max=1))).mean())

    splits = min(MOST_SPLITS, math.ceil(MEASURED_CELLS / (VALIDATION_SHARE * len(y))))
    expected = {tried: seconds[tried].of(partial(tried, share)) for tried in candidates}
    chosen, trials = _rounds(expected, score, share, splits, latest)
    if len(trials) < len(candidates) > 1:
        logger.warning("%g minutes are enough to try %d of %d settings", minutes, len(trials), len(candidates))
    most = chosen.longer * usual
    epochs = max(1, min(most, seconds[chosen].epochs(deadline - time.perf_counter())))
    if epochs < most:
        logger.warning("%g minutes are enough for %d of the usual %d epochs", minutes, epochs, most)
    module, facts = trained(every, chosen, epochs)
    facts |= {"settings": chosen._asdict(), "train_accuracy": facts["after"]["accuracy"]}
    facts["validation"] = [
        tried._asdict()
        | {"score": mean(trial.scores), "splits": len(trial.scores)}
        | {"share": trial.share, "epochs": partial(tried, trial.share)}
        for tried, trial in trials.items()
    ]
    knowledge = AttackerKnowledge(smoothed=module.smoothed)
    return Fitted(module, functools.partial(certify, module, box=threat.box), facts, knowledge)


def _rounds(
    expected: Mapping[Cells, float],
    score: Callable[[Cells, int, float], float],
    share: float,
    splits: int,
    latest: float,
) -> tuple[Cells, dict[Cells, Trial]]:
    """The best candidate, and what was tried: the better half of a round goes on to the next.

    A round begins where two rivals at least fit into what time is left, and begins no further split beyond its share.

    Args:
        expected: seconds of each candidate in the first round, in the order they are tried.
        score: (candidate, split, share of the whole training) -> score.
        share: of the first round; each has twice that of the one before, where this is not more than 1.
        splits: of any round, at most.
        latest: when all must be done, by `time.perf_counter`.
    """
    trials: dict[Cells, Trial] = {}
    rivals, lasted, split = list(expected), dict(expected), 0
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
                if tried not in trials or trials[tried].share < share:
                    trials[tried] = Trial(share, [])
                trials[tried].scores.append(score(tried, split, share))
                lasted[tried] = time.perf_counter() - start
            split += 1
        rivals = sorted(rivals, key=lambda tried: -mean(trials[tried].scores))[: math.ceil(len(rivals) / 2)]
        if 2 * share <= 1:
            lasted = {tried: 2 * lasted[tried] for tried in rivals}
            share *= 2


def _changes(x: Tensor, tried: Cells) -> Augment | None:
    """What is done to samples while training."""
    if tried.deformed:
        return getattr(Deformations, tried.deformed)(x)
    return Noise(tried.noise) if tried.noise else None


def _cells_for(x: Tensor) -> Sequence[Cells]:
    """Settings to choose among, by the kind of data."""
    if x.ndim != 4:
        return (*CELLS_OF_WIDE_TABLES, *CELLS_OF_TABLES) if x.shape[1] >= WIDE else CELLS_OF_TABLES
    if x.shape[1] > 1:
        return CELLS_OF_PHOTOGRAPHS
    return CELLS_OF_GREY_IMAGES if len(x) >= MANY_IMAGES else CELLS_OF_FEW_GREY_IMAGES
