""".npz files: arrays of samples and labels."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from otad.data.images import as_images
from otad.data.parts import Parts, check_finite, check_labels, shown
from otad.errors import DataError

__all__ = ["open_npz", "read_npz"]

WHOLE = (("X", "y"), ("x", "y"))
DIVIDED = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path, *, label_required: bool = True) -> Parts:
    """Read `X` and `y` (or `x` and `y`), or `x_train`, `y_train`, `x_test`, `y_test`.

    Samples with two axes are a table, with three (n, height, width) or four axes images: channels first or
    last, uint8 or floats in [0, 1]. An array `feature_names` names the columns of a table.

    Args:
        path: the file.
        label_required: whether a file with samples and no labels is an error.

    Raises:
        DataError: the file is damaged, lacks the keys, or its arrays do not fit each other.
    """
    arrays = open_npz(path)
    is_test = None
    if all(key in arrays for key in DIVIDED):
        x_train, y_train, x_test, y_test = (arrays[key] for key in DIVIDED)
        if x_train.shape[1:] != x_test.shape[1:]:
            raise DataError(f"{path}: x_train has samples of shape {x_train.shape[1:]}, x_test of {x_test.shape[1:]}")
        _check_lengths(x_train, y_train, f"{path}: x_train and y_train")
        _check_lengths(x_test, y_test, f"{path}: x_test and y_test")
        x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
        is_test = np.arange(len(x)) >= len(x_train)
    else:
        x, y = _whole(arrays, path, label_required)
    if len(x) == 0:
        raise DataError(f"{path}: no samples; add some")
    y = None if y is None else check_labels(y, str(path))
    if x.ndim == 2:
        names = _feature_names(arrays, x.shape[1], path)
        try:
            x = x.astype(np.float64)
        except ValueError as error:
            raise DataError(f"{path}: the samples hold text; encode them as numbers") from error
        check_finite(x, names, str(path))
        return Parts(x=x, y=y, is_test=is_test, split="the training and test arrays of the file", feature_names=names)
    images = as_images(x, str(path))
    return Parts(x=images, y=y, is_test=is_test, split="the training and test arrays of the file")


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
        DataError: the file is missing, empty, damaged, or holds Python objects (which are never unpickled).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        # Opened here, because NumPy leaves the file open where it is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(f"{path}: one bare array; save samples and labels with numpy.savez(path, X=X, y=y)")
            return {key: archive[key] for key in archive.files}
    except EOFError as error:
        raise DataError(f"{path}: the file is empty; write it anew with numpy.savez") from error
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise DataError(f"{path}: damaged .npz file ({error}); write it anew with numpy.savez") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: not a plain .npz file, or it holds Python objects; "
            "save numeric arrays and text labels with numpy.savez"
        ) from error


def _whole(arrays: dict[str, np.ndarray], path: Path, label_required: bool) -> tuple[np.ndarray, np.ndarray | None]:
    for x_key, y_key in WHOLE:
        if x_key in arrays and y_key in arrays:
            _check_lengths(arrays[x_key], arrays[y_key], f"{path}: {x_key} and {y_key}")
            return arrays[x_key], arrays[y_key]
    for x_key, _ in WHOLE:
        if x_key in arrays and not label_required:
            return arrays[x_key], None
    raise DataError(
        f"{path}: holds {shown(sorted(arrays)) or 'no arrays'}; expected the arrays X and y, x and y, "
        "or x_train, y_train, x_test and y_test"
    )


def _check_lengths(x: np.ndarray, y: np.ndarray, where: str) -> None:
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(f"{where} have shapes {x.shape} and {y.shape}; expected one label per sample")


def _feature_names(arrays: dict[str, np.ndarray], features: int, path: Path) -> tuple[str, ...]:
    if "feature_names" not in arrays:
        return tuple(f"x{j}" for j in range(features))
    names = tuple(str(name) for name in arrays["feature_names"].ravel())
    if len(names) != features or len(set(names)) != features:
        raise DataError(f"{path}: feature_names must hold {features} different names, got {len(set(names))}")
    return names
