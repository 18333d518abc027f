"""CIFAR-10 as its author publishes it: the folder of the binary version."""

from pathlib import Path

import numpy as np

from otad.data.parts import Parts
from otad.errors import DataError

__all__ = ["holds_cifar10", "read_cifar10"]

TEST = "test_batch.bin"
FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), TEST)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS  # the label, then the red, green and blue plane, row by row
PICKLES = "data_batch_1"


def holds_cifar10(folder: Path) -> bool:
    """Whether the folder is that of CIFAR-10, in the binary version or as pickles."""
    return any((folder / name).is_file() for name in (*FILES, PICKLES))


def read_cifar10(folder: Path) -> Parts:
    """Read cifar-10-batches-bin/, with its official division.

    Args:
        folder: holds data_batch_1.bin to data_batch_5.bin, test_batch.bin and batches.meta.txt.

    Raises:
        DataError: a file is missing or damaged, or the folder holds the Python version, whose pickles are not opened.
    """
    if (folder / PICKLES).is_file() and not (folder / FILES[0]).is_file():
        raise DataError(
            f"{folder}: the Python version of CIFAR-10, whose pickles could run code and are not opened; "
            "fetch the binary version (cifar-10-binary.tar.gz) and give its folder cifar-10-batches-bin"
        )
    records = [_records(folder / name) for name in FILES]
    rows = np.concatenate(records)
    return Parts(
        x=rows[:, 1:].reshape(-1, 3, 32, 32),
        y=rows[:, 0].astype(np.int64),
        is_test=np.arange(len(rows)) >= len(rows) - len(records[-1]),
        split="the official training and test sets",
        class_names=_class_names(folder / "batches.meta.txt"),
    )


def _records(path: Path) -> np.ndarray:
    """One file's samples, (n, RECORD)."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; unpack cifar-10-binary.tar.gz anew")
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % RECORD:
        raise DataError(f"{path}: damaged, {len(data)} bytes do not make whole records of {RECORD}; unpack it anew")
    rows = data.reshape(-1, RECORD)
    if rows[:, 0].max() > 9:
        raise DataError(f"{path}: not a file of CIFAR-10, it has label {rows[:, 0].max()}; labels are 0 to 9")
    return rows


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; unpack cifar-10-binary.tar.gz anew")
    return tuple(path.read_text(encoding="ascii").split())
