"""Methods side by side: the same splits, budget and attacks, one file per finished cell."""

import importlib.metadata
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from otad.attacks.threat_model import ThreatModel
from otad.certificate import Certificate
from otad.errors import DataError
from otad.evaluation import evaluate
from otad.files import refuse_file, write_json, write_text
from otad.report.cell import DETERMINISTIC, IN_THE_BOX, RANDOMISED, Cell
from otad.report.comparison import Comparison, compared
from otad.report.comparison_page import comparison_page
from otad.report.comparison_plot import comparison_plot
from otad.report.comparison_table import markdown
from otad.runs.cell_files import cell_path, cell_settings, finished, folder_name, read_cells
from otad.runs.fitted import Fit, Fitted
from otad.runs.methods import METHODS
from otad.runs.selection import check_attacks
from otad.runs.splits import Splits

__all__ = ["compare", "judged_again", "write_comparison"]

logger = logging.getLogger("otad.runs")

BY_DATA = "by what 1-NN certifies"  # the radii; older folders say otherwise, and are refused before any work
BATCH = 100  # samples of the timed predictions


def compare(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    methods: Mapping[str, Fit] = METHODS,
    seeds: int = 1,
    budget: float = 2.0,
    eps: Sequence[float] | None = None,
    attacks: str | Sequence[str] = "quick",
    n_train: int | None = None,
    n_test: int | None = None,
    n_attacked: int = 200,
    label: str = "label",
    data_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[Comparison]:
    """Train, certify, attack and time every method on every data set with every seed.

    A cell is one (data set, method, seed). Its file `out`/cells/DATA/METHOD/seed-S.json is written whole when the
    cell is finished; a cell whose file is there is not run again. When all are there, compare.json, table.md,
    report.html and one plot-DATA.svg per data set are written from all cells in `out`, those of earlier calls included.

    Args:
        sources: data sets, as for `load`.
        out: folder; made where it is missing.
        methods: name -> how to fit it.
        seeds: so many, 0, 1, ..: of split, training and attacks.
        budget: minutes of training a method may take.
        eps: L2 radii; None: see `radii_for`. Methods that train for one radius train for the middle one.
        attacks: "quick", "demo", "standard", "strong" or names of attacks.
        n_train: keep so many training samples, a stratified random subset; None: all.
        n_test: keep so many test samples, likewise.
        n_attacked: attack the first so many test samples, the same for every method.
        label: label column of tables.
        data_dir: where named data sets lie.
        progress: show progress bars on stderr.

    Returns:
        one comparison per data set in `out`.

    Raises:
        DataError: data that cannot be used; a finished cell of other settings.
        ContradictionError: the cells cannot all be true; see `compared`.
        ValueError: a setting out of range.
    """
    out = Path(out)
    refuse_file(out)
    check_attacks(attacks)
    _check(methods, seeds, budget, attacks, n_attacked)
    settings = {
        "eps": BY_DATA if eps is None else sorted(float(r) for r in eps),
        "attacks": attacks if isinstance(attacks, str) else list(attacks),
        "budget_minutes": float(budget),
        "n_train": n_train,
        "n_test": n_test,
        "n_attacked": n_attacked,
        "label": label,
    }
    # Methods of one split run one after the other, so that it is read once.
    cells = [(source, method, seed) for source in sources for seed in range(seeds) for method in methods]
    # Other settings are found before the first hour of work, not after it.
    missing = [cell for cell in cells if not finished(out, *cell, settings)]
    if len(missing) < len(cells):
        logger.info("%d of %d cells are finished already", len(cells) - len(missing), len(cells))
    splits = Splits(data_dir=data_dir, n_train=n_train, n_test=n_test, label=label)
    with tqdm(total=len(cells), initial=len(cells) - len(missing), desc="cells", disable=not progress) as bar:
        for number, (source, method, seed) in enumerate(missing, 1):
            logger.info("[%d/%d] %s, %s, seed %d", number, len(missing), source, method, seed)
            began = time.perf_counter()
            cell = _cell(source, method, seed, methods[method], splits, settings, progress)
            write_json(cell_path(out, source, method, seed), cell.to_dict())
            bar.update()
            logger.info("[%d/%d] done in %.1f s", number, len(missing), time.perf_counter() - began)
    return write_comparison(out)


def _check(
    methods: Mapping[str, Fit], seeds: int, budget: float, attacks: str | Sequence[str], n_attacked: int
) -> None:
    if not methods:
        raise ValueError("no method was named")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    if not 0 < budget < float("inf"):
        raise ValueError(f"budget must be a positive number of minutes, not {budget}")
    if not attacks:
        raise ValueError("a comparison needs attacks; name a set, such as quick")
    if n_attacked < 1:
        raise ValueError(f"n_attacked must be at least 1, not {n_attacked}")


def _cell(
    source: str, method: str, seed: int, fit: Fit, splits: Splits, settings: Mapping[str, Any], progress: bool
) -> Cell:
    """Train within the budget, certify all test samples, attack the first ones, time a prediction."""
    radii = splits.radii(source) if settings["eps"] == BY_DATA else settings["eps"]
    samples = splits.samples(source, seed)
    data, x, y = samples.data, samples.x_test, samples.y_test
    threats = [ThreatModel("l2", radius, data.box) for radius in radii]
    with _timed(seconds := {}, "train"):
        fitted = fit(
            samples.x_train,
            samples.y_train,
            threats[len(threats) // 2],
            minutes=settings["budget_minutes"],
            seed=seed,
            progress=progress,
        )
    module = fitted.module.eval()
    with _timed(seconds, "certify"):
        certificate = None if fitted.certify is None else fitted.certify(x)
    randomised = certificate is not None and _kind(certificate) == RANDOMISED
    knowledge = replace(fitted.knowledge, x_train=samples.x_train, y_train=samples.y_train)
    if knowledge.backbone is None:
        knowledge = replace(knowledge, backbone=splits.network(source, seed), own_backbone=False)
    n = min(int(settings["n_attacked"]), len(y))
    with _timed(seconds, "attack"):
        report = evaluate(
            module,
            x,
            y,
            threats,
            attacks=settings["attacks"],
            seed=seed,
            # The audit holds a proof against every attack; one that holds with high probability is judged below.
            certificate=None if randomised else certificate,
            knowledge=knowledge,
            name=method,
            data=data.name,
            n_train=len(samples.x_train),
            n_attacked=n,
            progress=progress,
        )
    found, truth = report.examples, y.numpy()
    assert found is not None  # kept unless told otherwise
    survived = {threat.key: found.survived[threat.key]["worst_case"] for threat in threats}
    certified = {} if certificate is None else {t.key: _certified(certificate, truth, t.eps) for t in threats}
    if randomised:
        survived = judged_again(fitted, survived, certified, found.adversarial, truth[:n])
    return Cell(
        data=folder_name(source),
        method=method,
        seed=seed,
        settings=cell_settings(source, settings),
        split=samples.digest,
        units=data.units,
        n_train=len(samples.x_train),
        n_test=len(truth),
        clean_accuracy=report.clean_accuracy,
        certificate=None if certificate is None else _kind(certificate),
        certified_accuracy={key: float(flags.mean()) for key, flags in certified.items()},
        correct=(found.predicted == found.y)[:n],
        survived=survived,
        certified={key: flags[:n] for key, flags in certified.items()},
        attack_accuracy=report.robust_accuracy,
        seconds=seconds,
        milliseconds=_milliseconds(module, x[:BATCH]),
        batch=min(BATCH, len(x)),
        failed_checks=tuple(name for name, check in report.audit.items() if check.passed is False),
        facts=fitted.facts,
        versions=report.versions,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _certified(certificate: Certificate, y: np.ndarray, eps: float) -> np.ndarray:
    """Whether each sample is right and certified."""
    return (np.asarray(certificate.label) == y) & (certificate.proven > eps)


def judged_again(
    fitted: Fitted,
    survived: Mapping[str, np.ndarray],
    certified: Mapping[str, np.ndarray],
    adversarial: Mapping[str, np.ndarray],
    y: np.ndarray,
) -> dict[str, np.ndarray]:
    """Survival under a randomised certificate, which speaks of the smoothed classifier, not of its few samples.

    A certified sample counts as broken only where the certificate itself, drawn at the adversarial example, is sure
    of a wrong class.
    """
    assert fitted.certify is not None  # the certificate came from it
    judged: dict[str, np.ndarray] = {}
    before = np.ones(len(y), dtype=bool)
    for key in sorted(survived, key=float):
        kept = survived[key].copy()
        doubtful = np.flatnonzero(certified[key][: len(y)] & ~kept)
        if len(doubtful):
            again = fitted.certify(torch.as_tensor(adversarial[key][doubtful]))
            sure = (np.asarray(again.radius) > 0) & (np.asarray(again.label) != y[doubtful])
            kept[doubtful] = ~sure
        judged[key] = before = kept & before
    return judged


def _milliseconds(module: nn.Module, x: Tensor, *, repeats: int = 5, seconds: float = 5.0) -> float:
    """Median time of a prediction, all of x in one batch."""
    laps: list[float] = []
    began = time.perf_counter()
    with torch.no_grad():
        module(x)  # what is set up once does not count
        while len(laps) < repeats and (not laps or time.perf_counter() - began < seconds):
            lap = time.perf_counter()
            module(x)
            laps.append(time.perf_counter() - lap)
    return 1e3 * float(np.median(laps)) / len(x)


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    """All known methods and these, METHOD@BACKBONE behind the others, by backbone."""
    known = list(METHODS)

    def place(name: str) -> tuple[str, int, str]:
        method, _, backbone = name.partition("@")
        return backbone, known.index(method) if method in known else len(known), method

    return tuple(sorted({*known, *names}, key=place))


def write_comparison(out: Path) -> list[Comparison]:
    """compare.json, table.md, report.html and the plots, from all cells in the folder.

    Raises:
        DataError: a damaged cell, or none.
        ContradictionError: the cells cannot all be true; see `compared`.
    """
    by_data: dict[str, list[Cell]] = {}
    for cell in read_cells(out):
        by_data.setdefault(cell.data, []).append(cell)
    if not by_data:
        raise DataError(f"{out}: no finished cells in it; run otad compare first")
    order = _in_order({cell.method for cells in by_data.values() for cell in cells})
    comparisons = [compared(cells, order) for cells in by_data.values()]
    plots = {one.data: comparison_plot(one, order) for one in comparisons}
    for name, plot in plots.items():
        write_text(out / f"plot-{name}.svg", plot)
    write_text(out / "table.md", "\n".join(markdown(one) for one in comparisons))
    write_text(out / "report.html", comparison_page(comparisons, plots, importlib.metadata.version("otad")))
    write_json(out / "compare.json", {"comparisons": [one.to_dict() for one in comparisons]})
    return comparisons


def _kind(certificate: Certificate) -> str:
    kinds = certificate.kind.astype(str)
    if (kinds == RANDOMISED).any():
        return RANDOMISED
    return IN_THE_BOX if np.char.endswith(kinds, "-in-box").any() else DETERMINISTIC
