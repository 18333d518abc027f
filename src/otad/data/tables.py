"""Tables: one sample a row, one feature a column, one column with the label."""

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from otad.data.parts import Parts, check_finite, check_labels, shown
from otad.errors import DataError, MissingExtraError

__all__ = ["TABLE_SUFFIXES", "read_table"]

TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")

# A file may divide its rows itself, in a column of this name that holds nothing else than "train" and "test".
SPLIT_COLUMN = "split"


def read_table(path: Path, label: str = "label", *, label_required: bool = True) -> Parts:
    """Read a .csv, .csv.gz or .parquet file with numbers in every column but the label.

    A column `split` that holds "train" and "test" is the file's own division, not a feature.

    Args:
        path: the file; a CSV has its column names in the first line.
        label: name of the label column.
        label_required: whether a file without that column is an error.

    Raises:
        DataError: the file is empty or damaged, has no label column, text or missing values among the
            features, or two columns of one name.
        MissingExtraError: a .parquet file, and pyarrow is not installed.
    """
    frame = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if frame.empty:
        raise DataError(f"{path}: no data rows below the column names; add samples")
    if label_required and label not in frame.columns:
        raise DataError(
            f"{path}: no label column {label!r} among {shown(frame.columns.tolist())}; "
            "name the column that holds the class (--label, label=...)"
        )
    y = None
    if label in frame.columns:
        y = check_labels(_label_values(frame.pop(label)), f"{path}, column {label!r}")
    is_test = _own_division(frame)
    if is_test is not None:
        frame = frame.drop(columns=SPLIT_COLUMN)
    if frame.shape[1] == 0:
        raise DataError(f"{path}: no feature columns beside the label; add columns with numbers")
    names = tuple(frame.columns)
    x = np.column_stack([_numbers(pd.Series(frame[name]), str(name), path) for name in names])
    check_finite(x, names, str(path))
    return Parts(x=x, y=y, is_test=is_test, split="the column 'split' of the file", feature_names=names)


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        _check_first_lines(path)
        return pd.read_csv(path, low_memory=False)
    except (pd.errors.ParserError, csv.Error) as error:
        reason = str(error).removeprefix("Error tokenizing data. C error: ").strip()
        raise DataError(
            f"{path}: not a regular table ({reason}); every line needs as many fields as the first"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8 CSV"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); compress it anew") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _check_first_lines(path: Path) -> None:
    """Look before pandas: it renames equal names, invents missing ones, makes row names of surplus ones."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
        rows = (row for row in csv.reader(lines) if row)
        header, first = next(rows, []), next(rows, [])
    if not header:
        raise DataError(f"{path}: the file is empty; expected column names in the first line and samples below")
    _check_names(header, path)
    if len(first) > len(header):
        raise DataError(
            f"{path}: {len(first)} fields in the first row of data and {len(header)} column names; name every column"
        )


def _check_names(names: list[str], path: Path) -> None:
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{path}: column {position + 1} has no name (a saved row index?); name it or leave it out")
        if name in seen:
            raise DataError(f"{path}: two columns are named {name!r}; rename one")
        seen.add(name)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; write the table anew")
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        first_line = (str(error).splitlines() or ["unreadable"])[0]
        raise DataError(f"{path}: not a readable Parquet file ({first_line}); write it anew") from error
    _check_names(table.column_names, path)
    return table.to_pandas()


def _label_values(column: pd.Series) -> np.ndarray:
    if column.isna().any() or not (
        pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)
    ):
        return column.astype(object).to_numpy()
    return column.to_numpy()


def _own_division(frame: pd.DataFrame) -> np.ndarray | None:
    if SPLIT_COLUMN not in frame.columns:
        return None
    values = frame[SPLIT_COLUMN].astype(object).to_numpy()
    if {"train", "test"} != set(values):
        return None
    return values == "test"


def _numbers(column: pd.Series, name: str, path: Path) -> np.ndarray:
    """The column as float64, missing values as NaN."""
    if pd.api.types.is_numeric_dtype(column.dtype):  # true for booleans too
        return np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
    if pd.api.types.is_datetime64_any_dtype(column.dtype) or pd.api.types.is_timedelta64_dtype(column.dtype):
        raise DataError(f"{path}: column {name!r} holds dates; turn it into numbers or drop it")
    numbers = np.asarray(pd.to_numeric(column.astype(object), errors="coerce"), dtype=np.float64)
    text = np.flatnonzero(np.isnan(numbers) & column.notna().to_numpy())
    if len(text):
        value = str(column.iloc[text[0]])
        value = value if len(value) <= 40 else value[:37] + "..."
        raise DataError(
            f"{path}: column {name!r} has the text {value!r} at data row {text[0] + 1}, not a number; "
            "encode the column as numbers, drop it, or name it as the label"
        )
    return numbers
