"""From a name, a file or a folder to training and test samples."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from otad.data.arrays import read_npz
from otad.data.cells import read_h5ad
from otad.data.cifar import holds_cifar10, read_cifar10
from otad.data.dataset import Dataset, Features
from otad.data.images import read_image_folder, to_unit
from otad.data.named import NAMES, read_named
from otad.data.parts import Parts, shown
from otad.data.scaling import Scaling
from otad.data.splits import stratified_split, stratified_subset
from otad.data.tables import TABLE_SUFFIXES, read_table
from otad.errors import DataError

__all__ = ["load", "load_features"]


def load(
    source: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    test_share: float = 0.2,
    label: str = "label",
    scale: Literal["standard", "none"] | Scaling = "standard",
    feature_names: Sequence[str] = (),
) -> Dataset:
    """Read a data set and divide it into training and test samples.

    Samples are divided as the source divides them; where it does not, by a stratified random split with the
    seed. The same arguments give the same samples in the same order.

    Args:
        source: a key of NAMES, a file (.csv, .csv.gz, .parquet, .npz, .h5ad), a folder of images by class, or
            CIFAR-10's own folder cifar-10-batches-bin. A name wins over a file of that name; write ./digits for the
            file.
        data_dir: where named data sets lie; without it the environment variable OTAD_DATA.
        n_train: keep so many training samples, a stratified random subset.
        n_test: keep so many test samples, likewise.
        seed: of the split and the subsets.
        test_share: share of the test part where the source has no division.
        label: the label column of a table.
        scale: of tables. "standard": zero mean and unit standard deviation over the training samples;
            "none": as in the source; a Scaling, such as a saved model's: that one. Images are always in
            [0, 1].
        feature_names: the columns a saved model was trained on, in its order. The source must have exactly
            these, in any order. Empty: the columns as they are.

    Raises:
        DataError: anything that makes the data unusable; one line with the place and the remedy.
        MissingExtraError: the format needs a package that is not installed.
    """
    _check_scale(scale)
    parts, name = _read(source, data_dir, label, label_required=True)
    parts = _with_columns(parts, tuple(feature_names), name)
    y = _known(parts.y)
    _check_classes(y, name)
    is_test, split = _division(parts, y, test_share, seed, name)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    _check_parts(y[train], y[test], name)
    if parts.is_test is None:
        # The source may be sorted by class; a split of our own is shuffled, an official one keeps its order.
        train, test = (part[np.random.default_rng(seed).permutation(len(part))] for part in (train, test))
    size = (len(train), len(test))
    train = _subset(train, y, n_train, seed, name, "training", len(np.unique(y[train])))
    test = _subset(test, y, n_test, seed, name, "test", 1)
    if (len(train), len(test)) != size:
        split += f"; stratified subset of {len(train):,} training and {len(test):,} test samples, seed {seed}"
    x_train, x_test, units, scaling = _scaled(parts, train, test, scale, name)
    return Dataset(
        name=name,
        x_train=x_train,
        y_train=y[train],
        x_test=x_test,
        y_test=y[test],
        split=split,
        units=units,
        box=(0.0, 1.0) if parts.images else None,
        feature_names=parts.feature_names,
        scaling=scaling,
        class_names=parts.class_names,
    )


def load_features(
    source: str | os.PathLike[str],
    *,
    scaling: Scaling | None = None,
    feature_names: Sequence[str] = (),
    label: str = "label",
    data_dir: str | os.PathLike[str] | None = None,
    part: Literal["all", "test"] = "all",
    seed: int = 0,
    test_share: float = 0.2,
) -> Features:
    """Read samples to predict: no division, and labels only where the source has them.

    Args:
        source: as for `load`; a folder may also hold images straight, without classes.
        scaling: of the model that will predict; None leaves a table as it is.
        feature_names: the columns that model was trained on. The source must have exactly these, in any
            order; they are returned in this one. Empty: no check.
        label: the label column; left out of the features where it exists.
        data_dir: as for `load`.
        part: "all" samples, or the "test" part that `load` gives with the same seed and test_share; both in
            source order.
        seed: of the split, for part="test".
        test_share: as for `load`, for part="test".

    Raises:
        DataError: as `load`, and where columns are missing or surplus.
        MissingExtraError: as `load`.
    """
    if part not in ("all", "test"):
        raise DataError(f"part must be 'all' or 'test', got {part!r}")
    parts, name = _read(source, data_dir, label, label_required=part == "test")
    rows = np.arange(len(parts.x))
    if part == "test":
        rows = np.flatnonzero(_division(parts, _known(parts.y), test_share, seed, name)[0])
    y = None if parts.y is None else parts.y[rows]
    if parts.images:
        return Features(to_unit(parts.x[rows]), y, name, (), rows)
    parts = _with_columns(parts, tuple(feature_names), name)
    x = parts.x[rows]
    if scaling is None:
        return Features(x.astype(np.float32), y, name, parts.feature_names, rows)
    try:
        return Features(scaling.apply(x), y, name, parts.feature_names, rows)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _read(
    source: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None, label: str, label_required: bool
) -> tuple[Parts, str]:
    """All samples of the source, and a short name for it."""
    text = os.fspath(source)
    if text in NAMES:
        folder = os.environ.get("OTAD_DATA") or None if data_dir is None else data_dir
        return read_named(text, None if folder is None else Path(folder)), text
    path = Path(text)
    if not path.exists():
        raise DataError(_not_found(text))
    name = path.name or path.resolve().name
    if path.is_dir() and holds_cifar10(path):
        return read_cifar10(path), name
    if path.is_dir():
        return read_image_folder(path, label_required=label_required), name
    if path.name.endswith(TABLE_SUFFIXES):
        return read_table(path, label, label_required=label_required), name
    if path.suffix == ".npz":
        return read_npz(path, label_required=label_required), name
    if path.suffix == ".h5ad":
        return read_h5ad(path, label, label_required=label_required), name
    raise DataError(
        f"{path}: unknown kind of file; expected .csv, .csv.gz, .parquet, .npz, .h5ad or a folder of images by class"
    )


def _not_found(text: str) -> str:
    if "/" in text or os.sep in text or Path(text).suffix:
        return f"{text}: no such file or folder; check the path"
    close = difflib.get_close_matches(text, NAMES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{text!r} is neither a file nor a known name; {hint}Known names: {', '.join(NAMES)}"


def _check_scale(scale: object) -> None:
    if not isinstance(scale, Scaling) and scale not in ("standard", "none"):
        raise DataError(f"scale must be 'standard', 'none' or a Scaling, got {scale!r}")


def _known(y: np.ndarray | None) -> np.ndarray:
    if y is None:
        raise DataError("the source has no labels; they are needed here")
    return y


def _check_classes(y: np.ndarray, name: str) -> None:
    classes = np.unique(y)
    if len(classes) < 2:
        raise DataError(f"{name}: only one class, {str(classes[0])!r}; a classifier needs samples of two at least")


def _division(parts: Parts, y: np.ndarray, test_share: float, seed: int, name: str) -> tuple[np.ndarray, str]:
    if parts.is_test is not None:
        return parts.is_test, parts.split
    is_test = stratified_split(y, test_share, seed, name)
    return is_test, f"stratified random split, {100 * test_share:g} % for test, seed {seed}"


def _check_parts(y_train: np.ndarray, y_test: np.ndarray, name: str) -> None:
    """A source that divides itself may do so badly."""
    for y, part in ((y_train, "training"), (y_test, "test")):
        if len(y) == 0:
            raise DataError(f"{name}: the {part} part is empty; move samples there")
    _check_classes(y_train, f"{name}, training part")
    unknown = np.setdiff1d(y_test, y_train)
    if len(unknown):
        raise DataError(
            f"{name}: the test part has class(es) without training samples ({shown(unknown.tolist())}); "
            "add training samples of them or drop them"
        )


def _subset(
    part: np.ndarray, y: np.ndarray, n: int | None, seed: int, name: str, what: str, smallest: int
) -> np.ndarray:
    """N samples of the part; the whole part where n is None."""
    if n is None:
        return part
    argument = "n_train" if what == "training" else "n_test"
    if n > len(part):
        raise DataError(
            f"{name}: {len(part):,} {what} samples, and {argument}={n:,} was asked; "
            "ask for fewer, or change test_share where the data has no division of its own"
        )
    if n < smallest:
        raise DataError(f"{name}: {argument}={n} is too few; at least {smallest} are needed (every class once)")
    return part if n == len(part) else part[stratified_subset(y[part], n, seed)]


def _scaled(
    parts: Parts, train: np.ndarray, test: np.ndarray, scale: Literal["standard", "none"] | Scaling, name: str
) -> tuple[np.ndarray, np.ndarray, str, Scaling | None]:
    """Training and test samples as float32, their units, and the scaling used."""
    if parts.images:
        return to_unit(parts.x[train]), to_unit(parts.x[test]), "pixel values in [0, 1]", None
    x_train, x_test = parts.x[train], parts.x[test]
    if scale == "none":
        return x_train.astype(np.float32), x_test.astype(np.float32), parts.units, None
    given = isinstance(scale, Scaling)
    try:
        scaling = scale if given else Scaling.fit(x_train, parts.feature_names)
        scaled = scaling.apply(x_train), scaling.apply(x_test)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return *scaled, "as scaled by the model" if given else "training standard deviations", scaling


def _with_columns(parts: Parts, wanted: tuple[str, ...], name: str) -> Parts:
    """The table with the wanted columns in their order; as it is where nothing is wanted."""
    found = parts.feature_names
    if parts.images or not wanted or found == wanted:
        return parts
    missing = [column for column in wanted if column not in set(found)]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of the model's {len(wanted)} feature columns missing "
            f"({shown(missing)}); give the columns it was trained on"
        )
    surplus = [column for column in found if column not in set(wanted)]
    if surplus:
        raise DataError(
            f"{name}: {len(surplus)} column(s) the model was not trained on ({shown(surplus)}); "
            "drop them, or name the label column"
        )
    position = {column: j for j, column in enumerate(found)}
    return replace(parts, x=parts.x[:, [position[column] for column in wanted]], feature_names=wanted)
