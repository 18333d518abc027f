"""What a run leaves behind beside its model."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from otad.files import replacing_file, write_text
from otad.report import Report
from otad.results import ExampleResults

__all__ = ["OUTPUTS", "write_outputs"]

OUTPUTS = ("metrics.json", "report.html", "examples.npz")


def write_outputs(report: Report, folder: str | os.PathLike[str], **pictures: Any) -> None:
    """Write metrics.json, report.html and examples.npz into `folder`, each whole or not at all.

    Args:
        report: the report.
        folder: made where it is missing.
        pictures: keywords of `Report.to_html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, html = report.to_json() + "\n", report.to_html(**pictures)
    write_text(folder / "metrics.json", metrics)
    write_text(folder / "report.html", html)
    if report.examples is not None:
        with replacing_file(folder / "examples.npz") as aside:
            np.savez_compressed(aside, allow_pickle=False, **_arrays(report.examples))


def _arrays(examples: ExampleResults) -> dict[str, np.ndarray]:
    """y, predicted, certified_radius, attacked, adversarial/RADIUS, survived/RADIUS/ATTACK."""
    arrays = {"y": examples.y, "predicted": examples.predicted, "attacked": examples.rows()}
    if examples.certified_radius is not None:
        arrays["certified_radius"] = examples.certified_radius
    arrays |= {f"adversarial/{key}": value for key, value in examples.adversarial.items()}
    for key, by_attack in examples.survived.items():
        arrays |= {f"survived/{key}/{attack}": value for attack, value in by_attack.items()}
    return arrays
