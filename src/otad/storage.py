"""Fitted models on disk: `model.json` for facts, `model.safetensors` for numbers. No pickle."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from otad.cip import BrenierPotential, Regularity
from otad.errors import ModelFolderError, OTADError
from otad.files import replacing_folder, write_json
from otad.transport import TransportMap

__all__ = ["SavedClassifier", "describing_damage", "read_classifier", "write_classifier"]

FORMAT = "otad-model-1"


@dataclass(frozen=True)
class SavedClassifier:
    """What a fitted classifier is made of.

    Attributes:
        parameters: of the constructor, in the types of JSON.
        learned: fitted attributes by their names without the underscore; their values in the types of JSON, but for
            "classes" and "feature_names_in", which are arrays.
        modules: state of each network by its name.
        transport: the transport map.
        potential: on the points of the transport map, where one was fitted.
        pieces: the points of the transport map that refined pieces started from; a refined potential has points and
            features of its own. None where the whole map is interpolated.
    """

    parameters: dict[str, Any]
    learned: dict[str, Any]
    modules: dict[str, dict[str, Tensor]]
    transport: TransportMap
    potential: BrenierPotential | None
    pieces: Tensor | None = None


def write_classifier(folder: Path, saved: SavedClassifier) -> None:
    """Write `saved` into a new folder that takes the old one's place when complete."""
    tensors = {f"{module}.{name}": t for module, state in saved.modules.items() for name, t in state.items()}
    tensors |= {f"transport.{name}": getattr(saved.transport, name) for name in TRANSPORT_TENSORS}
    bounds = None
    if saved.pieces is not None:
        tensors["pieces"] = saved.pieces
    if saved.potential is not None:
        tensors["potentials"] = saved.potential.potentials
        bounds = [saved.potential.regularity.l, saved.potential.regularity.L]
        if saved.pieces is not None:
            tensors |= {"points": saved.potential.x, "features": saved.potential.z}
    facts = {
        "parameters": saved.parameters,
        **saved.learned,
        "classes": _labels_to_json(saved.learned["classes"]),
        "conflicts": saved.transport.conflicts,
        "regularity": bounds,
    }
    _write(folder, facts, tensors)


def read_classifier(folder: Path) -> SavedClassifier:
    """What `write_classifier` wrote.

    Raises:
        ModelFolderError: no such folder, a file is missing or damaged, or it holds something else.
    """
    facts, tensors = _read(folder)
    damaged = [name for name, value in tensors.items() if not value.isfinite().all()]
    if damaged:
        raise ModelFolderError(f"the model in {folder} holds numbers that are not finite ({damaged[0]}); save it again")
    with describing_damage(folder):
        parameters, bounds = facts.pop("parameters"), facts.pop("regularity")
        arrays = {name: tensors.pop(f"transport.{name}") for name in TRANSPORT_TENSORS}
        transport = TransportMap(**arrays, conflicts=facts.pop("conflicts"))
        potential, pieces = None, tensors.pop("pieces", None)
        if "potentials" in tensors:
            values = tensors.pop("potentials")
            x, z = transport.x, transport.z
            if pieces is not None:
                x, z = tensors.pop("points"), tensors.pop("features")
            potential = BrenierPotential(x, z, values, Regularity(*bounds))
        modules: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            module, _, name = key.partition(".")
            modules.setdefault(module, {})[name] = value
        learned = facts | {"classes": _labels_from_json(facts["classes"]), "input_shape": tuple(facts["input_shape"])}
        if "feature_names_in" in learned:
            learned["feature_names_in"] = np.array(learned["feature_names_in"], dtype=object)
        return SavedClassifier(parameters, learned, modules, transport, potential, pieces)


def _write(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with replacing_folder(folder) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside / "model.safetensors")
        (aside / "model.safetensors").chmod(0o644)  # the library writes files that only their owner can read
        write_json(aside / "model.json", {"format": FORMAT} | facts)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
        del facts["format"]
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
        raise ModelFolderError(
            f"the model in {folder} is damaged or of another version ({reason}); save it again"
        ) from error


def _labels_to_json(classes: np.ndarray) -> dict[str, Any]:
    """Class labels with their type, so that the loaded ones compare equal."""
    return {"dtype": "object" if classes.dtype == object else str(classes.dtype), "values": classes.tolist()}


def _labels_from_json(stored: dict[str, Any]) -> np.ndarray:
    """The labels that `_labels_to_json` stored."""
    return np.array(stored["values"], dtype=stored["dtype"])


TRANSPORT_TENSORS = [field.name for field in fields(TransportMap) if field.name != "conflicts"]
