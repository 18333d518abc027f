"""A training run's state on disk: weights, optimiser and history in one file, replaced after every epoch."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from otad.errors import ModelFolderError

__all__ = ["TrainingState"]


class TrainingState:
    """Save and resume, without pickle.

    Args:
        folder: where `NAME.checkpoint` lies; None keeps nothing.
        name: of the run within the folder.
        settings: what must be the same for a checkpoint to be gone on from.
    """

    def __init__(self, folder: Path | None, name: str, settings: dict[str, Any]) -> None:
        self.path = Path(folder) / f"{name}.checkpoint" if folder is not None else None
        self.settings = settings

    def save(self, model: nn.Module, optimizer: Any, history: list[dict[str, Any]]) -> None:
        """Replace the checkpoint; a crash meanwhile leaves the old one."""
        if self.path is None:
            return
        tensors = {f"model.{name}": value.detach().cpu() for name, value in model.state_dict().items()}
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(v).cpu() for name, v in entry.items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".checkpoint.part")
        save_file(tensors, temporary, {"history": json.dumps(history), "settings": json.dumps(self.settings)})
        os.replace(temporary, self.path)

    def load(self, model: nn.Module, optimizer: Any) -> list[dict[str, Any]]:
        """Restore model and optimiser in place; returns the history, empty where there is no checkpoint.

        Raises:
            ModelFolderError: the checkpoint is damaged, or of a run with other settings.
        """
        if self.path is None or not self.path.exists():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(
                f"checkpoint {self.path} cannot be read ({error}); delete it to start anew"
            ) from error
        settings = json.loads(metadata["settings"])
        if settings != json.loads(json.dumps(self.settings)):
            missing = object()  # a setting of None is one
            changed = sorted(
                k
                for k in settings.keys() | self.settings.keys()
                if settings.get(k, missing) != self.settings.get(k, missing)
            )
            raise ModelFolderError(
                f"checkpoint {self.path} is of a run with other {', '.join(changed)}; "
                "use the same settings or delete it to start anew"
            )
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return json.loads(metadata["history"])
