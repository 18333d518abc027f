"""All cells of one data set side by side: means over the seeds, as table, Markdown and figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from otad.errors import ContradictionError
from otad.report.cell import RANDOMISED, Cell

__all__ = ["Comparison", "Row", "compared"]


@dataclass(frozen=True)
class Row:
    """One method: the value of every seed, in the order of `seeds`; {} where the method has no certificate.

    `clean`, `certified` and `worst_case` are over the attacked samples, those ending in `_test` over all of the
    test part.
    """

    method: str
    seeds: tuple[int, ...]
    certificate: str | None
    clean: tuple[float, ...]
    certified: dict[str, tuple[float, ...]]
    worst_case: dict[str, tuple[float, ...]]
    clean_test: tuple[float, ...]
    certified_test: dict[str, tuple[float, ...]]
    training_seconds: tuple[float, ...]
    milliseconds: tuple[float, ...]
    failed_checks: tuple[str, ...]

    @property
    def randomised(self) -> bool:
        """Whether its certificate holds with high probability only."""
        return self.certificate == RANDOMISED


@dataclass(frozen=True)
class Comparison:
    """The methods on one data set.

    Attributes:
        data, units: as in the cells.
        n_train, n_test, n_attacked: samples.
        radii: keys, growing.
        settings: those all cells share.
        rows: one per method, in the order given.
        cells: behind the rows.
    """

    data: str
    units: str
    n_train: int
    n_test: int
    n_attacked: int
    radii: tuple[str, ...]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types: every row with means and standard deviations, and every cell."""
        head = {k: getattr(self, k) for k in ("data", "units", "n_train", "n_test", "n_attacked", "radii", "settings")}
        methods, cells = [_summary(row) for row in self.rows], [cell.to_dict() for cell in self.cells]
        return head | {"methods": methods, "cells": cells}


def compared(cells: Sequence[Cell], order: Sequence[str]) -> Comparison:
    """Check the cells of one data set and put them side by side.

    Args:
        cells: at least one.
        order: names of methods, in the order of the rows.

    Raises:
        ContradictionError: see `Cell.check`; or cells of one seed with unlike samples, or of unlike settings.
    """
    first = cells[0]
    for cell in cells:
        cell.check()
        _check_alike(cell, next(other for other in cells if other.seed == cell.seed), first)
    by_method: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: (order.index(c.method) if c.method in order else len(order), c.seed)):
        by_method.setdefault(cell.method, []).append(cell)
    return Comparison(
        data=first.data,
        units=first.units,
        n_train=first.n_train,
        n_test=first.n_test,
        n_attacked=len(first.correct),
        radii=tuple(sorted(first.survived, key=float)),
        settings=dict(first.settings),
        rows=tuple(_row(method, own) for method, own in by_method.items()),
        cells=tuple(cells),
    )


def _check_alike(cell: Cell, same_seed: Cell, first: Cell) -> None:
    if cell.split != same_seed.split or len(cell.correct) != len(same_seed.correct):
        raise ContradictionError(
            f"{cell.name}: its samples are not those of {same_seed.name}; the data have changed in between. "
            "Delete the older of the two files to run that cell again"
        )
    for what, own, others in (
        ("radii", set(cell.survived), set(first.survived)),
        ("settings", dict(cell.settings), dict(first.settings)),
    ):
        if own != others:
            raise ContradictionError(
                f"{cell.name}: its {what} are not those of {first.name}, so one table cannot hold both; "
                "use one output folder for each choice of settings"
            )


def _row(method: str, cells: Sequence[Cell]) -> Row:
    radii = list(cells[0].survived)
    certified = list(cells[0].certified)
    return Row(
        method=method,
        seeds=tuple(c.seed for c in cells),
        certificate=cells[0].certificate,
        clean=tuple(float(c.correct.mean()) for c in cells),
        certified={r: tuple(float(c.certified[r].mean()) for c in cells) for r in certified},
        worst_case={r: tuple(float(c.survived[r].mean()) for c in cells) for r in radii},
        clean_test=tuple(c.clean_accuracy for c in cells),
        certified_test={r: tuple(c.certified_accuracy[r] for c in cells) for r in certified},
        training_seconds=tuple(c.seconds["train"] for c in cells),
        milliseconds=tuple(c.milliseconds for c in cells),
        failed_checks=tuple(sorted({name for c in cells for name in c.failed_checks})),
    )


def _summary(row: Row) -> dict[str, Any]:
    """The row with {"mean": .., "sd": ..} in place of the values of the seeds."""

    def spread(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: spread(part) for key, part in values.items()}
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}

    numbers = (
        "clean", "certified", "worst_case", "clean_test", "certified_test", "training_seconds", "milliseconds",
    )  # fmt: skip
    kept = {"method": row.method, "seeds": list(row.seeds), "certificate": row.certificate}
    return kept | {k: spread(getattr(row, k)) for k in numbers} | {"failed_checks": list(row.failed_checks)}
