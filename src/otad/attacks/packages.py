"""Attacks from other packages, brought to our shapes, boxes and budgets."""

import importlib
import logging
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.attacks.best import Best
from otad.attacks.frame import Frame, Framed
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
SQUARE_QUERIES = 5000  # as published


def autoattack(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, " batch"],
    threat: ThreatModel,
    *,
    version: Version = "standard",
    parts: tuple[str, ...] | None = None,
    square_queries: int = SQUARE_QUERIES,
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
    frame = Frame.around(x, threat)
    attacker = _attacker(
        package,
        Framed(model, frame, n_classes, x.dtype),
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


def _pyautoattack() -> Any:
    try:
        return importlib.import_module("pyautoattack")
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyautoattack", "attacks") from error


def _attacker(
    package: Any,
    framed: Framed,
    frame: Frame,
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
