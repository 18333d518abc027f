"""Which test samples the page shows, and all that is known about each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from otad.data import Dataset
from otad.estimator import OTADClassifier
from otad.report import Contribution, GallerySample
from otad.results import ExampleResults

__all__ = ["NOTE", "gallery"]

NOTE = "Not hand-picked: the first test samples that were broken, that withstood, and that are misclassified."


def gallery(
    clf: OTADClassifier,
    data: Dataset,
    examples: ExampleResults | None,
    name: Callable[[Any], str],
    *,
    kinds: tuple[int, int, int] = (4, 3, 2),
    neighbors: int = 5,
) -> list[GallerySample]:
    """The first test samples that were broken, that withstood, and that are misclassified: so many of each.

    Args:
        clf: the fitted classifier.
        data: what it was trained and tested on.
        examples: its results over the whole test set; None gives no gallery.
        name: label -> how the reader calls it.
        kinds: how many of each kind.
        neighbors: how many training samples explain each.
    """
    if examples is None:
        return []
    x_test, certified = data.x_test, examples.certified_radius
    position = {int(row): i for i, row in enumerate(examples.rows())}
    broken_at = _broken_at(examples)
    rows = _first_of_each(examples, broken_at, kinds)
    if not rows:
        return []
    largest = list(examples.survived)[-1] if examples.survived else None
    explanation = clf.explain(x_test[rows])
    shown = []
    for row, indices, weights in zip(rows, explanation.indices, explanation.weights):
        sample = GallerySample(
            index=row,
            sample=x_test[row],
            label=name(clf.classes_[examples.y[row]]),
            predicted=name(clf.classes_[examples.predicted[row]]),
            certified_radius=None if certified is None else float(certified[row]),
            attacked_at=largest,
            explanation=_contributions(indices, weights, data, name, neighbors),
        )
        if row in broken_at:
            found = examples.adversarial[broken_at[row]][position[row]]
            sample = replace(
                sample,
                adversarial=found,
                adversarial_at=broken_at[row],
                adversarial_norm=float(np.linalg.norm((found.astype(np.float64) - x_test[row]).ravel())),
                adversarial_predicted=name(clf.predict(found[None])[0]),
            )
        shown.append(sample)
    return shown


def _broken_at(examples: ExampleResults) -> dict[int, str]:
    """Test sample -> smallest radius at which some attack broke it, of those classified correctly."""
    rows = examples.rows()
    correct = (examples.predicted == examples.y)[rows]
    broken: dict[int, str] = {}
    for key, by_attack in examples.survived.items():
        if by_attack and key in examples.adversarial:
            survived = np.logical_and.reduce(list(by_attack.values()))
            for row in rows[correct & ~survived]:
                broken.setdefault(int(row), key)
    return broken


def _first_of_each(examples: ExampleResults, broken: dict[int, str], kinds: tuple[int, int, int]) -> list[int]:
    correct = examples.predicted == examples.y
    rows = examples.rows().tolist()
    withstood = [i for i in rows if correct[i] and i not in broken]
    wrong = [i for i in rows if not correct[i]]
    return [*sorted(broken)[: kinds[0]], *withstood[: kinds[1]], *wrong[: kinds[2]]]


def _contributions(
    indices: np.ndarray, weights: np.ndarray, data: Dataset, name: Callable[[Any], str], count: int
) -> Sequence[Contribution]:
    order = np.argsort(-weights, kind="stable")[:count]
    return [
        Contribution(int(indices[i]), name(data.y_train[indices[i]]), float(weights[i]), data.x_train[indices[i]])
        for i in order
        if weights[i] > 1e-6
    ]
