"""Results of finished attacks on disk, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from otad.attacks.outcome import Outcome
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.files import plain, replacing_file, write_json

__all__ = ["KeptResults"]

logger = logging.getLogger(__name__)

PROBES = 16  # samples on which the functions among the attacker's knowledge are compared


class KeptResults:
    """One pair of files for each finished (budget, attack): KEY.safetensors for the numbers, KEY.json for the words.

    The key is a digest of everything that the result depends on: the model's weights and its logits on the samples,
    the samples and labels, the attacker's knowledge, budget, attack, settings, seed and batch size, the samples that
    were broken or spared before, and the versions of otad and PyTorch. A result of anything else has another key, so
    a stale one is never used. Logits are compared bit by bit: another number of threads may already change the key,
    and then the attack is run again.

    Args:
        folder: made where it is missing.
        model: inputs -> logits, in evaluation mode.
        x: the attacked samples.
        y: their classes.
        knowledge: what the attacker knows.
        seed: of all random numbers.
        batch_size: samples attacked together.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        knowledge: AttackerKnowledge,
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        base = hashlib.sha256()
        versions = {name: importlib.metadata.version(name) for name in ("otad", "torch")}
        _add(base, {"versions": versions, "seed": seed, "batch_size": batch_size, "model": type(model).__qualname__})
        for module in (model, knowledge.backbone, *knowledge.relatives):
            for name, tensor in _tensors(module):
                _add(base, name, tensor)
        with torch.no_grad():
            _add(base, x, y, *(model(part) for part in x.split(batch_size)), knowledge.x_train, knowledge.y_train)
            probes = x[:PROBES]
            _add(base, None if knowledge.smoothed is None else knowledge.smoothed(0.1)(probes))
            _add(base, None if knowledge.embedding is None else knowledge.embedding(probes))
        self._base = base

    def key(
        self, threat: ThreatModel, attack: str, settings: Mapping[str, Any], start: Outcome, spared: Tensor | None
    ) -> str:
        """The name under which the result of this attack is kept."""
        digest = self._base.copy()
        _add(digest, {"norm": threat.norm, "eps": threat.eps, "box": threat.box, "attack": attack})
        _add(digest, dict(settings), start.x_adv, start.survived, spared)
        return f"{threat.norm}-{threat.eps:g}-{attack}-{digest.hexdigest()[:24]}"

    def read(self, key: str, x: Tensor) -> Outcome | None:
        """The result, or None where there is none; a damaged one is reported, and run again."""
        words, numbers = self._paths(key)
        if not (words.is_file() and numbers.is_file()):
            return None
        try:
            facts, tensors = json.loads(words.read_text(encoding="utf-8")), load_file(numbers)
            x_adv, survived, margin = (tensors[name].to(x.device) for name in ("x_adv", "survived", "margin"))
            return Outcome(x_adv, survived, margin, facts["seconds"], facts["queries"], facts["note"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("the kept result %s is damaged (%s); the attack is run again", words, error)
            return None

    def write(self, key: str, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        """Keep a result; the words come last, so that half a result is none."""
        words, numbers = self._paths(key)
        tensors = {"x_adv": outcome.x_adv, "survived": outcome.survived, "margin": outcome.margin}
        with replacing_file(numbers) as aside:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, aside)
            aside.chmod(0o644)  # the library writes files that only their owner can read
        more = {"seconds": outcome.seconds, "queries": outcome.queries, "note": outcome.note}
        write_json(words, dict(facts) | more)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.json", self.folder / f"{key}.safetensors"


def _tensors(module: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, also those that a state dict leaves out."""
    return [] if module is None else [*module.named_parameters(), *module.named_buffers()]


def _add(digest: Any, *parts: Tensor | Mapping[str, Any] | str | None) -> None:
    """Feed numbers or words, each with its kind and length, so that no two different lists look alike."""
    for part in parts:
        if isinstance(part, Tensor):
            array = part.detach().cpu().contiguous().numpy()
            head, body = f"{array.dtype}{array.shape}", array.tobytes()
        else:
            head, body = "json", json.dumps(plain(part), sort_keys=True).encode()
        digest.update(f"{head}:{len(body)}:".encode())
        digest.update(body)
