import pytest
import torch
from torch import nn

from otad.attacks import AttackerKnowledge, ThreatModel, run_attacks, worst_case
from otad.attacks.sets import ATTACKS, SETS, choose
from tests.attacks.known import assert_within, linear, two_prototypes

FAST = {
    "lines": {"neighbors": 1, "points": 2},
    "exact_gradient": {"losses": ("margin",), "steps": 10},
    "transfer": {"steps": 5, "refine_steps": 5},
    "autoattack": {"square_queries": 10},
}


def knowledge_of(model) -> AttackerKnowledge:
    return AttackerKnowledge(model.prototypes, torch.tensor([0, 1]), backbone=model)


def test_every_attack_reports_what_it_found() -> None:
    model, x, y = two_prototypes()
    y = y.clone()
    y[0] = 1 - y[0]  # one sample the model gets wrong
    threat = ThreatModel("l2", float(model.distance(x, "l2").median()))
    outcomes = run_attacks(model, x, y, threat, FAST, knowledge=knowledge_of(model), batch_size=16)
    assert list(outcomes) == list(FAST)
    for outcome in outcomes.values():
        assert_within(outcome.x_adv, x, threat)
        assert torch.equal(outcome.survived, model(outcome.x_adv).argmax(dim=1) == y)
        assert not bool(outcome.survived[0])
        assert torch.equal(outcome.x_adv[0], x[0])
        assert outcome.seconds >= 0
    worst = worst_case(outcomes)
    assert torch.equal(worst.survived, torch.stack([o.survived for o in outcomes.values()]).all(dim=0))
    assert 0.4 < float(worst.survived.double().mean()) < 0.6


def test_queries_count_forward_passes() -> None:
    model, x, y = two_prototypes(n=10)
    threat = ThreatModel("l2", 1e-4)
    assert float(model.distance(x, "l2").min()) > threat.eps
    settings = {"exact_gradient": {"losses": ("margin",), "steps": 7}, "noise": {"draws": 3}}
    outcomes = run_attacks(model, x, y, threat, settings)
    assert outcomes["exact_gradient"].queries == 8  # the start and seven steps
    assert outcomes["noise"].queries == 3


def test_costly_attacks_spare_what_is_broken() -> None:
    model, x, y = two_prototypes(n=20)
    threat = ThreatModel("l2", 1.1 * float(model.distance(x, "l2").max()))
    outcomes = run_attacks(model, x, y, threat, FAST, knowledge=knowledge_of(model))
    assert outcomes["autoattack"].queries == 0
    assert not bool(outcomes["autoattack"].survived.any())
    assert "no earlier attack broke" in outcomes["autoattack"].note
    alone = run_attacks(model, x, y, threat, FAST, knowledge=knowledge_of(model), only_survivors=False)
    assert alone["autoattack"].queries > 0


def test_what_a_smaller_budget_broke_stays_broken() -> None:
    model, x, y = two_prototypes()
    distance = model.distance(x, "l2")
    small, large = (ThreatModel("l2", float(distance.quantile(q))) for q in (0.4, 0.6))
    settings = {"exact_gradient": {"losses": ("margin",), "steps": 10}}
    first = run_attacks(model, x, y, small, settings)
    second = run_attacks(model, x, y, large, settings, previous=first)["exact_gradient"]
    broken = ~first["exact_gradient"].survived
    assert not bool(second.survived[broken].any())
    assert torch.equal(second.x_adv[broken], first["exact_gradient"].x_adv[broken])
    assert second.queries < run_attacks(model, x, y, large, settings)["exact_gradient"].queries


def test_results_outside_the_budget_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = two_prototypes(n=6)
    cheat = ATTACKS["noise"].__class__(lambda model, x, *rest, **settings: x + 100)
    monkeypatch.setitem(ATTACKS, "noise", cheat)
    outcome = run_attacks(model, x, y, ThreatModel("l2", 0.1), ["noise"])["noise"]
    assert bool(outcome.survived.all())
    assert "outside the budget" in outcome.note


def test_training_mode_and_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 4))
    x = torch.randn(8, 8)
    y = model.eval()(x).argmax(dim=1)
    model.train()
    run_attacks(model, x, y, ThreatModel("l2", 0.1), {"autoattack": {"square_queries": 5}})
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", list(SETS))
def test_sets_name_known_attacks(name: str) -> None:
    assert set(SETS[name]) <= set(ATTACKS)
    chosen, left_out = choose(name, AttackerKnowledge())
    assert "exact_gradient" in chosen
    assert left_out.items() >= {"lines": "needs x_train", "transfer": "needs backbone"}.items()
    assert set(left_out) == {name for name in SETS[name] if ATTACKS[name].needs}


def test_a_set_goes_on_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otad.attacks.sets.find_spec", lambda name: None)
    chosen, left_out = choose("standard", AttackerKnowledge())
    assert "minimal_norm" not in chosen
    assert "otad[attacks]" in left_out["minimal_norm"]


def test_sets_say_where_square_is_shortened() -> None:
    def note(name: str) -> str:
        return ATTACKS["autoattack"].note(10, SETS[name]["autoattack"])

    assert "Square with 1,000 queries, not the published 5,000" in note("standard")
    assert not note("strong")


def test_settings_decide_who_is_spared() -> None:
    model, x, y = two_prototypes(n=20)
    threat = ThreatModel("l2", 1.1 * float(model.distance(x, "l2").max()))
    short = {"losses": ("margin",), "steps": 10}
    attacks = {"short_gradient": short, "exact_gradient": short | {"only_survivors": True}}
    outcomes = run_attacks(model, x, y, threat, attacks)
    assert outcomes["short_gradient"].queries > 0
    assert not outcomes["short_gradient"].inherited
    assert outcomes["exact_gradient"].queries == 0
    assert outcomes["exact_gradient"].inherited
    assert torch.equal(outcomes["exact_gradient"].x_adv, outcomes["short_gradient"].x_adv)


def test_quick_runs_on_any_model() -> None:
    model, x, y = linear(classes=3, d=6, n=12)
    threat = ThreatModel("linf", 1.05 * float(model.distance(x, "linf").max()))
    outcomes = run_attacks(model, x, y, threat, "quick")
    assert set(outcomes) == {"exact_gradient"}


def test_unknown_and_impossible_attacks_are_refused() -> None:
    model, x, y = linear(classes=3, d=6, n=2)
    threat = ThreatModel("l2", 0.1)
    with pytest.raises(ValueError, match="unknown attack magic"):
        run_attacks(model, x, y, threat, ["magic"])
    with pytest.raises(ValueError, match="needs x_train"):
        run_attacks(model, x, y, threat, ["lines"])
    with pytest.raises(ValueError, match="no attack"):
        run_attacks(model, x, y, threat, [])
