"""Attacks from other packages, brought to our shapes, boxes and budgets."""

import importlib
import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.best import Best
from otad.attacks.threat_model import ThreatModel
from otad.errors import MissingExtraError

__all__ = ["autoattack", "autoattack_parts"]

Version = Literal["standard", "plus"]

PARTS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
}
NEED_FOUR_CLASSES = {"apgd-t"}  # the targeted DLR loss sorts four logits
NEED_THREE_CLASSES = {"apgd-dlr"}
TARGETS = 9  # as published


def autoattack(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    version: Version = "standard",
    parts: tuple[str, ...] | None = None,
    square_queries: int = 5000,
    seed: int = 0,
) -> Float[Tensor, "batch ..."]:
    """AutoAttack from the package pyautoattack, its parts in their published settings, each on what the last
    one left.

    Any shape, box and number of classes works: samples are laid out as images and mapped to [0, 1] (for an
    attacker without a box by a range that never binds), and with fewer than four classes the parts that
    cannot run are left out (`autoattack_parts` says which). What comes back is projected into the budget
    again and judged by the model itself.

    Args:
        model: inputs -> logits.
        x: samples, inside the box of the threat model.
        y: their true classes.
        threat: norm, budget, box.
        version: the published set of parts.
        parts: run these instead.
        square_queries: length of the random search, 5,000 as published.
        seed: of all its random numbers; the global generator is left as it was.

    Returns:
        one input a row inside the budget and box: misclassified where the attack succeeded, else the one of
            highest margin seen.

    Raises:
        MissingExtraError: pyautoattack is not installed.
        ValueError: an unknown version or part.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690.
    """
    package = _pyautoattack()
    with torch.no_grad():
        n_classes = model(x[:1]).shape[1]
    chosen = autoattack_parts(n_classes, version)[0] if parts is None else parts
    unknown = set(chosen) - set(PARTS["plus"])
    if unknown:
        raise ValueError(
            f"unknown parts of AutoAttack: {', '.join(sorted(unknown))}; known: {', '.join(PARTS['plus'])}"
        )
    frame = _Frame.around(x, threat)
    attacker = _attacker(
        package,
        _Framed(model, frame, n_classes, x.dtype),
        frame,
        threat,
        n_classes,
        version,
        square_queries,
        x.device,
    )
    best = Best(x, y)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for part in chosen:
            rows = best.rows_left()
            if len(rows) == 0:
                break
            moved = _perturb(attacker, part, frame.pack(x[rows]), y[rows], seed)
            with torch.no_grad():
                candidates = threat.project(frame.unpack(moved).to(x), x[rows])
                best.offer(rows, candidates, model(candidates))
    return best.x_adv


def autoattack_parts(n_classes: int, version: Version = "standard") -> tuple[tuple[str, ...], str]:
    """The parts that can run with so many classes, and a sentence for the reader, empty where all can.

    Raises:
        ValueError: an unknown version.
    """
    if version not in PARTS:
        raise ValueError(f"version must be one of {', '.join(PARTS)}, not {version!r}")
    missing = (NEED_FOUR_CLASSES if n_classes < 4 else set()) | (NEED_THREE_CLASSES if n_classes < 3 else set())
    parts = tuple(part for part in PARTS[version] if part not in missing)
    left_out = [part for part in PARTS[version] if part in missing]
    note = f"AutoAttack without {', '.join(left_out)}: its loss needs more than {n_classes} classes" if left_out else ""
    return parts, note


@dataclass(frozen=True)
class _Frame:
    """How samples become images in [0, 1] and back: u = (x - low) / width, padded where needed."""

    shape: tuple[int, ...]  # of one sample
    layout: tuple[int, int, int]  # before padding
    padded: tuple[int, int, int]
    low: float
    width: float

    @staticmethod
    def around(x: Tensor, threat: ThreatModel) -> "_Frame":
        shape = tuple(x.shape[1:])
        if threat.box is not None:
            low, high = threat.box
        else:
            # Wide enough that clamping to [0, 1] never holds back a point of the budget, nor FAB's steps
            # beyond it.
            low, high = float(x.min()) - 4 * threat.eps, float(x.max()) + 4 * threat.eps
        if len(shape) == 3:
            layout = (shape[0], shape[1], shape[2])
            padded = layout if threat.norm == "linf" or _tiles(layout) else _padded(layout)
        else:
            d = math.prod(shape)
            # Square lays its first guess for L2 in fifths of the height: five rows always come out even.
            rows = 5 if threat.norm == "l2" else 1
            layout = (1, 1, d)
            padded = (1, rows, math.ceil(d / rows))
        return _Frame(shape, layout, padded, low, high - low)

    def pack(self, x: Tensor) -> Tensor:
        u = ((x - self.low) / self.width).clamp(0.0, 1.0)
        if self.padded == self.layout:
            return u.reshape(len(x), *self.padded).float()
        if len(self.shape) == 3:
            right, below = self.padded[2] - self.layout[2], self.padded[1] - self.layout[1]
            return nn.functional.pad(u, (0, right, 0, below), value=0.5).float()
        extra = math.prod(self.padded) - math.prod(self.layout)
        return nn.functional.pad(u.flatten(1), (0, extra), value=0.5).reshape(len(x), *self.padded).float()

    def unpack(self, u: Tensor) -> Tensor:
        if len(self.shape) == 3:
            u = u[:, :, : self.layout[1], : self.layout[2]]
        else:
            u = u.flatten(1)[:, : math.prod(self.layout)]
        return self.low + self.width * u.reshape(len(u), *self.shape)


class _Framed(nn.Module):
    """The model as AutoAttack wants it: images in [0, 1] -> fresh logits (Square writes into them)."""

    def __init__(self, model: nn.Module, frame: _Frame, n_classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.frame = frame
        self.n_classes = n_classes
        self.dtype = dtype

    def forward(self, u: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        if len(u) == 0:
            return u.new_zeros(0, self.n_classes)
        return self.model(self.frame.unpack(u).to(self.dtype)).float().clone()


def _tiles(layout: tuple[int, int, int]) -> bool:
    """Whether Square's first guess for L2, tiles of a fifth of the height, stays inside such an image."""
    tile = layout[1] // 5
    first = (layout[1] - 5 * tile) // 2
    return tile >= 1 and all(tile == 1 or first + tile * (side // tile) <= side for side in layout[1:])


def _padded(layout: tuple[int, int, int]) -> tuple[int, int, int]:
    side = 5 * math.ceil(max(layout[1:]) / 5)
    return layout[0], side, side


def _pyautoattack() -> Any:
    try:
        return importlib.import_module("pyautoattack")
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyautoattack", "attacks") from error


def _attacker(
    package: Any,
    framed: _Framed,
    frame: _Frame,
    threat: ThreatModel,
    n_classes: int,
    version: Version,
    square_queries: int,
    device: torch.device,
) -> Any:
    attacker = package.AutoAttack(
        framed,
        norm="L2" if threat.norm == "l2" else "Linf",
        eps=threat.eps / frame.width,
        version=version,
        device=device,
    )
    # Its own warnings (zero gradients, flags) are the audit's business; they must not reach the terminal.
    quiet = logging.Logger("autoattack")
    quiet.addHandler(logging.NullHandler())
    attacker.apgd.logger = attacker.apgd_targeted.logger = quiet
    attacker.apgd_targeted.n_target_classes = min(TARGETS, n_classes - 1)
    attacker.fab.n_target_classes = min(TARGETS, n_classes - 1)
    attacker.square.n_queries = square_queries
    return attacker


def _perturb(attacker: Any, part: str, u: Tensor, y: Tensor, seed: int) -> Tensor:
    """One part of AutoAttack on one batch, as its own runner sets it up."""
    if part in ("apgd-ce", "apgd-dlr"):
        attacker.apgd.loss, attacker.apgd.seed = part.removeprefix("apgd-"), seed
        return attacker.apgd.perturb(u, y)
    if part == "apgd-t":
        attacker.apgd_targeted.seed = seed
        return attacker.apgd_targeted.perturb(u, y)
    if part == "square":
        attacker.square.seed = seed
        return attacker.square.perturb(u, y)
    attacker.fab.targeted, attacker.fab.seed = part == "fab-t", seed
    if attacker.fab.targeted:
        attacker.fab.n_restarts = 1
    return attacker.fab.perturb(u, y)
