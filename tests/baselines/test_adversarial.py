import pytest
import torch
from torch import Tensor
from torch.nn import functional

from otad.attacks import ThreatModel, apgd
from otad.baselines.adversarial import _divergence, fit_pgd, fit_trades, fit_undefended, projected_ascent
from tests.attacks.known import assert_within, linear
from tests.baselines.problems import digits


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_inner_attack_reaches_the_optimum_of_a_linear_model(norm: str) -> None:
    """The cross entropy of two linear logits is largest at x + eps d, d the unit step of the norm along w_j - w_y."""
    model, x, y = linear(classes=2, d=12)
    with torch.no_grad():
        model.weight.mul_(0.1)  # no sample so far out that float32 rounds the gradient of its cross entropy away
        y = model(x).argmax(dim=1)
    threat = ThreatModel(norm, 0.3)  # type: ignore[arg-type]

    def total(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, y, reduction="sum")

    found = projected_ascent(model, x, x, total, threat)
    slope = model.weight.detach()[1 - y] - model.weight.detach()[y]
    unit = functional.normalize(slope, dim=1) if norm == "l2" else slope.sign()
    assert_within(found, x, threat)
    torch.testing.assert_close(found, x + threat.eps * unit, atol=1e-4, rtol=0)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_sample_trained_on_lies_in_budget_and_box(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, _, _ = digits(n_train=64)
    threat = ThreatModel(norm, 0.2, (0.0, 1.0))  # type: ignore[arg-type]
    seen = []

    def watch(network, inputs, start, objective, threat, **options):
        found = projected_ascent(network, inputs, start, objective, threat, **options)
        assert_within(start, inputs, threat)
        assert_within(found, inputs, threat)
        seen.append(float(threat.distance(found, inputs).max()))
        return found

    monkeypatch.setattr("otad.baselines.adversarial.projected_ascent", watch)
    fit_pgd(x, y, threat, minutes=60.0, epochs=2)
    fit_trades(x, y, threat, minutes=60.0, epochs=2)
    assert len(seen) == 4
    assert max(seen) > 0.19


def test_the_divergence_has_finite_gradients_where_probabilities_round_to_nothing() -> None:
    """KL(softmax(a) | softmax(b)) in closed form, and its gradient with respect to b: softmax(b) - softmax(a)."""
    a = torch.tensor([[0.0, 200.0], [0.0, 1.0]], requires_grad=True)
    b = torch.tensor([[1.0, 0.0], [2.0, 0.0]], requires_grad=True)
    value = _divergence(b, a)
    p, q = torch.sigmoid(torch.tensor(1.0)), torch.sigmoid(torch.tensor(-2.0))
    expected = torch.log1p(torch.exp(torch.tensor(1.0))) + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert a.grad is not None
    assert bool(a.grad.isfinite().all())
    torch.testing.assert_close(b.grad, (b.softmax(1) - a.softmax(1)).detach())


@pytest.mark.slow
@pytest.mark.parametrize("fit", [fit_pgd, fit_trades])
def test_adversarial_training_helps_on_real_digits(fit) -> None:
    x, y, x_test, y_test = digits(n_train=512)
    threat = ThreatModel("l2", 0.7, (0.0, 1.0))

    def robust(model: torch.nn.Module) -> float:
        found = apgd(model, x_test, y_test, threat, steps=30)
        return float((model(found).argmax(dim=1) == y_test).float().mean())

    trained = fit(x, y, threat, minutes=60.0, epochs=40)
    plain = fit_undefended(x, y, threat, minutes=60.0, epochs=40)
    assert robust(trained) > robust(plain) + 0.1
    assert float((trained(x_test).argmax(dim=1) == y_test).float().mean()) > 0.9
