"""otad predict, certify, attack, explain: a trained model on data."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from otad.cli.failures import job, say
from otad.cli.options import (
    Attacks,
    Data,
    DataDir,
    Debug,
    Index,
    Label,
    Model,
    Norm,
    Part,
    PartOption,
    Quiet,
    Radii,
    Seed,
    attack_names,
    numbers,
    progress,
)
from otad.errors import DataError

if TYPE_CHECKING:
    from otad.data import Features
    from otad.estimator import OTADClassifier
    from otad.runs import DataCard

__all__ = ["attack", "certify", "explain", "predict"]

OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="CSV file to write.", show_default="standard output")]


@job
def predict(
    model: Model,
    data: Data,
    out: OutFile = None,
    part: PartOption = Part.AUTO,
    label: Label = None,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict the class of every sample, with its probability, as CSV."""
    clf, _, found = _opened(model, data, part, label, data_dir)
    probability = clf.predict_proba(found.x)
    predicted = clf.classes_[probability.argmax(axis=1)]
    columns = {"predicted": predicted, "probability": probability.max(axis=1).round(6)}
    _write_csv(found, columns, out)
    if not quiet:
        say(_counted(len(found.x), found, predicted) + _about_network(clf))


@job
def certify(
    model: Model,
    data: Data,
    radii: Radii = "0.5,1.0,1.5",
    out: OutFile = None,
    part: PartOption = Part.AUTO,
    label: Label = None,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove for every sample an L2 radius within which the prediction cannot change, as CSV."""
    budgets = numbers(radii, "--radii")
    import numpy as np

    clf, card, found = _opened(model, data, part, label, data_dir)
    certificate = clf.certify(found.x, box=card.box)
    rounded = np.floor(certificate.radius * 1e6) / 1e6
    _write_csv(found, {"predicted": certificate.label, "radius": rounded, "kind": certificate.kind}, out)
    if quiet:
        return
    right = np.full(len(found.x), True) if found.y is None else _equal(certificate.label, found.y)
    what = "certified" if found.y is None else "correct and certified"
    shares = ", ".join(f"{100 * (right & (certificate.proven > r)).mean():.1f} % at L2 {r:g}" for r in budgets)
    say(
        f"{_counted(len(found.x), found, certificate.label)}; {what}: {shares} (radii in {card.units})"
        + (f"; for perturbations inside {card.box}" if "cells-in-box" in certificate.kind else "")
        + _about_network(clf)
    )


@job
def attack(
    model: Model,
    data: Data,
    eps: Annotated[
        str,
        typer.Option("--eps", help="Budgets of the attacker, separated by commas.", metavar="EPS,EPS,..."),
    ] = "0.5,1.0",
    norm: Annotated[Norm, typer.Option("--norm", help="Norm of the budgets.")] = Norm.L2,
    attacks: Attacks = "standard",
    n: Annotated[
        int,
        typer.Option("--n", help="Attack so many samples, drawn with the seed; fewer if there are fewer."),
    ] = 200,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for metrics.json, report.html, examples.npz.", show_default="none"),
    ] = None,
    results_dir: Annotated[
        Path | None,
        typer.Option(
            "--results-dir",
            help="Folder that keeps the result of every finished attack; a run with the same model, samples, settings "
            "and seed goes on from there.",
            show_default="none",
        ),
    ] = None,
    part: PartOption = Part.AUTO,
    label: Label = None,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Attack the model with full knowledge of it, and audit whether the attack can be believed."""
    budgets = numbers(eps, "--eps")
    from otad.files import refuse_file
    from otad.runs import attack_model, write_outputs

    for folder in (out, results_dir):
        if folder is not None:
            refuse_file(folder)
    clf, card, found = _opened(model, data, part, label, data_dir)
    if found.y is None:
        raise DataError(f"{found.name}: an attack needs the true classes; name the label column with --label")
    report = attack_model(
        clf,
        card,
        found,
        budgets,
        norm=str(norm),
        attacks=attack_names(attacks),
        n=n,
        seed=seed,
        progress=progress(quiet),
        results_dir=results_dir,
    )
    if out is not None:
        write_outputs(report, out)
    typer.echo(report.table())
    if out is not None:
        typer.echo(f"\n{out / 'report.html'} shows it with pictures.")


@job
def explain(
    model: Model,
    data: Data,
    index: Index,
    k: Annotated[int, typer.Option("--k", min=1, help="Show at most so many training samples.")] = 10,
    part: PartOption = Part.AUTO,
    label: Label = None,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the training samples, with weights, that the prediction for one sample is made of."""
    from otad.runs import explanation_rows

    clf, card, found = _opened(model, data, part, label, data_dir)
    if not 0 <= index < len(found.x):
        raise DataError(
            f"--index {index} is out of range: {found.name} has {len(found.x)} samples here, counted from 0"
        )
    x = found.x[index : index + 1]
    certificate = clf.certify(x, box=card.box)
    true = "" if found.y is None else f", true class {card.class_name(found.y[index])}"
    typer.echo(
        f"{found.name} sample {index}: predicted {card.class_name(certificate.label[0])}{true}; "
        f"certified L2 radius "
        f"{certificate.radius[0]:.4g} ({certificate.kind[0]}) in {card.units}{_about_network(clf)}\n"
    )
    header = ("weight", "training sample", "class", "distance")
    rows = explanation_rows(clf, card, x, k)
    cells = [header, *((f"{100 * r.weight:.2f} %", str(r.index), r.label, f"{r.distance:.4g}") for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    for row in cells:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def _opened(
    model: Path, data: str, part: Part, label: str | None, data_dir: Path | None
) -> "tuple[OTADClassifier, DataCard, Features]":
    """The model, the card of its data, and the samples: of the model's own named data set the test part, else all."""
    from otad.data import NAMES
    from otad.runs import read_model
    from otad.runs.selection import known_labels

    clf, card = read_model(model)
    if part == Part.TEST or (part == Part.AUTO and data == card.name and data in NAMES):
        found = card.test_part(data, data_dir=data_dir)
    else:
        found = card.features(data, data_dir=data_dir, label=label)
    return clf, card, found if found.y is None else found._replace(y=known_labels(clf.classes_, found.y))


def _about_network(clf: "OTADClassifier") -> str:
    """What to know where a network stands in for the exact solution."""
    found = clf.network_error_.get("new samples")
    return (
        ""
        if found is None
        else (
            f"; features guessed by a network, not solved: on {found['problems']:,} held-out problems feature error "
            f"{found['feature_error']:.1%}, same label as the exact solution {found['label_agreement']:.1%}"
        )
    )


def _equal(a: Any, b: Any) -> Any:
    """Element by element, whatever the labels are."""
    import numpy as np

    return np.array([left == right for left, right in zip(a.tolist(), b.tolist())])


def _counted(n: int, found: "Features", predicted: Any) -> str:
    words = f"{found.name}: {n:,} samples"
    return words if found.y is None else f"{words}, {100 * _equal(predicted, found.y).mean():.1f} % correct"


def _write_csv(found: "Features", columns: Mapping[str, Iterable[Any]], out: Path | None) -> None:
    """A line a sample: its row in the source (of a test part: in that part), the columns, and its class where known."""
    columns = {"row": found.rows, **columns} | ({} if found.y is None else {"label": found.y})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values()))
    if out is None:
        typer.echo(text.getvalue(), nl=False)
        return
    from otad.files import write_text

    write_text(out, text.getvalue())
