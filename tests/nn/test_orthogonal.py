"""The encoder: orthonormal whatever its parameters, and a Lipschitz constant that holds."""

import pytest
import torch

from otad.nn import CenteredFlatten, EncodedStem, MaxMinEncoder


def encoder(d: int, width: int, scale: float = 1.0) -> MaxMinEncoder:
    torch.manual_seed(0)
    found = MaxMinEncoder(d, width).double()
    with torch.no_grad():
        found.free.mul_(scale)
        found.bias.normal_()
    return found


@pytest.mark.parametrize(("d", "width"), [(12, 4), (5, 8), (6, 6)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_rows_or_columns_are_orthonormal(d: int, width: int, scale: float) -> None:
    weight = encoder(d, width, scale).weight.detach()
    product = weight.T @ weight if width > d else weight @ weight.T
    assert torch.allclose(product, torch.eye(min(d, width), dtype=torch.float64), atol=1e-9)


def test_lipschitz_constant_holds_and_is_attained() -> None:
    stem = EncodedStem(CenteredFlatten(torch.ones(2, 3).double()), encoder(6, 8), encoder(8, 8))
    assert stem.lipschitz == pytest.approx(1.0, abs=1e-8)
    x = torch.randn(200, 2, 3, dtype=torch.float64)
    near = x + 1e-3 * torch.randn(200, 2, 3, dtype=torch.float64)
    quotients = (stem(x) - stem(near)).norm(dim=1) / (x - near).flatten(1).norm(dim=1)
    assert quotients.max() <= stem.lipschitz * (1 + 1e-12)
    assert quotients.max() > 1 - 1e-9  # wide layers lose nothing of a small step


def test_derivatives_by_finite_differences() -> None:
    small = encoder(5, 4)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda free: torch.func.functional_call(small, {"free": free}, (x,)), (small.free,), atol=1e-5
    )


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        MaxMinEncoder(4, 3)
