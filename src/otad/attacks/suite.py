"""Many attacks on many samples, and what each of them found."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from otad.attacks.gradients import frozen, margin
from otad.attacks.kept import KeptResults
from otad.attacks.outcome import Outcome
from otad.attacks.sets import ATTACKS, Attack, choose
from otad.attacks.threat_model import AttackerKnowledge, ThreatModel

__all__ = ["Outcome", "run_attacks", "worst_case"]

logger = logging.getLogger(__name__)


def run_attacks(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    threat: ThreatModel,
    attacks: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = "standard",
    *,
    knowledge: AttackerKnowledge | None = None,
    previous: Mapping[str, Outcome] | None = None,
    only_survivors: bool = True,
    proven: Bool[Tensor, " n"] | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: bool = False,
    kept: KeptResults | None = None,
) -> dict[str, Outcome]:
    """Run every attack on all samples the model gets right; each result is judged by the model itself and by
    the budget.

    Each attack's own share is over all samples. With `only_survivors` the costly attacks (AutoAttack) run
    only on samples that no
    earlier attack broke, and those broken earlier count as broken for them too, with the example that broke
    them: the worst case is the same either way, and the outcome's note says so.

    Args:
        model: inputs -> logits; run in evaluation mode, left in the mode it was in.
        x: samples, inside the box of the threat model.
        y: their true class indices.
        threat: norm, budget, box.
        attacks: the name of a set, names of attacks, or names with settings (see `SETS` and `ATTACKS`).
        knowledge: what the attacker knows beside the model.
        previous: outcomes of the same attacks for a smaller budget of the same norm: what they broke is
            broken here.
        only_survivors: spare costly attacks the samples broken before.
        proven: samples certified at this budget; costly attacks are spared them (the others test the proof).
        batch_size: samples attacked together.
        seed: of all random numbers.
        progress: show a bar for each attack.
        kept: results of an earlier, interrupted evaluation: what is there is not run again, what is not is added.

    Returns:
        attack -> Outcome, in the order they ran.

    Raises:
        ValueError: an unknown attack, or one whose needs the knowledge does not meet.
        MissingExtraError: an attack's package is not installed.
    """
    knowledge = (knowledge or AttackerKnowledge()).about(model)
    chosen, _ = choose(attacks, knowledge)
    proven = None if proven is None else proven.to(x.device)
    outcomes: dict[str, Outcome] = {}
    with frozen(model, knowledge.backbone, *knowledge.relatives):
        clean_margin, correct = _judge(model, x, y, batch_size)
        n_classes = _n_classes(model, x)
        untouched = Outcome(x, correct, clean_margin, 0.0, 0.0)
        for name, settings in chosen.items():
            attack = ATTACKS[name]
            known = (previous or {}).get(name, untouched)
            note = attack.note(n_classes, settings)
            settings = dict(settings)
            costly = settings.pop("only_survivors", attack.costly)
            if costly and only_survivors and outcomes:
                known = _worse(known, *outcomes.values())
                note = "; ".join(filter(None, [note, "run only on samples no earlier attack broke"]))
            spared = proven if costly else None
            if spared is not None:
                note = "; ".join(filter(None, [note, "samples certified at the budget spared"]))
            start = _with_kept(untouched, known, threat)
            label = f"{threat.norm} {threat.eps:g} {name}"
            key = kept.key(threat, name, settings, start, spared) if kept is not None else ""
            outcome = kept.read(key, x) if kept is not None else None
            if outcome is None:
                shown = label if progress else None
                outcome = _run(attack, settings, start, model, x, y, threat, knowledge, batch_size, seed, shown, spared)
                if kept is not None:
                    kept.write(key, outcome, {"attack": name, "settings": settings, "budget": threat.key})
            note = "; ".join(filter(None, [note, outcome.note]))
            outcomes[name] = replace(outcome, note=note, inherited=bool(costly and only_survivors and outcomes))
    return outcomes


def worst_case(outcomes: Mapping[str, Outcome]) -> Outcome:
    """Per sample the worst of all outcomes: survived only where it survived every attack."""
    first, *rest = outcomes.values()
    return _worse(first, *rest)


def _run(
    attack: Attack,
    settings: Mapping[str, Any],
    start: Outcome,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    knowledge: AttackerKnowledge,
    batch_size: int,
    seed: int,
    label: str | None,
    spared: Tensor | None,
) -> Outcome:
    """The attack on every row that survives in `start` and is not spared."""
    began = time.perf_counter()
    counted = _Counted(model)
    if knowledge.smoothed is not None:
        knowledge = replace(knowledge, smoothed=cache(_counting(knowledge.smoothed, counted)))
    x_adv = start.x_adv.clone()
    attacked = start.survived if spared is None else start.survived & ~spared
    rows = attacked.nonzero().squeeze(1)
    with tqdm(total=len(rows), desc=label, unit="sample", leave=False, disable=label is None) as bar:
        for number, part in enumerate(rows.split(batch_size)):
            if len(part):
                x_adv[part] = attack.run(counted, x[part], y[part], threat, knowledge, seed + number, **settings)
                bar.update(len(part))
    seconds = time.perf_counter() - began
    inside = threat.contains(x_adv, x)
    outside = int((~inside).sum())
    if outside:
        logger.warning("%d results of an attack lay outside the budget and were dropped", outside)
        x_adv[~inside] = x[~inside]
    note = f"{outside} results outside the budget dropped" if outside else ""
    # Rows that were not attacked keep their verdict: it was reached in a batch of the same kind.
    margins, survived = start.margin.clone(), start.survived.clone()
    if len(rows):
        margins[rows], survived[rows] = _judge(model, x_adv[rows], y[rows], batch_size)
    return Outcome(x_adv, survived, margins, seconds, counted.queries / max(1, len(x)), note)


def _judge(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Margin and whether the answer is right, for every row."""
    margins, correct = [x.new_zeros(0)], [torch.zeros(0, dtype=torch.bool, device=x.device)]
    with torch.no_grad():
        for x_part, y_part in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(x_part)
            margins.append(margin(logits, y_part).to(x.dtype))
            correct.append(logits.argmax(dim=1) == y_part)
    return torch.cat(margins), torch.cat(correct)


def _n_classes(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return model(x[:1]).shape[1]


def _worse(first: Outcome, *others: Outcome) -> Outcome:
    """Row by row the worst: broken beats survived, then the higher margin; times and queries add up."""
    x_adv, survived, margins = first.x_adv, first.survived, first.margin
    for other in others:
        worse = (survived & ~other.survived) | ((survived == other.survived) & (other.margin > margins))
        x_adv = torch.where(worse.view(-1, *([1] * (x_adv.ndim - 1))), other.x_adv, x_adv)
        survived = torch.where(worse, other.survived, survived)
        margins = torch.where(worse, other.margin, margins)
    outcomes = (first, *others)
    return Outcome(x_adv, survived, margins, sum(o.seconds for o in outcomes), sum(o.queries for o in outcomes))


def _with_kept(untouched: Outcome, known: Outcome, threat: ThreatModel) -> Outcome:
    """The untouched samples, with those examples of `known` that break within this budget too."""
    kept = untouched.survived & ~known.survived & threat.contains(known.x_adv, untouched.x_adv)
    x_adv = torch.where(kept.view(-1, *([1] * (known.x_adv.ndim - 1))), known.x_adv, untouched.x_adv)
    margins = torch.where(kept, known.margin, untouched.margin)
    return replace(untouched, x_adv=x_adv, survived=untouched.survived & ~kept, margin=margins)


class _Counted(nn.Module):
    """Counts the samples that pass through a model."""

    def __init__(self, model: nn.Module, shared: "_Counted | None" = None) -> None:
        super().__init__()
        self.model = model
        self.queries = 0
        self._sums = [self if shared is None else shared]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        self._sums[0].queries += len(x)
        return self.model(x)


def _counting(smoothed: Callable[[float], nn.Module], counter: _Counted) -> Callable[[float], nn.Module]:
    def make(factor: float) -> nn.Module:
        return _Counted(smoothed(factor).eval(), counter)

    return make
