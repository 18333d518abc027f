import shutil
from pathlib import Path

import numpy as np
import pytest

from otad.data import NAMES, load, load_features
from otad.errors import DataError

# shape of one sample, samples to train and test on, classes
EXPECTED = {
    "digits": ((1, 8, 8), 1438, 359, 10),
    "mnist-5k": ((1, 28, 28), 4000, 1000, 10),
    "mnist": ((1, 28, 28), 60000, 10000, 10),
    "fashion-mnist": ((1, 28, 28), 60000, 10000, 10),
    "cifar10": ((3, 32, 32), 15000, 2000, 10),
    "pbmc68k": ((765,), 560, 140, 10),
    "pancreas": ((1194,), 2812, 702, 6),
    "steel-plates": ((27,), 1553, 388, 7),
    "sensorless-drive": ((48,), 1760, 440, 11),
    "shuttle": ((9,), 43500, 14500, 7),
}
IN_PACKAGES = ("digits", "mnist-5k")


def test_all_names_are_tested() -> None:
    assert set(EXPECTED) == set(NAMES)


@pytest.mark.parametrize("name", EXPECTED)
def test_named_data(name: str, request: pytest.FixtureRequest) -> None:
    folder = None if name in IN_PACKAGES else request.getfixturevalue("data_dir")
    data = load(name, data_dir=folder)
    shape, n_train, n_test, classes = EXPECTED[name]
    assert data.x_train.shape == (n_train, *shape)
    assert data.x_test.shape == (n_test, *shape)
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert len(np.unique(data.y_train)) == classes
    assert data.y_train.dtype.kind in "iU"
    assert np.isfinite(data.x_train).all()
    if len(shape) == 3:
        assert data.box == (0.0, 1.0)
        assert data.x_train.min() == 0
        assert data.x_train.max() == 1
        assert data.scaling is None
    else:
        assert data.box is None
        assert len(data.feature_names) == shape[0]
        np.testing.assert_allclose(data.x_train.mean(axis=0), 0, atol=1e-3)
        assert data.units == "training standard deviations"


def test_first_digits_are_those_of_the_files(data_dir: Path) -> None:
    data = load("mnist", data_dir=data_dir)
    assert data.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.split == "the official training and test sets"


def test_digits_of_the_demo_are_balanced_and_shuffled() -> None:
    data = load("mnist-5k")
    assert np.bincount(data.y_train).tolist() == [400] * 10
    assert np.bincount(data.y_test).tolist() == [100] * 10
    assert len(set(data.y_test[:50])) == 10
    train = {image.tobytes() for image in data.x_train}
    assert len(train) == 4000
    assert not any(image.tobytes() in train for image in data.x_test)


def test_subsets(data_dir: Path) -> None:
    data = load("shuttle", data_dir=data_dir, n_train=300, n_test=100, seed=3)
    assert (len(data.x_train), len(data.x_test)) == (300, 100)
    assert len(np.unique(data.y_train)) == 7
    assert "stratified subset of 300 training and 100 test samples, seed 3" in data.split
    smaller = load("mnist-5k", n_train=100, n_test=20)
    larger = load("mnist-5k", n_train=200, n_test=20)
    assert {i.tobytes() for i in smaller.x_train} <= {i.tobytes() for i in larger.x_train}


def test_pancreas_is_made_comparable(data_dir: Path) -> None:
    data = load("pancreas", data_dir=data_dir, scale="none")
    assert data.units == "log-normalised expression"
    np.testing.assert_allclose(np.expm1(data.x_test.astype(float)).sum(axis=1), 1e4, rtol=1e-4)
    assert "beta" in data.y_train


def test_class_names(data_dir: Path) -> None:
    assert load("cifar10", data_dir=data_dir).class_names[:2] == ("airplane", "automobile")
    assert load("fashion-mnist", data_dir=data_dir).class_names[9] == "Ankle boot"


def test_folder_from_the_environment(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTAD_DATA", str(data_dir))
    assert len(load("steel-plates").x_train) == 1553


def test_test_part_for_prediction() -> None:
    data = load("digits", seed=2)
    test = load_features("digits", part="test", seed=2)
    assert {i.tobytes() for i in data.x_test} == {i.tobytes() for i in test.x}
    assert len(load_features("digits").x) == 1797


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "mnits",
            {},
            r"'mnits' is neither a file nor a known name; did you mean 'mnist'\? Known names: digits, ",
        ),
        ("some/where.csv", {}, "some/where.csv: no such file or folder"),
        ("where.csv", {}, "where.csv: no such file or folder"),
        ("mnist", {}, "mnist: where is its file.* --data-dir .* OTAD_DATA"),
        ("mnist", {"data_dir": "nowhere"}, "nowhere: no such data folder; .*--data-dir"),
        ("mnist-5k", {"n_train": 4001}, "4,000 training samples, and n_train=4,001 was asked"),
        ("mnist-5k", {"n_test": 1001}, "1,000 test samples, and n_test=1,001 was asked"),
        ("mnist-5k", {"n_train": 9}, "n_train=9 is too few; at least 10"),
        ("mnist-5k", {"n_test": 0}, "n_test=0 is too few"),
        ("mnist-5k", {"test_share": 1.5}, "test_share must lie between 0 and 1"),
    ],
)
def test_bad_request(source: str, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


def test_wrong_options() -> None:
    # Without the check of annotations, as a caller has it.
    unchecked_load, unchecked_features = load.__wrapped__, load_features.__wrapped__  # pyright: ignore
    with pytest.raises(DataError, match="scale must be"):
        unchecked_load("digits", scale="robust")
    with pytest.raises(DataError, match="part must be"):
        unchecked_features("digits", part="train")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "data.xlsx"
    path.touch()
    with pytest.raises(DataError, match="unknown kind of file"):
        load(path)


def test_missing_and_damaged_files(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(DataError, match="train-images-idx3-ubyte: no such file in the data folder"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"cifar10_subset\.npz: no such file in the data folder"):
        load("cifar10", data_dir=tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(data_dir / "MNIST" / "raw", raw, copy_function=shutil.copyfile)
    raw.chmod(0o755)
    images = raw / "train-images-idx3-ubyte"
    content = images.read_bytes()
    images.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"damaged, .* bytes do not fit"):
        load("mnist", data_dir=tmp_path)
    images.write_bytes(b"no digits")
    with pytest.raises(DataError, match="not an IDX file"):
        load("mnist", data_dir=tmp_path)
    np.savez(tmp_path / "pbmc68k_reduced.npz", X=np.zeros(2))
    with pytest.raises(DataError, match=r"lacks the array\(s\) X_lognorm, y, label_names, gene_names"):
        load("pbmc68k", data_dir=tmp_path)
