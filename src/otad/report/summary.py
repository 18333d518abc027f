"""Report: one model on one test set, and its rivals under the same attacks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from otad.files import plain
from otad.report.pictures import GallerySample, TransportPicture
from otad.results import AuditCheck, ExampleResults

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Clean, certified and attacked accuracy of one model on one test set, with the checks behind them.

    Shares lie in [0, 1]. Radius keys: "0.5" is an L2 radius in units of the model's input, "linf:0.03" an
    L-infinity one.

    Attributes:
        name: the model.
        data: the data set.
        n_train: number of training samples; None where unknown.
        n_test: number of test samples behind `clean_accuracy` and `certified_accuracy`.
        seed: the seed of data split, training and attacks.
        clean_accuracy: share classified correctly.
        certified_accuracy: L2 radius -> share correct and certified to it; {} without a certificate.
        robust_accuracy: radius -> attack -> share that stayed correct; "worst_case": under every attack.
        audit: check -> its outcome.
        smoothness: L of the interpolated potential, where there is one.
        lipschitz: Lipschitz constant of the feature map, where one is known.
        seconds: stage -> seconds.
        versions: package -> version.
        attack_cost: attack -> {"seconds": total, "queries": forward passes per sample}.
        extra: further facts: "units", "split", "n_attacked", "attacked_subset", "health", "training_fit",
            "refinement", "settings", "network", ..
        rivals: name -> Report of another model on the same samples under the same attacks.
        examples: per-sample results; kept beside the JSON (examples.npz), not in it.
    """

    name: str
    data: str
    n_train: int | None
    n_test: int
    seed: int
    clean_accuracy: float
    certified_accuracy: dict[str, float] = field(default_factory=dict)
    robust_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    audit: dict[str, AuditCheck] = field(default_factory=dict)
    smoothness: float | None = None
    lipschitz: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    attack_cost: dict[str, dict[str, float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    rivals: dict[str, "Report"] = field(default_factory=dict)
    examples: ExampleResults | None = field(default=None, compare=False, repr=False)

    @property
    def audit_passed(self) -> bool | None:
        """Whether no check of the audit failed; None where there was no audit."""
        return all(check.passed is not False for check in self.audit.values()) if self.audit else None

    def to_dict(self) -> dict[str, Any]:
        """The report in plain JSON types, without `examples`; NaN and infinity become None."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("audit", "rivals", "examples")}
        audit = {k: {"passed": c.passed, "value": c.value, "meaning": c.meaning} for k, c in self.audit.items()}
        return plain(kept | {"audit": audit, "audit_passed": self.audit_passed}) | {
            "rivals": {k: r.to_dict() for k, r in self.rivals.items()}
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as strict JSON (no NaN, no infinity), unrounded."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote; `examples` is None.

        Raises:
            ValueError: `text` is not JSON or lacks a key.
        """
        return _report(json.loads(text))

    def table(self) -> str:
        """The headline numbers beside the rivals', as plain text for a terminal."""
        from otad.report.terminal import table

        return table(self)

    def contradictions(self) -> list[str]:
        """Sentences that name every certified accuracy above the worst attacked one; empty where all is well.

        Where only some samples were attacked, the certified share of those samples counts.
        """
        subset = self.extra.get("attacked_subset") or {}
        certified = subset.get("certified_accuracy", self.certified_accuracy)
        found = []
        for radius, share in certified.items():
            attacked = self.robust_accuracy.get(radius, {}).get("worst_case")
            if share is not None and attacked is not None and share > attacked + 1e-9:
                found.append(
                    f"{self.name}: certified {100 * share:.1f} % at L2 {radius}, yet an attack left only "
                    f"{100 * attacked:.1f} %: the certificate or its use is wrong"
                )
        return found + [line for rival in self.rivals.values() for line in rival.contradictions()]

    def to_html(
        self,
        *,
        history: Sequence[Mapping[str, Any]] = (),
        transport: TransportPicture | None = None,
        gallery: Sequence[GallerySample] = (),
        gallery_note: str = "",
        reproduce: Sequence[str] = (),
    ) -> str:
        """One page that loads nothing from elsewhere: tables, figures, samples, audit, cost.

        Args:
            history: one mapping per epoch with epoch, loss, transport_cost, accuracy; more is not drawn.
            transport: training points and their features, drawn in the plane.
            gallery: test samples to show.
            gallery_note: how those samples were chosen, one sentence.
            reproduce: commands that make this report again, one per line.
        """
        from otad.report.page import page

        return page(
            self,
            history=history,
            transport=transport,
            gallery=gallery,
            gallery_note=gallery_note,
            reproduce=reproduce,
        )


def _report(value: Any) -> Report:
    """A Report from the dict of `to_dict`."""
    names = {f.name for f in fields(Report)} - {"examples"}
    required = {"name", "data", "n_train", "n_test", "seed", "clean_accuracy"}
    missing = required - set(value) if isinstance(value, dict) else required
    if missing:
        raise ValueError(f"this JSON is no otad report: it lacks {', '.join(sorted(missing))}")
    known = {k: v for k, v in value.items() if k in names}
    known["audit"] = {
        k: AuditCheck(c["passed"], c["value"], c.get("meaning", "")) for k, c in known.get("audit", {}).items()
    }
    known["rivals"] = {k: _report(r) for k, r in known.get("rivals", {}).items()}
    return Report(**known)
