"""One cell of a comparison: a data set, a method, a seed, and what was measured."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Self

import numpy as np
from jaxtyping import Bool

from otad.errors import ContradictionError, DataError
from otad.files import plain
from otad.report.wording import radius_words

__all__ = ["DETERMINISTIC", "IN_THE_BOX", "RANDOMISED", "Cell"]

FORMAT = "otad compare cell, version 1"
DETERMINISTIC, IN_THE_BOX, RANDOMISED = "deterministic", "deterministic, in the box", "randomised"
# A randomised certificate may be wrong for a small share of the samples, by its own statement.
TOLERATED = 0.01


@dataclass(frozen=True, eq=False)
class Cell:
    """What was measured of one method trained on one split; shares lie in [0, 1].

    Arrays have one entry per attacked sample, the first of the test part. Radii are keys as in
    `Report.certified_accuracy`.

    Attributes:
        data, method, seed: which cell.
        settings: all that decides its numbers; a cell is run again only for other settings.
        split: digest of the training and test samples: equal for all methods of one seed.
        units: of the radii.
        n_train, n_test: samples trained on, and behind `clean_accuracy` and `certified_accuracy`.
        clean_accuracy: over the test samples.
        certificate: "deterministic", "deterministic, in the box" (for perturbations that keep to the range of the
            inputs), "randomised" (holds with high probability), or None.
        certified_accuracy: radius -> share of the test samples correct and certified; {} without a certificate.
        correct: whether each attacked sample is classified correctly.
        survived: radius -> whether it stays so under every attack.
        certified: radius -> whether it is correct and certified; {} without a certificate.
        attack_accuracy: radius -> attack -> share that survived it.
        seconds: stage -> seconds; "train" counts against the budget.
        milliseconds: of one prediction in a batch of `batch`.
        batch: samples predicted together for `milliseconds`.
        failed_checks: names of the audit's checks that failed.
        facts: what the training says of itself.
        versions: package -> version.
    """

    data: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    split: str
    units: str
    n_train: int
    n_test: int
    clean_accuracy: float
    certificate: str | None
    certified_accuracy: Mapping[str, float]
    correct: Bool[np.ndarray, " m"]
    survived: Mapping[str, Bool[np.ndarray, " m"]]
    certified: Mapping[str, Bool[np.ndarray, " m"]]
    attack_accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    milliseconds: float = math.nan
    batch: int = 0
    failed_checks: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.data}, {self.method}, seed {self.seed}"

    def check(self) -> None:
        """Certified <= worst case <= clean, sample by sample and radius by radius.

        Raises:
            ContradictionError: some sample is certified and broken, or survives though it is wrong from the start,
                or survives a budget after a smaller one broke it. A randomised certificate is allowed 1 % of the
                attacked samples, at least one.
        """
        radii = sorted(self.survived, key=float)
        allowed = max(1, math.floor(TOLERATED * len(self.correct))) if self.certificate == RANDOMISED else 0
        for radius, certified in self.certified.items():
            self._refuse(certified & ~self.survived[radius], radius, "certified, and yet broken by an attack", allowed)
            self._refuse(certified & ~self.correct, radius, "certified, and yet misclassified", allowed)
        for radius in radii:
            self._refuse(self.survived[radius] & ~self.correct, radius, "misclassified, and yet said to survive")
        for smaller, larger in pairwise(radii):
            words = f"broken within {smaller}, and yet said to survive"
            self._refuse(self.survived[larger] & ~self.survived[smaller], larger, words)

    def _refuse(self, wrong: np.ndarray, radius: str, words: str, allowed: int = 0) -> None:
        if wrong.sum() > allowed:
            raise ContradictionError(
                f"{self.name}: {int(wrong.sum())} sample(s), the first at position {int(wrong.argmax())} of the test "
                f"part, are at {radius_words(radius)} {words}; these numbers cannot all be true, so no table is made. "
                "Delete the cell's file to run it again; if it comes back, the certificate or its use is wrong"
            )

    def to_dict(self) -> dict[str, Any]:
        """The cell in plain JSON types; arrays as text of 0 and 1."""
        values = asdict(self)
        values["correct"] = _text(self.correct)
        for name in ("survived", "certified"):
            values[name] = {radius: _text(flags) for radius, flags in getattr(self, name).items()}
        return {"format": FORMAT} | plain(values)

    @classmethod
    def from_dict(cls, value: Any, where: str) -> Self:
        """The cell that `to_dict` wrote.

        Raises:
            DataError: it is something else, or damaged.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DataError(f"{where}: no {FORMAT}; delete the file to run the cell again")
        try:
            values = {k: v for k, v in value.items() if k != "format"}
            values["correct"] = _flags(values["correct"])
            for name in ("survived", "certified"):
                values[name] = {radius: _flags(text) for radius, text in values[name].items()}
            values["failed_checks"] = tuple(values["failed_checks"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: damaged ({error}); delete the file to run the cell again") from error


def _text(flags: np.ndarray) -> str:
    return "".join("01"[int(flag)] for flag in flags)


def _flags(text: str) -> np.ndarray:
    if set(text) - {"0", "1"}:
        raise ValueError("expected a text of 0 and 1")
    return np.array([digit == "1" for digit in text], dtype=bool)
