import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import otad.certificate as certificates
from otad.attacks import AttackerKnowledge, ThreatModel
from otad.baselines import NearestNeighbor
from otad.certificate import certify
from otad.cip import PowerDiagram
from otad.defense import OTAD, CellInterpolation, identity_head
from otad.estimator import OTADClassifier
from otad.evaluation import evaluate, evidence
from otad.nn import CenteredFlatten
from tests.attacks.known import Linear, linear

FAST = {"exact_gradient": {"losses": ("margin",), "n_targets": 2, "steps": 15}}


def certificate_of(model: Linear, x: Tensor, factor: float = 1.0) -> certificates.Certificate:
    """The exact radii of a linear model, times a factor."""
    radius = model.distance(x, "l2").numpy() * factor
    label = model(x).argmax(dim=1).numpy()
    return certificates.Certificate(label=label, radius=radius, kind=np.full(len(x), "global"))


def budgets(model: Linear, x: Tensor) -> list[ThreatModel]:
    distance = model.distance(x, "l2")
    return [ThreatModel("l2", round(float(distance.quantile(q)), 3)) for q in (0.2, 0.5, 0.8)]


def test_a_linear_model_gets_its_exact_numbers() -> None:
    model, x, y = linear(classes=3, d=8, n=100)
    y = y.clone()
    y[:10] = (y[:10] + 1) % 3
    threats = budgets(model, x)
    report = evaluate(model, x.numpy(), y.numpy(), threats, FAST, certificate=certificate_of(model, x), name="linear")
    assert report.clean_accuracy == pytest.approx(0.9)
    distance, correct = model.distance(x, "l2"), model(x).argmax(dim=1) == y
    for threat in threats:
        exact = float(((distance > threat.eps) & correct).double().mean())
        assert report.robust_accuracy[threat.key]["worst_case"] == pytest.approx(exact, abs=0.02)
        assert report.certified_accuracy[threat.key] == pytest.approx(exact, abs=1e-9)
        assert report.certified_accuracy[threat.key] <= report.robust_accuracy[threat.key]["worst_case"]
    failed = {name: check for name, check in report.audit.items() if check.passed is False}
    assert not failed
    assert not report.contradictions()
    assert set(report.audit) == {
        "certified_attacked_clean", "attack_order", "never_rises", "zero_at_large_eps", "finite_differences",
        "zero_gradients", "deterministic", "batch_invariant", "never_rises_with_steps", "never_rises_with_restarts",
        "transfer_over_noise", "black_box_adds",
    }  # fmt: skip
    assert report.attack_cost["exact_gradient"]["queries"] > 0
    assert json.loads(report.to_json())["robust_accuracy"]


@pytest.mark.parametrize("own", [True, False])
def test_transfer_is_held_against_noise_where_it_comes_from_the_model_s_own_backbone(own: bool) -> None:
    model, x, y = linear(classes=3, d=8, n=60)
    opposite = nn.Linear(8, 3)
    opposite.load_state_dict({name: -value for name, value in model.state_dict().items() if name in ("weight", "bias")})
    knowledge = AttackerKnowledge(backbone=opposite, own_backbone=own)
    report = evaluate(model, x, y, budgets(model, x), FAST, knowledge=knowledge)
    assert report.audit["transfer_over_noise"].passed is (False if own else None)


def test_a_certificate_five_percent_too_large_is_caught() -> None:
    model, x, y = linear(classes=3, d=8, n=60)
    report = evaluate(model, x, y, budgets(model, x), FAST, certificate=certificate_of(model, x, 1.05))
    assert report.audit["certified_attacked_clean"].passed is False


def test_conditional_rows_never_count_as_certified() -> None:
    model, x, y = linear(classes=3, d=8, n=20)
    honest = certificate_of(model, x)
    conditional = certificates.Certificate(honest.label, honest.radius * 9, np.full(20, "conditional"))
    report = evaluate(model, x, y, budgets(model, x), FAST, certificate=conditional)
    assert set(report.certified_accuracy.values()) == {0.0}
    assert report.audit["certified_attacked_clean"].passed
    randomised = certificates.Certificate(honest.label, honest.radius, np.full(20, "randomised"))
    with pytest.raises(ValueError, match="randomised"):
        evaluate(model, x, y, budgets(model, x), FAST, certificate=randomised)


class Fake(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Detached(Fake):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


class Saturated(Fake):
    def forward(self, x: Tensor) -> Tensor:
        return (1e4 * self.inner(x)).softmax(dim=1)


class Rounded(Fake):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.round())


class Randomised(Fake):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.05 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("fake", "caught_by"),
    [
        (Detached, {"zero_gradients", "finite_differences"}),
        (Saturated, {"zero_gradients"}),
        (Rounded, {"zero_gradients"}),
        (Randomised, {"deterministic"}),
    ],
)
def test_planted_fakes_are_caught(fake, caught_by: set[str]) -> None:
    inner, x, y = linear(classes=3, d=8, n=60)
    if fake is Rounded:
        inner = NearestNeighbor(x, y)
    model = fake(inner)
    torch.manual_seed(0)
    y = model(x).argmax(dim=1)
    report = evaluate(model, x, y, [ThreatModel("l2", 0.2)], FAST)
    failed = {name for name, check in report.audit.items() if check.passed is False}
    assert caught_by <= failed


def test_a_failed_audit_is_printed_as_such() -> None:
    inner, x, y = linear(classes=3, d=8, n=20)
    report = evaluate(Detached(inner), x, y, [ThreatModel("l2", 0.2)], FAST)
    assert report.audit_passed is False
    assert json.loads(report.to_json())["audit_passed"] is False
    table = report.table()
    assert "AUDIT FAILED" in table.splitlines()[2]
    assert "no claim" in table
    assert "Audit failed" in report.to_html()
    honest = evaluate(inner, x, y, [ThreatModel("l2", 0.2)], FAST)
    assert honest.audit_passed
    assert "FAILED" not in honest.table()


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["global", "neighborhood", None])
def test_honest_networks_pass(interpolation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """OTAD in both forms, and the undefended network (None); a short audit, for time."""
    short = {"AUDIT_STEPS": 10, "STEPS": (5, 10), "RESTARTS": (1, 2), "BLACK_BOX_QUERIES": 100}
    for name, value in short.items():
        monkeypatch.setattr(evidence, name, value)
    generator = torch.Generator().manual_seed(0)
    centers = 1.5 * torch.randn(3, 6, generator=generator)
    y = torch.arange(240) % 3
    x = centers[y] + 0.5 * torch.randn(240, 6, generator=generator)
    # As published: the smallest L of each neighbourhood would be searched at every query.
    published = {"n_neighbors": 5, "strong_convexity": 0.0, "smoothness": 2.0}
    settings = published if interpolation == "neighborhood" else {}
    clf = OTADClassifier(interpolation=interpolation or "global", epochs=20, random_state=0, **settings)
    clf.fit(x[:180].numpy(), y[:180].numpy())
    x, y, train, labels = x[180:210], y[180:210], x[:180], y[:180]
    threats = [ThreatModel("l2", 0.4)]
    knowledge = AttackerKnowledge(train, labels, clf.backbone_)
    if interpolation is None:
        report = evaluate(clf.backbone_, x, y, threats, FAST, knowledge=AttackerKnowledge(train, labels))
    else:
        embedding = clf.module_.stem if interpolation == "neighborhood" else None
        knowledge = AttackerKnowledge(train, labels, clf.backbone_, clf.module_.smoothed, embedding)
        found = clf.certify(x.numpy())
        report = evaluate(clf.module_, x, y, threats, FAST, knowledge=knowledge, certificate=found)
        assert isinstance(report.audit["active_set"].value, float)
        assert report.audit["active_set"].value >= 1
        assert ("neighbor_changes" in report.audit) == (interpolation == "neighborhood")
    assert report.audit_passed, [name for name, check in report.audit.items() if check.passed is False]


def test_an_interrupted_evaluation_goes_on(tmp_path) -> None:
    model, x, y = linear(classes=3, d=8, n=20)
    threats = [ThreatModel("l2", eps) for eps in (0.1, 0.3)]
    part = evaluate(model, x, y, threats[:1], FAST, results_dir=tmp_path)
    whole = evaluate(model, x, y, threats, FAST, results_dir=tmp_path)
    again = evaluate(model, x, y, threats, FAST, results_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert again.attack_cost == whole.attack_cost  # seconds and all: read, not measured anew
    assert again.robust_accuracy == whole.robust_accuracy
    assert whole.robust_accuracy["0.1"] == part.robust_accuracy["0.1"]


def test_honest_models_pass_with_full_knowledge() -> None:
    torch.manual_seed(0)
    x_train = torch.rand(200, 1, 4, 4)
    y_train = (x_train.flatten(1)[:, :8].sum(dim=1) > x_train.flatten(1)[:, 8:].sum(dim=1)).long()
    model = NearestNeighbor(x_train, y_train)
    x = torch.rand(60, 1, 4, 4)
    certificate = model.certify(x)
    halves = torch.cat([torch.ones(8), -torch.ones(8)])
    backbone = nn.Sequential(nn.Flatten(), Linear(torch.stack([-halves, halves]), torch.zeros(2)))
    threats = [ThreatModel("l2", eps, (0.0, 1.0)) for eps in (0.3, 0.05)] + [ThreatModel("linf", 0.1, (0.0, 1.0))]
    report = evaluate(
        model,
        x,
        certificate.label,
        threats,
        "quick",
        certificate=certificate,
        knowledge=AttackerKnowledge(x_train, y_train, backbone),
    )
    assert {"lines", "exact_gradient", "transfer", "worst_case"} == set(report.robust_accuracy["0.3"])
    assert list(report.robust_accuracy) == ["0.3", "0.05", "linf:0.1"]
    assert report.robust_accuracy["0.3"]["worst_case"] <= report.robust_accuracy["0.05"]["worst_case"]
    assert not [name for name, check in report.audit.items() if check.passed is False], report.audit
    examples = report.examples
    assert examples is not None
    for threat in threats:
        x_adv = torch.as_tensor(examples.adversarial[threat.key])
        assert bool(threat.contains(x_adv, x).all())
        survived = model(x_adv).argmax(dim=1).numpy() == certificate.label
        assert (examples.survived[threat.key]["worst_case"] == survived).all()


def test_only_some_samples_attacked() -> None:
    model, x, y = linear(classes=3, d=8, n=40)
    report = evaluate(model, x, y, budgets(model, x), FAST, certificate=certificate_of(model, x), n_attacked=10)
    assert report.n_test == 40
    assert report.extra["n_attacked"] == 10
    assert report.extra["attacked_subset"]["clean_accuracy"] == 1.0
    assert report.examples is not None
    assert len(report.examples.rows()) == 10
    assert not report.contradictions()


def test_sets_say_what_they_left_out() -> None:
    model, x, y = linear(classes=3, d=8, n=10)
    report = evaluate(model, x, y, [ThreatModel("l2", 0.1)], "quick", examples=False)
    retrieval = dict.fromkeys(("retrieval", "joint"), "needs embedding, x_train")
    others = {"lines": "needs x_train", "nearest_cells": "needs cells", "transfer": "needs backbone"}
    assert report.extra["attacks_left_out"] == others | retrieval
    assert report.examples is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3, dtype=torch.long)}, "same number of rows"),
        ({"y": torch.zeros(10)}, "integers"),
        ({"y": torch.full((10,), 7)}, r"0\.\.2"),
        ({"x": torch.full((10, 8), torch.nan)}, "not finite"),
        ({"threats": []}, "at least one"),
        ({"threats": [ThreatModel("l2", 0.1), ThreatModel("l2", 0.1)]}, "once"),
        ({"threats": [ThreatModel("l2", 0.1, (0.0, 0.1))]}, "outside the box"),
        ({"attacks": "magic"}, "unknown attack"),
        ({"n_attacked": 0}, "n_attacked"),
    ],
)
def test_bad_input_is_refused(change, message: str) -> None:
    model, x, y = linear(classes=3, d=8, n=10)
    arguments = {"x": x, "y": y, "threats": [ThreatModel("l2", 0.1)], "attacks": FAST} | change
    with pytest.raises(ValueError, match=message):
        evaluate(model, **arguments)


def test_logits_that_are_not_finite_are_refused() -> None:
    model, x, y = linear(classes=3, d=8, n=10)
    with torch.no_grad():
        model.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, x, y, [ThreatModel("l2", 0.1)], FAST)


def test_the_large_budget_exceeds_what_is_certified() -> None:
    """A sample of the other class lies deep inside the cell of the label: reaching it proves nothing."""
    slopes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    cells = CellInterpolation(PowerDiagram(slopes, torch.zeros(2), torch.tensor([0, 1])))
    model = OTAD(CenteredFlatten(torch.zeros(2)), cells, identity_head(2))
    x, y = torch.tensor([[-5.0, 0.0]]), torch.tensor([0])
    knowledge = AttackerKnowledge(torch.tensor([[-4.0, 0.0], [-6.0, 0.0]]), torch.tensor([1, 0]))
    threats = [ThreatModel("l2", 0.5)]
    report = evaluate(model, x, y, threats, ["nearest_cells"], certificate=certify(model, x), knowledge=knowledge)
    assert report.audit["zero_at_large_eps"].passed
    alone = evaluate(model, x, y, threats, ["nearest_cells"], knowledge=knowledge)
    assert alone.audit["zero_at_large_eps"].passed is False
