"""The attacks the suite can run, and named sets of them, as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor, nn

from otad.attacks.bpda import bpda
from otad.attacks.cells import nearest_cells
from otad.attacks.exact_gradient import exact_gradient
from otad.attacks.foolbox import decision_based, minimal_norm
from otad.attacks.lines import lines
from otad.attacks.packages import SQUARE_QUERIES, autoattack, autoattack_parts
from otad.attacks.retrieval import joint, retrieval
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.attacks.transfer import noise, transfer

__all__ = ["ATTACKS", "SETS", "Attack", "choose"]


# What an attack knows: the model itself ("white"), another network ("transfer"), logits or labels ("black"), nothing
# ("noise"), or a protocol kept for comparison alone, which supports no claim ("published").
Kind = Literal["white", "transfer", "black", "noise", "published"]


@dataclass(frozen=True)
class Attack:
    """An attack as the suite calls it.

    Attributes:
        function: (model, x, y, threat, seed=, **parts of the knowledge, **settings) -> x_adv.
        kind: what it knows; the audit compares kinds.
        takes: keyword of the function -> the part of `AttackerKnowledge` it is given, None where that is missing.
        needs: the parts of `AttackerKnowledge` it cannot do without.
        package: what it needs installed beside the core.
        costly: whether it is spared the samples that an earlier attack broke or that are certified at the budget; the
            setting "only_survivors" overrules it.
        note: (number of classes, settings) -> what a reader should know.
    """

    function: Callable[..., Tensor]
    kind: Kind = "white"
    takes: Mapping[str, str] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    package: str | None = None
    costly: bool = False
    note: Callable[[int, Mapping[str, Any]], str] = lambda n_classes, settings: ""

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        knowledge: AttackerKnowledge,
        seed: int,
        **settings: Any,
    ) -> Tensor:
        """The function with what it takes of the knowledge; returns x_adv."""
        parts = {keyword: getattr(knowledge, part) for keyword, part in self.takes.items()}
        return self.function(model, x, y, threat, **parts, seed=seed, **settings)


def choose(
    attacks: str | Sequence[str] | Mapping[str, Mapping[str, Any]], knowledge: AttackerKnowledge
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The attacks to run with their settings, and those of a named set that cannot run, with the reason.

    An attack named by itself must be able to run; a set leaves out the attacks whose needs are not met.
    Attacks named without settings get those of the set "standard".

    Raises:
        ValueError: an unknown name, or an attack named by itself whose needs are not met.
    """
    is_set = isinstance(attacks, str) and attacks in SETS
    if isinstance(attacks, str):
        attacks = SETS[attacks] if is_set else [attacks]
    if not isinstance(attacks, Mapping):
        attacks = {name: SETS["standard"].get(name, {}) for name in attacks}
    if not attacks:
        raise ValueError("no attack was named")
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown:
        raise ValueError(f"unknown attack {', '.join(unknown)}; sets: {', '.join(SETS)}; attacks: {', '.join(ATTACKS)}")
    chosen: dict[str, Mapping[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name, settings in attacks.items():
        missing = sorted(part for part in ATTACKS[name].needs if getattr(knowledge, part) is None)
        package = ATTACKS[name].package
        if is_set and package is not None and find_spec(package) is None:
            left_out[name] = f"needs the package {package}: pip install 'otad[attacks]'"
        elif not missing:
            chosen[name] = settings
        elif is_set:
            left_out[name] = f"needs {', '.join(missing)}"
        else:
            raise ValueError(f"the attack {name} needs {', '.join(missing)} in the attacker's knowledge")
    return chosen, left_out


def _about_autoattack(n_classes: int, settings: Mapping[str, Any]) -> str:
    parts = settings.get("parts")
    if parts:
        notes = [f"only its part {', '.join(parts)}"]
    else:
        parts, missing = autoattack_parts(n_classes, settings.get("version", "standard"))
        notes = [missing] if missing else []
    queries = settings.get("square_queries", SQUARE_QUERIES)
    if "square" in parts and queries != SQUARE_QUERIES:
        notes.append(f"Square with {queries:,} queries, not the published {SQUARE_QUERIES:,}")
    return "; ".join(notes)


POINTS = {"x_train": "x_train", "y_train": "y_train"}
RETRIEVAL = POINTS | {"embedding": "embedding"}
SMOOTHED = {"smoothed": "smoothed"}
SOURCES = {"source": "backbone", "relatives": "relatives"}

ATTACKS: dict[str, Attack] = {
    "lines": Attack(lines, takes=POINTS, needs=frozenset({"x_train"})),
    "nearest_cells": Attack(nearest_cells, takes={"cells": "cells"}, needs=frozenset({"cells"})),
    "short_gradient": Attack(exact_gradient, takes=SMOOTHED),
    "exact_gradient": Attack(exact_gradient, takes=SMOOTHED),
    "targeted": Attack(exact_gradient, takes=SMOOTHED),
    "retrieval": Attack(retrieval, takes=RETRIEVAL | SMOOTHED, needs=frozenset({"x_train", "embedding"})),
    "joint": Attack(joint, takes=RETRIEVAL, needs=frozenset({"x_train", "embedding"})),
    "transfer": Attack(transfer, "transfer", takes=SOURCES | SMOOTHED, needs=frozenset({"backbone"})),
    "bpda": Attack(
        bpda,
        "published",
        takes={"backbone": "backbone"},
        needs=frozenset({"backbone"}),
        note=lambda n_classes, settings: "published protocol, weak: for comparison only",
    ),
    "autoattack": Attack(autoattack, "black", costly=True, note=_about_autoattack),
    "minimal_norm": Attack(minimal_norm, package="foolbox", costly=True),
    "decision_based": Attack(
        decision_based,
        "black",
        takes=POINTS,
        package="foolbox",
        costly=True,
        note=lambda n_classes, settings: f"about {settings.get('queries', 2000):,} queries a sample",
    ),
    "noise": Attack(noise, "noise"),
}

SURVIVORS: dict[str, Any] = {"only_survivors": True}

# Short targeted runs break more than one long untargeted run at the same price.
QUICK: dict[str, dict[str, Any]] = {
    "lines": {"neighbors": 3, "points": 2, "bisections": 0},
    "nearest_cells": {"neighbors": 5},
    "exact_gradient": {"losses": (), "n_targets": 2, "steps": 20},
    "retrieval": {"n_targets": 2, "steps": 10, "refine_steps": 10},
    "joint": {"n_targets": 2, "steps": 10},
    "transfer": {"losses": ("margin",), "steps": 40, "refine_steps": 10},
}

# Later attacks meet fewer survivors, so the cheap ones come first; white-box attacks come before all others, so that
# what these add is seen.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": QUICK,
    # With the first part of AutoAttack on what is neither broken nor proven.
    "demo": QUICK | {"autoattack": {"parts": ("apgd-ce",)}},
    # Lines and a short run on every sample, also the proven ones: they test the proof. The rest on what is left.
    "standard": {
        "lines": {"neighbors": 3, "points": 3, "bisections": 4},
        "nearest_cells": {"neighbors": 20},
        "short_gradient": {"losses": ("margin",), "steps": 20},
        "exact_gradient": {"losses": ("margin", "ce"), "steps": 100} | SURVIVORS,
        "targeted": {"losses": (), "n_targets": 3, "steps": 100} | SURVIVORS,
        "retrieval": {"steps": 20, "refine_steps": 50} | SURVIVORS,
        "joint": {"n_targets": 3, "steps": 20} | SURVIVORS,
        "transfer": {"losses": ("margin", "ce"), "steps": 100, "refine_steps": 50} | SURVIVORS,
        "autoattack": {"version": "standard", "square_queries": 1000},
        "minimal_norm": {"steps": 100},
        "decision_based": {"queries": 1000},
    },
    "strong": {
        "lines": {"neighbors": 50, "points": 8},
        "nearest_cells": {"neighbors": 50},
        "short_gradient": {"losses": ("margin",), "steps": 20},
        "exact_gradient": {"losses": ("margin", "ce", "dlr"), "steps": 300, "restarts": 5},
        "targeted": {"losses": (), "n_targets": 9, "steps": 300, "restarts": 2},
        "retrieval": {"guides": 10, "steps": 50, "refine_steps": 300},
        "joint": {"n_targets": 9, "steps": 100},
        "transfer": {"losses": ("margin", "ce"), "steps": 300, "refine_steps": 300},
        "autoattack": {"version": "standard"},
        "minimal_norm": {"steps": 300, "n_targets": 9},
        "decision_based": {"queries": 10000},
    },
}
