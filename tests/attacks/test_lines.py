from functools import partial

import pytest
import torch
from torch import Tensor, nn

from otad.attacks import ThreatModel, lines, shrink
from tests.attacks.known import assert_tight, assert_within, two_prototypes


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_lines_are_tight_between_two_prototypes(norm) -> None:
    model, x, y = two_prototypes()
    train = {"x_train": model.prototypes, "y_train": torch.tensor([0, 1])}
    assert_tight(partial(lines, **train), model, x, y, norm)


def test_a_flip_that_flips_back_is_found() -> None:
    class Strip(nn.Module):
        """Class 1 only where the first coordinate lies between 0.35 and 0.45."""

        def forward(self, x: Tensor) -> Tensor:
            inside = ((x[:, 0] > 0.35) & (x[:, 0] < 0.45)).float()
            return torch.stack([0.5 - inside, inside - 0.5], dim=1)

    x, y = torch.zeros(1, 2), torch.tensor([0])
    train, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    threat = ThreatModel("l2", 1.0)
    x_adv = lines(Strip(), x, y, threat, x_train=train, y_train=labels, points=5)
    assert Strip()(x_adv).argmax(dim=1).item() == 1
    # Bisection pulls it back to where the strip begins.
    assert x_adv[0, 0].item() == pytest.approx(0.35, abs=0.01)


def test_points_beyond_the_neighbor_are_not_tried() -> None:
    model, x, y = two_prototypes(n=4)
    threat = ThreatModel("l2", 100.0)
    x_adv = lines(model, x, y, threat, x_train=model.prototypes, y_train=torch.tensor([0, 1]), bisections=0)
    assert torch.allclose(x_adv, model.prototypes[1 - y], atol=1e-5)


def test_fewer_wrong_class_samples_than_lines() -> None:
    model, x, y = two_prototypes(n=4)
    threat = ThreatModel("l2", 1e-3)
    x_adv = lines(model, x, y, threat, x_train=model.prototypes, y_train=torch.tensor([0, 1]), neighbors=50)
    assert_within(x_adv, x, threat)


def test_shrink_keeps_every_flip() -> None:
    model, x, y = two_prototypes()
    far = model.prototypes[1 - y]
    near = shrink(model, x, far, y, steps=12)
    assert bool((model(near).argmax(dim=1) != y).all())
    distance = torch.linalg.vector_norm((near - x).double(), dim=1)
    assert torch.allclose(distance, model.distance(x, "l2"), rtol=0.02, atol=2e-3)


def test_bad_settings_are_refused() -> None:
    model, x, y = two_prototypes(n=2)
    with pytest.raises(ValueError, match="shape"):
        lines(model, x, y, ThreatModel("l2", 1.0), x_train=torch.zeros(2, 3), y_train=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at least 1"):
        lines(model, x, y, ThreatModel("l2", 1.0), x_train=x, y_train=y, points=0)
