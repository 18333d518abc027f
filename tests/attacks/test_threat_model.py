import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otad.attacks import AttackerKnowledge, ThreatModel


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(1e-3, 10.0), scale=st.floats(0.01, 100.0))
def test_projection_stays_in_budget_and_box(norm, box, seed: int, eps: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, 5, 5, generator=generator)
    threat = ThreatModel(norm, eps, box)
    projected = threat.project(x + scale * torch.randn(x.shape, generator=generator), x)
    assert bool(threat.contains(projected, x).all())


def test_projection_keeps_points_inside_as_they_are() -> None:
    x = torch.rand(3, 4)
    inside = x + 0.01
    for norm in ("l2", "linf"):
        assert torch.allclose(ThreatModel(norm, 1.0).project(inside, x), inside)


def test_distance() -> None:
    x, x_adv = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert ThreatModel("l2", 1.0).distance(x_adv, x).item() == pytest.approx(5)
    assert ThreatModel("linf", 1.0).distance(x_adv, x).item() == pytest.approx(4)


def test_keys_name_the_budget() -> None:
    assert ThreatModel("l2", 0.5).key == "0.5"
    assert ThreatModel("linf", 0.03).key == "linf:0.03"


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf])
def test_bad_eps_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be"):
        ThreatModel("l2", eps)


def test_bad_box_is_refused() -> None:
    with pytest.raises(ValueError, match="box must be"):
        ThreatModel("l2", 1.0, (1.0, 0.0))


def test_knowledge_needs_labels_with_samples() -> None:
    with pytest.raises(ValueError, match="together"):
        AttackerKnowledge(x_train=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="agree"):
        AttackerKnowledge(x_train=torch.zeros(2, 3), y_train=torch.zeros(3, dtype=torch.long))
