from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from otad.data import load, load_features
from otad.errors import DataError


def paint(path: Path, grey: int = 100, size: tuple[int, int] = (5, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = {"L": grey, "RGB": (grey, 0, 255), "RGBA": (grey, 0, 255, 90), "I;16": grey, "1": grey > 0}[mode]
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        for i in range(5):
            paint(tmp_path / "pets" / label / f"{i}.png", grey=20 * i)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "pets"


def test_classes_are_folders(folder: Path) -> None:
    data = load(folder)
    assert data.x_train.shape == (8, 1, 4, 5)
    assert sorted(set(data.y_train)) == ["cat", "dog"]
    assert data.box == (0.0, 1.0)
    np.testing.assert_allclose(sorted(set(data.x_train.ravel() * 255)), [0, 20, 40, 60, 80], atol=1e-4)
    assert data.name == "pets"


def test_one_colour_image_makes_all_colour(folder: Path) -> None:
    paint(folder / "dog" / "9.png", mode="RGB")
    assert load(folder).x_train.shape[1:] == (3, 4, 5)


def test_own_division(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("a", "b"):
            paint(tmp_path / part / label / "0.png", grey=10 if part == "train" else 20)
    data = load(tmp_path)
    assert (data.x_train == np.float32(10 / 255)).all()
    assert (data.x_test == np.float32(20 / 255)).all()
    assert data.split == "the folders train and test"


def test_images_without_classes(tmp_path: Path) -> None:
    paint(tmp_path / "0.png")
    assert load_features(tmp_path).y is None
    with pytest.raises(DataError, match="images without a class"):
        load(tmp_path)


def test_different_sizes(folder: Path) -> None:
    paint(folder / "dog" / "9.png", size=(7, 7))
    with pytest.raises(DataError, match=r"9\.png: the image is 7 x 7 and 0\.png is 5 x 4"):
        load(folder)


@pytest.mark.parametrize(("mode", "message"), [("RGBA", "partly transparent"), ("I;16", "pixel format I;16")])
def test_pixel_formats_that_would_lose_something(folder: Path, mode: str, message: str) -> None:
    paint(folder / "dog" / "9.png", mode=mode)
    with pytest.raises(DataError, match=message):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_damaged_image(folder: Path, content: bytes) -> None:
    (folder / "dog" / "9.png").write_bytes(content)
    with pytest.raises(DataError, match=r"9\.png: not a readable image"):
        load(folder)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images; expected files such as"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images of this class"):
        load(tmp_path)
