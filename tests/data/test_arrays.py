from pathlib import Path
from typing import Any

import numpy as np
import pytest

from otad.data import load, load_features
from otad.errors import DataError

Y = np.arange(20) % 2
PIXELS = (np.arange(20 * 6 * 5 * 3) % 256).reshape(20, 6, 5, 3).astype(np.uint8)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_images_in_every_layout(tmp_path: Path) -> None:
    expected = load(saved(tmp_path / "a.npz", X=PIXELS, y=Y))
    assert expected.x_train.shape == (16, 3, 6, 5)
    assert expected.box == (0.0, 1.0)
    assert expected.units == "pixel values in [0, 1]"
    assert expected.x_train.max() <= 1
    first = load(saved(tmp_path / "b.npz", x=PIXELS.transpose(0, 3, 1, 2), y=Y))
    np.testing.assert_array_equal(first.x_train, expected.x_train)
    floats = load(saved(tmp_path / "c.npz", x=PIXELS / 255, y=Y))
    np.testing.assert_allclose(floats.x_train, expected.x_train, atol=1e-7)
    grey = load(saved(tmp_path / "d.npz", x=PIXELS[..., 0], y=Y))
    np.testing.assert_array_equal(grey.x_test, expected.x_test[:, :1])


def test_own_division(tmp_path: Path) -> None:
    x = np.arange(12.0).reshape(6, 2)
    path = saved(tmp_path / "a.npz", x_train=x[:4], y_train=[0, 1, 0, 1], x_test=x[4:], y_test=[1, 0])
    data = load(path, scale="none")
    np.testing.assert_array_equal(data.x_train, x[:4])
    np.testing.assert_array_equal(data.x_test, x[4:])
    assert load_features(path).rows.tolist() == list(range(6))
    assert load_features(path, part="test").rows.tolist() == [4, 5]


def test_samples_without_labels(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", X=np.zeros((3, 2)))
    assert load_features(path).y is None
    with pytest.raises(DataError, match="holds 'X'; expected the arrays X and y"):
        load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": np.zeros(3)}, "holds 'data'; expected the arrays X and y"),
        ({"X": np.zeros((3, 2)), "y": Y}, "one label per sample"),
        ({"X": np.zeros((20, 2)), "y": np.eye(20)}, "expected one label per sample, shape"),
        ({"X": np.full((20, 2), np.nan), "y": Y}, r"column 'x0' has a missing value \(NaN\) at data row 1"),
        ({"X": np.full((20, 2), "a"), "y": Y}, "the samples hold text"),
        ({"X": np.full((20, 1, 2, 2), 7.0), "y": Y}, r"image 1 has values outside \[0, 1\]"),
        ({"X": np.full((20, 1, 2, 2), 7), "y": Y}, "expected uint8"),
        ({"X": np.zeros(20), "y": Y}, "the samples have shape"),
        ({"X": np.zeros((0, 3)), "y": np.zeros(0)}, "no samples"),
        ({"X": np.zeros((20, 2)), "y": Y, "feature_names": np.array(["a"])}, "2 different names"),
        ({"X": np.zeros((20, 2)), "y": np.array([None] * 20)}, "Python objects"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(saved(tmp_path / "bad.npz", **arrays))
    assert "\n" not in str(caught.value)
    assert "bad.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"text"])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz: "):
        load(path)


def test_bare_array(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="one bare array"):
        load(path)
