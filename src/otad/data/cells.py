"""Single cells: .h5ad files, through the package anndata."""

from pathlib import Path
from typing import Any

import numpy as np

from otad.data.parts import Parts, check_finite, check_labels, shown
from otad.errors import DataError, MissingExtraError

__all__ = ["lognormalize", "read_h5ad"]


def read_h5ad(path: Path, label: str = "label", *, label_required: bool = True) -> Parts:
    """Read expression (`X`, dense or sparse, as it is) and the cell types, the column `label` of `obs`.

    Args:
        path: the file.
        label: column of `obs`.
        label_required: whether a file without that column is an error.

    Raises:
        DataError: the file is damaged, or has no such column.
        MissingExtraError: anndata is not installed.
    """
    try:
        import anndata  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("anndata", "cells") from error
    try:
        cells: Any = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        first_line = (str(error).splitlines() or ["unreadable"])[0]
        raise DataError(f"{path}: not a readable .h5ad file ({first_line}); write it anew") from error
    columns = [str(c) for c in cells.obs.columns]
    if label_required and label not in columns:
        raise DataError(
            f"{path}: obs has no column {label!r} among {shown(columns)}; name the column with the cell type"
        )
    if cells.X is None or 0 in cells.shape:
        raise DataError(f"{path}: no expression values in X; add them")
    x = cells.X if isinstance(cells.X, np.ndarray) else cells.X.toarray()
    names = tuple(str(n) for n in cells.var_names)
    x = np.asarray(x, dtype=np.float64)
    check_finite(x, names, str(path))
    y = None
    if label in columns:
        y = check_labels(cells.obs[label].astype(object).to_numpy(), f"{path}, obs column {label!r}")
    return Parts(x=x, y=y, feature_names=names)


def lognormalize(counts: np.ndarray, where: str, total: float = 1e4) -> np.ndarray:
    """Counts (cells, genes) -> log(1 + counts per `total` of the cell), float64.

    Makes cells comparable that were sequenced to different depths.

    Raises:
        DataError: a cell without any count.
    """
    sums = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    if (sums <= 0).any():
        raise DataError(f"{where}: cell {int(np.argmin(sums)) + 1} has no counts; drop it")
    return np.log1p(counts / sums * total)
