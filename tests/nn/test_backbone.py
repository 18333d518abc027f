"""The backbone is the identity before training, and its transport cost is the energy of the path."""

import torch

from otad.nn import residual_mlp, transport_cost


def test_untrained_trunk_moves_nothing() -> None:
    backbone = residual_mlp(torch.zeros(6), 3)
    x = torch.randn(5, 6)
    z, cost = backbone.transport(x)
    assert torch.equal(z, x)
    assert torch.equal(cost, torch.zeros(5))


def test_cost_of_a_straight_path_at_constant_speed_is_its_squared_length() -> None:
    step = torch.randn(4, 7, dtype=torch.float64)
    residuals = [step] * 5
    torch.testing.assert_close(transport_cost(residuals), (5 * step).square().sum(1))


def test_cost_is_at_least_the_squared_displacement() -> None:
    torch.manual_seed(0)
    residuals = list(torch.randn(5, 4, 7, dtype=torch.float64))
    moved = sum(residuals).square().sum(1)  # type: ignore[union-attr]
    assert (transport_cost(residuals) >= moved).all()


def test_stem_is_an_isometry() -> None:
    torch.manual_seed(0)
    backbone = residual_mlp(torch.rand(1, 4, 4), 2)
    x, y = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    apart = (backbone.stem(x) - backbone.stem(y)).norm(dim=1)
    torch.testing.assert_close(apart, (x - y).flatten(1).norm(dim=1) * float(backbone.stem.lipschitz))  # type: ignore[arg-type]
