"""Solving a neighbourhood in one pass is solving it in two."""

import pytest
import torch

from otad.cip import Regularity, Status, feasible_potentials, interpolate, interpolate_neighborhood
from otad.cip.gram import inner_products
from otad.cip.interpolation import Branch

BRANCHES: list[Branch] = ["lower", "upper", "mean"]


def problem(offset: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x_i = torch.randn(50, 8, 12, generator=generator, dtype=torch.float64)
    z_i = 0.7 * x_i + 0.4 * torch.tanh(2 * x_i)
    x = x_i[:, :3].mean(1) + 0.1 * torch.randn(50, 12, generator=generator, dtype=torch.float64)
    return tuple((part + offset).to(dtype) for part in (x, x_i, z_i))


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("bounds", [(-1.5, 1.5), (0.0, 2.0), (0.1, 3.0)])
def test_equals_the_two_steps(branch: Branch, bounds: tuple[float, float]) -> None:
    x, x_i, z_i = problem()
    regularity = Regularity(*bounds)
    u_i = feasible_potentials(x_i, z_i, regularity)
    whole = interpolate_neighborhood(x, x_i, z_i, regularity, branch)
    torch.testing.assert_close(whole.stats["potentials"], u_i.checked(), atol=1e-10, rtol=0)
    expected = interpolate(x, x_i, z_i, u_i.value, regularity, branch)
    torch.testing.assert_close(whole.checked(), expected.checked(), atol=1e-8, rtol=0)


def test_infeasible_rows_are_reported_and_do_no_harm() -> None:
    x, x_i, z_i = problem()
    z_i[3] = -z_i[3]
    found = interpolate_neighborhood(x, x_i, z_i, Regularity(0.0, 2.0))
    assert found.status[3] == Status.INFEASIBLE
    assert found.value[3].isnan().all()
    rest = torch.arange(50) != 3
    assert (found.status[rest] == Status.CONVERGED).all()
    assert found.value[rest].isfinite().all()


def test_points_far_from_the_origin_keep_their_digits() -> None:
    """A shift of x by 1e6 costs twelve of sixteen digits of plain products; centring saves them."""
    regularity = Regularity(-1.5, 1.5)
    x, x_i, z_i = problem()
    near = interpolate_neighborhood(x, x_i, z_i, regularity, "mean").checked()
    far = interpolate_neighborhood(x + 1e6, x_i + 1e6, z_i, regularity, "mean").checked()
    # 1e6 itself has a spacing of 1e-10.
    torch.testing.assert_close(far, near, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_definition(dtype: torch.dtype) -> None:
    x, x_i, z_i = problem(3.0, dtype)
    products = inner_products(x, x_i, z_i)
    delta, centered = (x[:, None] - x_i).double(), (z_i - z_i.mean(1, keepdim=True)).double()
    atol = 1e-3 if dtype == torch.float32 else 1e-11
    assert products.dd is not None
    torch.testing.assert_close(products.dd, delta @ delta.mT, atol=atol, rtol=0)
    torch.testing.assert_close(products.zz, centered @ centered.mT, atol=atol, rtol=0)
    torch.testing.assert_close(products.zd, centered @ delta.mT, atol=atol, rtol=0)
    tilt = (delta @ z_i.double().mean(1)[:, :, None]).squeeze(2)
    torch.testing.assert_close(products.tilt, tilt, atol=atol, rtol=0)
