"""Files and folders that appear whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from otad.files import replacing_file, replacing_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_replaces_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "one")
    write_text(tmp_path / "new" / "a.txt", "zwei, ∞")
    assert (tmp_path / "new" / "a.txt").read_text("utf-8") == "zwei, ∞"
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail() -> None:
        with replacing_file(tmp_path / "a.txt") as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    with replacing_file(tmp_path / "a.npz") as aside:
        np.savez(aside, x=np.ones(2))
    assert names(tmp_path) == ["a.npz"]


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": np.float32(0.5), "z": (1, None, True), "p": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "x": None,
        "y": 0.5,
        "z": [1, None, True],
        "p": str(tmp_path),
    }
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing_folder(tmp_path / "model") as aside:
            (aside / content).write_text(content)
            assert names(tmp_path / "model") == ["one"] if content == "two" else not (tmp_path / "model").exists()
    assert names(tmp_path / "model") == ["two"]
    assert names(tmp_path) == ["model"]


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "model") as aside:
        (aside / "old").write_text("old")

    def fail() -> None:
        with replacing_folder(tmp_path / "model") as aside:
            (aside / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path / "model") == ["old"]
    assert names(tmp_path) == ["model"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_text(tmp_path, "text")
    assert names(tmp_path) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), replacing_folder(tmp_path / "model"):
        pass
    with pytest.raises(NotADirectoryError, match="model is a file"), replacing_folder(tmp_path / "model" / "deeper"):
        pass
    assert (tmp_path / "model").read_text() == "mine"
