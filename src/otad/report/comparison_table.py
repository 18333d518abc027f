"""A comparison as Markdown and for the terminal."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from otad.report.cell import IN_THE_BOX
from otad.report.comparison import Comparison, Row
from otad.report.wording import number

__all__ = ["grids", "markdown", "notes", "subject", "terminal_tables"]

DAGGER = "†"


def markdown(comparison: Comparison) -> str:
    """A heading, the table over the attacked samples, that over the whole test part where it is larger, notes."""
    lines = [f"### {comparison.data}", "", subject(comparison), ""]
    for title, header, body in grids(comparison):
        lines += [f"{title}:", "", _line(header), "|" + "-|" * len(header), *map(_line, body), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(comparison))]).rstrip() + "\n"


def terminal_tables(comparison: Comparison) -> list[Table | str]:
    """What to print, in order: the tables of `markdown` and its notes."""
    shown: list[Table | str] = [f"{comparison.data}: {subject(comparison)}"]
    for title, header, body in grids(comparison):
        table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, words in enumerate(header):
            table.add_column(words, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in body:
            table.add_row(*row)
        shown.append(table)
    return [*shown, *notes(comparison)]


def grids(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and body of each table.

    Clean, certified and worst case stand together only over the same samples: otherwise chance could put a
    certified share above an attacked one.
    """
    radii = comparison.radii
    header = ["method", "clean, %"]
    header += [f"{words} {radius}" for words in ("certified", "worst case") for radius in radii]
    body = [
        [_named(row), _share(row.clean)]
        + [_certified(row, row.certified, r) for r in radii]
        + [_share(row.worst_case[r]) for r in radii]
        + [_spread(row.training_seconds, 3), _spread(row.milliseconds, 2)]
        for row in comparison.rows
    ]
    header += ["training, s", "prediction, ms"]
    whole = comparison.n_attacked == comparison.n_test
    which = f"all {comparison.n_test:,}" if whole else f"the first {comparison.n_attacked:,}"
    tables = [(f"On {which} test samples", header, body)]
    if not whole:
        header = ["method", "clean, %", *(f"certified {radius}" for radius in radii)]
        body = [
            [_named(row), _share(row.clean_test), *(_certified(row, row.certified_test, r) for r in radii)]
            for row in comparison.rows
        ]
        tables.append((f"On all {comparison.n_test:,} test samples", header, body))
    return tables


def subject(comparison: Comparison) -> str:
    """What was compared, in one sentence."""
    settings = comparison.settings
    attacks = settings["attacks"]
    seeds = sorted({seed for row in comparison.rows for seed in row.seeds})
    words = (
        f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    )
    return (
        f"{comparison.n_train:,} training and {comparison.n_test:,} test samples; {words}; at most "
        f"{settings['budget_minutes']:g} minutes of training a method; attacks: "
        f"{attacks if isinstance(attacks, str) else ', '.join(attacks)}; L2 radii in {comparison.units}."
    )


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the tables must know."""
    found = ["certified: proven; worst case: correct under every attack of the set. The truth lies between the two."]
    if boxed := [row.method for row in comparison.rows if row.certificate == IN_THE_BOX]:
        found.append(f"{' and '.join(boxed)}: certified for perturbations that stay images, as attacks do.")
    if any(row.randomised for row in comparison.rows):
        found.append(
            f"{DAGGER} a randomised certificate: it holds with high probability, for the smoothed classifier, "
            "not for sure; do not rank it with the others."
        )
    found.extend(
        f"{row.method}: AUDIT FAILED ({', '.join(row.failed_checks)}); do not trust its worst case."
        for row in comparison.rows
        if row.failed_checks
    )
    most = max(len(row.seeds) for row in comparison.rows)
    found.extend(
        f"{row.method}: seeds {', '.join(map(str, row.seeds))} only."
        for row in comparison.rows
        if len(row.seeds) < most
    )
    return found


def _named(row: Row) -> str:
    return row.method + (" (audit failed)" if row.failed_checks else "")


def _certified(row: Row, shares: dict[str, tuple[float, ...]], radius: str) -> str:
    if radius not in shares:
        return "–"
    return _share(shares[radius]) + (DAGGER if row.randomised else "")


def _share(values: Sequence[float]) -> str:
    percents = [100 * value for value in values]
    text = f"{np.mean(percents):.1f}"
    return text if len(percents) == 1 else f"{text} ± {np.std(percents, ddof=1):.1f}"


def _spread(values: Sequence[float], digits: int) -> str:
    text = number(float(np.mean(values)), digits)
    return text if len(values) == 1 else f"{text} ± {number(float(np.std(values, ddof=1)), digits)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
