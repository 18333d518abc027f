"""Plain results that audits, evaluations and reports hand to each other."""

from dataclasses import dataclass, field

import numpy as np

__all__ = ["AuditCheck", "ExampleResults"]


@dataclass(frozen=True)
class AuditCheck:
    """One check of whether a robust number is real.

    Attributes:
        passed: True or False; None where the check does not apply or only informs.
        value: the measured number, or a short text where no single number says it.
        meaning: one sentence for the reader: what was checked, and what a failure would mean.
    """

    passed: bool | None
    value: float | str
    meaning: str


@dataclass(frozen=True)
class ExampleResults:
    """What happened to each test sample; row i of each array belongs to test sample i.

    Radii are keys as in `Report.robust_accuracy`: "0.5" for an L2 budget, "linf:0.03" for L-infinity.

    Attributes:
        y: true class index, shape (n,).
        predicted: class index predicted on the unchanged sample, shape (n,).
        certified_radius: certified L2 radius in units of the model's input, shape (n,); 0 where nothing is
            certified; None where the method has no certificate.
        adversarial: radius -> worst sample found inside that budget, shape (m, ...).
        survived: radius -> attack -> whether a sample stayed correctly classified, bool of shape (m,).
        attacked: which samples `adversarial` and `survived` cover, in their order, shape (m,); None where
            they cover the first m.
    """

    y: np.ndarray
    predicted: np.ndarray
    certified_radius: np.ndarray | None = None
    adversarial: dict[str, np.ndarray] = field(default_factory=dict)
    survived: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    attacked: np.ndarray | None = None

    def rows(self) -> np.ndarray:
        """The samples that `adversarial` and `survived` cover, shape (m,)."""
        if self.attacked is not None:
            return self.attacked
        covered = next((len(found) for by in self.survived.values() for found in by.values()), len(self.y))
        return np.arange(covered)
