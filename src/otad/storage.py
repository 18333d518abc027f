"""Fitted models on disk: `model.json` for facts, `model.safetensors` for numbers. No pickle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from otad.errors import ModelFolderError, OTADError
from otad.files import replacing_folder, write_json

__all__ = ["describing_damage", "labels_from_json", "labels_to_json", "read_model", "write_model"]

FORMAT = "otad-model-1"


def write_model(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files into a new folder that takes the old one's place when complete."""
    with replacing_folder(folder) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside / "model.safetensors")
        (aside / "model.safetensors").chmod(0o644)  # the library writes files that only their owner can read
        write_json(aside / "model.json", {"format": FORMAT} | facts)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a folder that `write_model` wrote.

    Raises:
        ModelFolderError: no such folder, a file is missing or damaged, or it holds something else.
    """
    if not folder.is_dir():
        raise ModelFolderError(
            f"no model folder at {folder}; give a folder that OTADClassifier.save or otad train wrote"
        )
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelFolderError(f"{folder} holds no {name}; it is not a saved otad model, or is incomplete")
    with describing_damage(folder):
        facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ModelFolderError(
                f"{folder}/model.json is not of format {FORMAT}; save the model again with this version"
            )
        return facts, load_file(folder / "model.safetensors")


@contextmanager
def describing_damage(folder: Path) -> Iterator[None]:
    """What reading a damaged file raises, as one clear error."""
    try:
        yield
    except OTADError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFolderError(f"the model in {folder} is damaged ({reason}); save it again") from error


def labels_to_json(classes: np.ndarray) -> dict[str, Any]:
    """Class labels with their type, so that the loaded ones compare equal."""
    return {"dtype": "object" if classes.dtype == object else str(classes.dtype), "values": classes.tolist()}


def labels_from_json(stored: dict[str, Any]) -> np.ndarray:
    """The labels that `labels_to_json` stored."""
    return np.array(stored["values"], dtype=stored["dtype"])
