from functools import partial

import pytest
import torch
from torch import Tensor, nn

from otad.attacks import ThreatModel, apgd, exact_gradient, noise, transfer
from otad.attacks.gradients import frozen, is_flat, loss_and_gradient, margin
from tests.attacks.known import Linear, assert_tight, assert_within, linear, two_prototypes


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_apgd_is_tight_on_linear_models(loss, norm) -> None:
    model, x, y = linear(classes=5, d=12)
    # One untargeted run may climb towards the second nearest class; aiming at every class finds the nearest.
    others = (y[:, None] + torch.arange(1, 5)) % 5
    assert_tight(partial(apgd, loss=loss, targets=others, steps=40), model, x, y, norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("loss", ["margin", "ce", "dlr"])
def test_exact_gradient_is_tight_on_linear_models(loss, norm) -> None:
    model, x, y = linear(classes=5, d=12)
    assert_tight(partial(exact_gradient, losses=(loss,), n_targets=4, steps=40), model, x, y, norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("attack", [apgd, exact_gradient])
def test_gradient_attacks_are_tight_on_prototypes(attack, norm) -> None:
    assert_tight(partial(attack, steps=40), *two_prototypes(), norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_transfer_is_tight_from_the_model_itself(norm) -> None:
    model, x, y = two_prototypes()
    assert_tight(partial(transfer, source=model, steps=20, refine_steps=0), model, x, y, norm)
    blind = linear(classes=2, d=10)[0]
    assert_tight(partial(transfer, source=blind, steps=5, refine_steps=40), model, x, y, norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_transfer_goes_on_to_the_relatives(norm) -> None:
    """What the source cannot find, a relative that is the model itself does, without refinement."""
    model, x, y = two_prototypes()
    blind = linear(classes=2, d=10)[0]
    attack = partial(transfer, source=blind, relatives=(model,), steps=20, refine_steps=0)
    assert_tight(attack, model, x, y, norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_batches_with_a_box_stay_inside(norm) -> None:
    model, _, _ = linear(classes=4, d=16)
    x = torch.rand(30, 1, 4, 4)
    y = model(x).argmax(dim=1)
    threat = ThreatModel(norm, 0.3, (0.0, 1.0))
    for x_adv in (
        apgd(model, x, y, threat, steps=20, restarts=2),
        exact_gradient(model, x, y, threat, steps=10),
        noise(model, x, y, threat),
        transfer(model, x, y, threat, source=model, steps=10, refine_steps=5),
    ):
        assert_within(x_adv, x, threat)
        assert x_adv.dtype == x.dtype


def test_attacks_are_deterministic_and_leave_no_traces() -> None:
    model, x, y = linear(classes=4, d=8)
    model.train()
    threat = ThreatModel("l2", 0.2)
    state = torch.random.get_rng_state()
    runs = [apgd(model, x, y, threat, steps=10, restarts=3, seed=5) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_rows_do_not_depend_on_the_batch() -> None:
    model, x, y = linear(classes=4, d=8)
    threat = ThreatModel("l2", 0.2)
    together = apgd(model, x, y, threat, steps=10)
    alone = torch.cat([apgd(model, x[i : i + 1], y[i : i + 1], threat, steps=10) for i in range(len(x))])
    assert torch.allclose(together, alone, atol=1e-5)


class Plateaus(nn.Module):
    """A linear model whose scores are rounded to steps: right answers, but no gradient anywhere."""

    def __init__(self, inner: Linear, step: float) -> None:
        super().__init__()
        self.inner, self.step = inner, step

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) / self.step).round() * self.step + 0 * self.inner(x)


def test_a_smoothed_model_leads_over_plateaus() -> None:
    inner, x, _ = linear(classes=3, d=12, n=20)
    model = Plateaus(inner, step=0.05)
    y = model(x).argmax(dim=1)
    _, value, gradient = loss_and_gradient(model, x, y)
    threat = ThreatModel("l2", 1.3 * float(inner.distance(x, "l2").max()))
    assert bool(is_flat(value, gradient, threat.eps).all())
    asked: list[float] = []

    def smoothed(factor: float) -> nn.Module:
        asked.append(factor)
        return inner

    helped = exact_gradient(model, x, y, threat, smoothed=smoothed, losses=("margin",), steps=20)
    assert bool((model(helped).argmax(dim=1) != y).all())
    assert set(asked) == {0.1, 0.3}
    assert_within(helped, x, threat)


def test_a_model_without_any_gradient_is_walked_at_random() -> None:
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()[:, :3]

    x = torch.randn(6, 5)
    y = x[:, :3].argmax(dim=1)
    threat = ThreatModel("l2", 0.1)
    x_adv = apgd(Detached(), x, y, threat, steps=5)
    assert_within(x_adv, x, threat)


def test_transfer_goes_beyond_the_boundary_of_its_source() -> None:
    model, x, y = linear(classes=3, d=12)
    source = Linear(model.weight.detach() + 0.05 * torch.randn(3, 12), model.bias.detach())
    keep = source(x).argmax(dim=1) == y
    x, y = x[keep], y[keep]
    threat = ThreatModel("l2", 1.5 * float(model.distance(x, "l2").max()))
    x_adv = transfer(model, x, y, threat, source=source, steps=20, refine_steps=0)
    assert bool((model(x_adv).argmax(dim=1) != y).all())


def test_frozen_restores_everything() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    model[0].weight.requires_grad_(False)
    with frozen(model, None):
        assert not model.training
        assert not model[0].bias.requires_grad
    assert model.training
    assert not model[1].training
    assert model[0].bias.requires_grad
    assert not model[0].weight.requires_grad


def test_margin() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    y = torch.tensor([0])
    assert margin(logits, y).item() == -1
    assert margin(logits, y, torch.tensor([1])).item() == -2


def test_bad_settings_are_refused() -> None:
    model, x, y = linear(classes=2, d=3)
    threat = ThreatModel("l2", 1.0)
    with pytest.raises(ValueError, match="at least 3 classes"):
        apgd(model, x, y, threat, loss="dlr")
    with pytest.raises(ValueError, match="takes no targets"):
        apgd(model, x, y, threat, loss="ce", targets=1 - y)
    with pytest.raises(ValueError, match="at least 1"):
        apgd(model, x, y, threat, steps=0)
