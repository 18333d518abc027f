"""Finished cells of a comparison on disk, one file each."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from otad.errors import DataError
from otad.files import plain
from otad.report.cell import Cell

__all__ = ["cell_path", "cell_settings", "finished", "folder_name", "read_cells"]


def read_cells(out: str | os.PathLike[str]) -> list[Cell]:
    """All finished cells in a folder that `compare` wrote.

    Raises:
        DataError: a file is damaged.
    """
    return [_read(path) for path in sorted((Path(out) / "cells").glob("*/*/seed-*.json"))]


def cell_path(out: Path, source: str, method: str, seed: int) -> Path:
    """Where the cell's file lies in the folder of the comparison."""
    return out / "cells" / folder_name(source) / method / f"seed-{seed}.json"


def folder_name(source: str) -> str:
    """A source as the name of a folder; a file or folder goes by its last part."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(source).name or "data").lstrip(".") or "data"


def _read(path: Path) -> Cell:
    try:
        return Cell.from_dict(json.loads(path.read_text("utf-8")), str(path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({error}); delete the file to run the cell again") from error


def finished(out: Path, source: str, method: str, seed: int, settings: Mapping[str, Any]) -> bool:
    """Whether the cell's file is there, of these settings.

    Raises:
        DataError: it is there with other settings, or damaged.
    """
    path = cell_path(out, source, method, seed)
    if not path.is_file():
        return False
    found, asked = dict(_read(path).settings), cell_settings(source, settings)
    changed = sorted(key for key in found | asked if found.get(key) != asked.get(key))
    if changed:
        words = "; ".join(f"{key} was {found.get(key)!r} and is now {asked.get(key)!r}" for key in changed)
        raise DataError(
            f"{path}: finished with other settings ({words}); give the settings it had, another output folder (--out), "
            "or delete the file to run the cell again"
        )
    return True


def cell_settings(source: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a finished cell to count, in the types of JSON."""
    return plain({"source": source, **settings})
