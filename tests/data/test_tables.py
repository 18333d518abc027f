import gzip
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from otad.data import load, load_features
from otad.errors import DataError, MissingExtraError

GOOD = "a,b,label\n" + "".join(f"{i},{i * i / 7:.4f},{'xy'[i % 2]}\n" for i in range(20))


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "good.csv"
    path.write_text(GOOD)
    return path


def test_standardised_with_training_statistics(csv: Path) -> None:
    data = load(csv)
    assert (data.x_train.shape, data.x_test.shape) == ((16, 2), (4, 2))
    assert data.x_train.dtype == np.float32
    np.testing.assert_allclose(data.x_train.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(data.x_train.std(axis=0), 1, atol=1e-6)
    assert data.units == "training standard deviations"
    assert data.box is None
    assert data.feature_names == ("a", "b")
    assert set(data.y_train) == {"x", "y"}
    assert data.split == "stratified random split, 20 % for test, seed 0"
    assert data.name == "good.csv"


def test_unscaled_is_as_in_the_file(csv: Path) -> None:
    data = load(csv, scale="none")
    assert data.scaling is None
    assert data.units == "as in the file"
    assert sorted(np.concatenate([data.x_train, data.x_test])[:, 0]) == list(range(20))


def test_deterministic_and_seeded(csv: Path) -> None:
    one, two, other = load(csv), load(csv), load(csv, seed=1)
    np.testing.assert_array_equal(one.x_train, two.x_train)
    assert (one.x_train != other.x_train).any()


def test_formats_agree(csv: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    packed, parquet, npz = tmp_path / "p.csv.gz", tmp_path / "p.parquet", tmp_path / "p.npz"
    packed.write_bytes(gzip.compress(GOOD.encode()))
    frame = pd.read_csv(csv)
    frame.to_parquet(parquet)
    np.savez(npz, X=frame[["a", "b"]].to_numpy(), y=frame["label"].to_numpy(dtype=str))
    expected = load(csv)
    for path in (packed, parquet, npz):
        data = load(path)
        np.testing.assert_array_equal(data.x_train, expected.x_train)
        np.testing.assert_array_equal(data.y_test, expected.y_test)


def test_own_division_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,split,label\n1,train,0\n2,test,0\n3,train,1\n4,test,1\n5,train,1\n")
    data = load(path, scale="none")
    assert data.x_train.ravel().tolist() == [1, 3, 5]
    assert data.y_test.tolist() == [0, 1]
    assert data.feature_names == ("a",)
    assert "column 'split'" in data.split


@pytest.mark.parametrize(
    ("column", "expected"),
    [("1.0\n2.0\n", [1, 2]), ("True\nFalse\n", ["True", "False"]), ("b\n7\n", ["b", "7"])],
)
def test_labels_as_given(tmp_path: Path, column: str, expected: list) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,label\n" + "".join(f"{i},{v}\n" for i, v in enumerate(column.split() * 3)))
    y = load_features(path).y
    assert y is not None
    assert y.tolist() == expected * 3


BAD = {
    "empty": ("", "the file is empty"),
    "header only": ("a,b,label\n", "no data rows"),
    "no label": ("a,b\n1,2\n", "no label column 'label' among 'a', 'b'"),
    "label only": ("label\n1\n2\n", "no feature columns"),
    "text": ("a,b,label\n1,2,x\n3,oops,y\n", "column 'b' has the text 'oops' at data row 2"),
    "nan": ("a,b,label\n1,2,x\n3,,y\n", r"column 'b' has a missing value \(NaN\) at data row 2"),
    "infinity": ("a,b,label\n1,2,x\ninf,3,y\n", "column 'a' has the value inf at data row 2"),
    "beyond float32": ("a,b,label\n1,2,x\n1e300,3,y\n", r"column 'a' has the value 1e\+300 at data row 2"),
    "one class": ("a,label\n1,x\n2,x\n3,x\n", "only one class, 'x'"),
    "single sample": ("a,label\n1,x\n2,x\n3,y\n", "one sample only .'y'"),
    "missing label": ("a,label\n1,x\n2,\n3,y\n", "the label is missing at data row 2"),
    "missing number label": ("a,label\n1,1\n2,\n3,2\n", "the label is missing at data row 2"),
    "fraction label": ("a,label\n1,0\n2,0.5\n", "the label at data row 2 is 0.5"),
    "two names": ("a,a,label\n1,2,x\n", "two columns are named 'a'"),
    "no name": (",a,label\n0,2,x\n", "column 1 has no name"),
    "ragged": ("a,b,label\n1,2,x\n1,2,3,4,x\n", "not a regular table"),
    "more fields than names": (
        "a,label\n0,2,x\n1,4,y\n",
        "3 fields in the first row of data and 2 column names",
    ),
    "constant": ("a,label\n1,x\n1,x\n1,y\n1,y\n", "every column is constant"),
    "only test": ("a,split,label\n1,train,0\n2,test,0\n3,test,1\n", "only one class, '0'"),
    "unseen class": (
        "a,split,label\n1,train,0\n2,train,1\n3,test,2\n",
        r"class\(es\) without training samples \('2'\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_table(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    for content in (b"a,label\n1,x\n", gzip.compress(GOOD.encode())[:-20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged gzip"):
            load(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        load(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "t.parquet"
    path.touch()
    with pytest.raises(MissingExtraError, match=r"otad\[parquet\]"):
        load(path)


def test_dates_are_no_numbers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": pd.to_datetime(["2020-01-01", "2021-01-01"]), "label": ["x", "y"]}).to_parquet(path)
    with pytest.raises(DataError, match="'a' holds dates"):
        load(path)


def test_features_of_a_saved_model(csv: Path, tmp_path: Path) -> None:
    trained = load(csv)
    assert trained.scaling is not None
    new = tmp_path / "new.csv"
    new.write_text("b,a\n0.5,1\n7,2\n")
    features = load_features(new, scaling=trained.scaling, feature_names=trained.feature_names)
    assert features.y is None
    assert features.feature_names == ("a", "b")
    np.testing.assert_array_equal(features.x, trained.scaling.apply(np.array([[1, 0.5], [2, 7.0]])))
    with_labels = load_features(csv)
    assert with_labels.y is not None
    assert with_labels.x[:, 0].tolist() == list(range(20))


def test_same_division_for_a_saved_model(csv: Path) -> None:
    trained = load(csv, seed=5)
    again = load(csv, seed=5, scale=trained.scaling or "none", feature_names=trained.feature_names)
    np.testing.assert_array_equal(again.x_test, trained.x_test)
    test = load_features(csv, part="test", seed=5, scaling=trained.scaling)
    assert sorted(map(tuple, test.x.tolist())) == sorted(map(tuple, trained.x_test.tolist()))
    assert (np.diff(test.rows) > 0).all()


@pytest.mark.parametrize(
    ("header", "message"),
    [("a,c", "1 of the model's 2 feature columns missing .'b'"), ("a,b,c", "not trained on .'c'")],
)
def test_other_columns_than_the_model(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "new.csv"
    path.write_text(f"{header}\n" + ",".join("1" for _ in header.split(",")) + "\n")
    with pytest.raises(DataError, match=message):
        load_features(path, feature_names=["a", "b"])
