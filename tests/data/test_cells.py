import sys
from pathlib import Path

import numpy as np
import pytest

from otad.data import load
from otad.data.cells import lognormalize
from otad.errors import DataError, MissingExtraError


def test_without_anndata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    path = tmp_path / "cells.h5ad"
    path.touch()
    with pytest.raises(MissingExtraError, match=r"otad\[cells\]"):
        load(path)


def test_depth_does_not_matter() -> None:
    counts = np.array([[1.0, 3.0, 0.0]])
    np.testing.assert_allclose(lognormalize(counts, "here"), lognormalize(7 * counts, "here"))
    np.testing.assert_allclose(lognormalize(counts, "here"), np.log1p([[2500, 7500, 0]]))


def test_empty_cell() -> None:
    with pytest.raises(DataError, match="here: cell 2 has no counts"):
        lognormalize(np.array([[1.0], [0.0]]), "here")


def test_cells_from_file(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="needs the extra otad[cells]")
    import pandas as pd
    from scipy.sparse import csr_matrix

    x = np.arange(40.0).reshape(20, 2)
    # Text of the type object, which every version of anndata can write.
    kinds = pd.Categorical(["T", "B"] * 10, categories=pd.Index(["B", "T"], dtype=object))
    obs = pd.DataFrame({"kind": kinds}, index=pd.Index([str(i) for i in range(20)], dtype=object))
    var = pd.DataFrame(index=pd.Index(["CD3", "CD19"], dtype=object))
    cells = anndata.AnnData(X=csr_matrix(x), obs=obs, var=var)
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    data = load(path, label="kind", scale="none")
    assert data.feature_names == ("CD3", "CD19")
    assert sorted(np.concatenate([data.x_train, data.x_test])[:, 0]) == list(range(0, 40, 2))
    assert sorted(set(data.y_train)) == ["B", "T"]
    with pytest.raises(DataError, match="obs has no column 'label' among 'kind'"):
        load(path)
