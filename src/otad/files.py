"""Files and folders that appear whole or not at all."""

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plain", "refuse_file", "replacing_file", "replacing_folder", "write_json", "write_text"]


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; what was written to it replaces `path` when the block ends well.

    The temporary name keeps the suffix, because writers such as `numpy.savez` choose the format by it.
    Nothing is left behind when the block raises.

    Args:
        path: the file to be; its folder is made where it is missing.

    Yields:
        the temporary path to write to.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file was to be written there. Give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path, suffix=path.suffix)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path`; it replaces `path` whole when the block ends well.

    An older folder at `path` is kept until the new one stands complete, and comes back should the move fail.

    Args:
        path: the folder to be.

    Yields:
        the temporary folder to fill.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    path = Path(path)
    refuse_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
        _swap(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_file(path: Path) -> None:
    """Refuse to take a file, or a place below one, for a folder.

    Raises:
        NotADirectoryError: with what to do.
    """
    file = next((place for place in (path, *path.parents) if place.is_file()), None)
    if file is not None:
        raise NotADirectoryError(f"{file} is a file; a folder was to be written there. Choose another name.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as strict JSON to `path`, whole or not at all; see `plain` for what may be inside."""
    write_text(path, json.dumps(plain(value), indent=indent, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` in the types of JSON: dict, list, str, int, float, bool, None.

    NumPy scalars and arrays, tuples and paths are converted. NaN and infinity become None, because strict
    JSON has neither.

    Raises:
        TypeError: a type that JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"JSON cannot hold {type(value).__name__}; convert it to numbers, text, lists or dicts first.")


def _aside(path: Path, suffix: str = "") -> Path:
    """A fresh hidden name in the folder of `path`, so that the final move stays on one file system."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}{suffix}"


def _swap(aside: Path, path: Path) -> None:
    """Put `aside` in the place of `path`; `os.replace` cannot replace a folder that is not empty."""
    if not path.exists():
        os.replace(aside, path)
        return
    old = _aside(path, suffix=".old")
    os.replace(path, old)
    try:
        os.replace(aside, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
