"""The attacks the suite can run, and named sets of them, as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from otad.attacks.exact_gradient import exact_gradient
from otad.attacks.lines import lines
from otad.attacks.packages import autoattack, autoattack_parts
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel
from otad.attacks.transfer import noise, transfer

__all__ = ["ATTACKS", "SETS", "Attack", "choose"]


@dataclass(frozen=True)
class Attack:
    """An attack as the suite calls it.

    Attributes:
        run: (model, x, y, threat, knowledge, seed, **settings) -> x_adv.
        needs: the parts of `AttackerKnowledge` it cannot do without.
        costly: whether samples that an earlier attack broke are spared it.
        note: (number of classes, settings) -> what a reader should know.
    """

    run: Callable[..., Tensor]
    needs: frozenset[str] = frozenset()
    costly: bool = False
    note: Callable[[int, Mapping[str, Any]], str] = lambda n_classes, settings: ""


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
        if not missing:
            chosen[name] = settings
        elif is_set:
            left_out[name] = f"needs {', '.join(missing)}"
        else:
            raise ValueError(f"the attack {name} needs {', '.join(missing)} in the attacker's knowledge")
    return chosen, left_out


def _exact_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    knowledge: AttackerKnowledge,
    seed: int,
    **settings: Any,
) -> Tensor:
    return exact_gradient(model, x, y, threat, smoothed=knowledge.smoothed, seed=seed, **settings)


def _lines(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    knowledge: AttackerKnowledge,
    seed: int,
    **settings: Any,
) -> Tensor:
    assert knowledge.x_train is not None  # `choose` saw to it
    assert knowledge.y_train is not None  # it comes with x_train
    return lines(model, x, y, threat, x_train=knowledge.x_train, y_train=knowledge.y_train, seed=seed, **settings)


def _transfer(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    knowledge: AttackerKnowledge,
    seed: int,
    **settings: Any,
) -> Tensor:
    assert knowledge.backbone is not None  # `choose` saw to it
    return transfer(model, x, y, threat, source=knowledge.backbone, smoothed=knowledge.smoothed, seed=seed, **settings)


def _autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    knowledge: AttackerKnowledge,
    seed: int,
    **settings: Any,
) -> Tensor:
    return autoattack(model, x, y, threat, seed=seed, **settings)


def _noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    knowledge: AttackerKnowledge,
    seed: int,
    **settings: Any,
) -> Tensor:
    return noise(model, x, y, threat, seed=seed, **settings)


ATTACKS: dict[str, Attack] = {
    "exact_gradient": Attack(_exact_gradient),
    "targeted": Attack(_exact_gradient),
    "lines": Attack(_lines, needs=frozenset({"x_train"})),
    "transfer": Attack(_transfer, needs=frozenset({"backbone"})),
    "autoattack": Attack(
        _autoattack,
        costly=True,
        note=lambda n_classes, settings: (
            f"only its part {', '.join(settings['parts'])}"
            if settings.get("parts")
            else autoattack_parts(n_classes, settings.get("version", "standard"))[1]
        ),
    ),
    "noise": Attack(_noise),
}

# Later attacks meet fewer survivors, so the cheap ones come first.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    # Short targeted runs break more than one long untargeted run at the same price.
    "quick": {
        "lines": {"neighbors": 3, "points": 2, "bisections": 0},
        "exact_gradient": {"losses": (), "n_targets": 2, "steps": 20},
        "transfer": {"losses": ("margin",), "steps": 40, "refine_steps": 10},
    },
    # As quick, with the first part of AutoAttack on what is neither broken nor proven.
    "demo": {
        "lines": {"neighbors": 3, "points": 2, "bisections": 0},
        "exact_gradient": {"losses": (), "n_targets": 2, "steps": 20},
        "transfer": {"losses": ("margin",), "steps": 40, "refine_steps": 10},
        "autoattack": {"parts": ("apgd-ce",)},
    },
    "standard": {
        "lines": {"neighbors": 10, "points": 5},
        "exact_gradient": {"losses": ("margin", "ce"), "steps": 100},
        "targeted": {"losses": (), "n_targets": 9, "steps": 100},
        "transfer": {"losses": ("margin", "ce"), "steps": 100, "refine_steps": 50},
        "autoattack": {"version": "standard"},
    },
    "strong": {
        "lines": {"neighbors": 50, "points": 8},
        "exact_gradient": {"losses": ("margin", "ce", "dlr"), "steps": 300, "restarts": 5},
        "targeted": {"losses": (), "n_targets": 9, "steps": 300, "restarts": 2},
        "transfer": {"losses": ("margin", "ce"), "steps": 300, "refine_steps": 300},
        "autoattack": {"version": "standard"},
    },
}
