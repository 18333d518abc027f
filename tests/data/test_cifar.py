from pathlib import Path

import numpy as np
import pytest

from otad.data import load
from otad.errors import DataError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The binary version with two images a file, whose pixels say which plane, row and column they are of."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    plane, row, column = np.indices((3, 32, 32))
    for number, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = [bytes([(number + i) % 5]) + (64 * plane + row + column).astype(np.uint8).tobytes() for i in (0, 1)]
        (folder / name).write_bytes(b"".join(records))
    (folder / "batches.meta.txt").write_text("\n".join([*NAMES, "", ""]))
    return folder


def test_records_are_planes_of_rows(folder: Path) -> None:
    data = load(folder)
    assert data.x_train.shape == (10, 3, 32, 32)
    assert data.y_train.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 0]
    assert data.y_test.tolist() == [0, 1]
    np.testing.assert_allclose(255 * data.x_train[3, :, 5, 7], [12, 76, 140], atol=1e-4)
    assert data.class_names == tuple(NAMES)
    assert data.box == (0.0, 1.0)
    assert data.split == "the official training and test sets"


def test_damaged_or_missing_files(folder: Path) -> None:
    path = folder / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin: damaged, 6145 bytes"):
        load(folder)
    path.write_bytes(bytes([200]) + whole[1:])
    with pytest.raises(DataError, match="label 200; labels are 0 to 9"):
        load(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: no such file"):
        load(folder)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02.")
    with pytest.raises(DataError, match="fetch the binary version"):
        load(tmp_path)
