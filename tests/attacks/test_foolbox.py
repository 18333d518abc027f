import importlib
from functools import partial

import pytest
import torch

from otad.attacks import ThreatModel, decision_based, minimal_norm
from otad.errors import MissingExtraError
from tests.attacks.known import assert_tight, assert_within, linear, two_prototypes


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_minimal_norm_is_tight(norm) -> None:
    assert_tight(partial(minimal_norm, steps=50, n_targets=3), *linear(classes=4, d=12), norm)
    assert_tight(partial(minimal_norm, steps=50), *two_prototypes(), norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_decision_based_is_tight(norm) -> None:
    """Two classes: which of several classes it reaches is up to where it starts."""
    assert_tight(decision_based, *linear(classes=2, d=7, seed=3), norm)
    assert_tight(decision_based, *two_prototypes(), norm)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("attack", [minimal_norm, partial(decision_based, queries=300)])
def test_images_in_a_box_and_no_traces(attack, norm) -> None:
    model, _, _ = linear(classes=4, d=32)
    x = torch.rand(10, 2, 4, 4)
    y = model(x).argmax(dim=1)
    threat = ThreatModel(norm, 1.0 if norm == "l2" else 0.2, (0.0, 1.0))
    state = torch.random.get_rng_state()
    first, second = attack(model, x, y, threat, seed=3), attack(model, x, y, threat, seed=3)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_within(first, x, threat)
    assert bool((model(first).argmax(dim=1) != y).any())


def test_decision_based_starts_from_training_samples() -> None:
    model, x, y = two_prototypes(n=5)
    x, y = x[:1], y[:1]  # alone in the batch
    threat = ThreatModel("l2", 1.05 * float(model.distance(x, "l2")))
    labels = torch.tensor([0, 1])
    x_adv = decision_based(model, x, y, threat, x_train=model.prototypes, y_train=labels)
    assert int(model(x_adv).argmax(dim=1)) != int(y)


def test_a_row_without_any_start_is_left_as_it_is() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.sum(dim=1) * 0 + 1, x.sum(dim=1) * 0], dim=1)

    x = torch.randn(3, 4)
    assert torch.equal(decision_based(Constant(), x, torch.zeros(3, dtype=torch.long), ThreatModel("l2", 1.0)), x)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    model, x, y = two_prototypes(n=2)
    for attack in (minimal_norm, decision_based):
        with pytest.raises(MissingExtraError, match=r"foolbox.*otad\[attacks\]"):
            attack(model, x, y, ThreatModel("l2", 0.1))


def test_bad_settings_are_refused() -> None:
    model, x, y = two_prototypes(n=2)
    with pytest.raises(ValueError, match="at least 100"):
        decision_based(model, x, y, ThreatModel("l2", 0.1), queries=5)
