"""The interpolant at a new point against Clarabel, POT, an enumeration of active sets, and closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from otad.cip import Regularity, feasible_potentials, interpolate

from .oracles import enumerated, pot_bounds, qcqp
from .problems import BOUNDS, BRANCHES, EXTREMES, Branch, Problem, known_problem, solve


def smallest_potentials(p: Problem) -> Tensor:
    return feasible_potentials(p.x_i, p.z_i, p.regularity).checked()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), BOUNDS)
@pytest.mark.parametrize(("k", "d"), [(10, 4), (5, 12)])
def test_equals_clarabel(branch: Branch, l: float, L: float, k: int, d: int) -> None:
    p = known_problem(2, k, d, l, L, seed=k)
    u_i = smallest_potentials(p)
    z = interpolate(p.x, p.x_i, p.z_i, u_i, p.regularity, branch=branch)
    assert z.checked().shape == (2, d)
    assert z.stats["value"].shape == (2,)
    for b in range(2):
        x, x_i, z_i, _ = p.row(b)
        value, feature = qcqp(x, x_i, z_i, u_i[b].numpy(), l, L, branch)
        np.testing.assert_allclose(float(z.stats["value"][b]), value, rtol=1e-7, atol=1e-7)
        # Clarabel knows v to about 1e-9, hence the minimiser, where v is flat, to about the root of that.
        np.testing.assert_allclose(z.value[b], feature, atol=1e-4)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), BOUNDS)
@pytest.mark.parametrize(("k", "d"), [(6, 3), (5, 12), (4, 1), (1, 3), (2, 2)])
def test_equals_enumeration_of_active_sets(branch: Branch, l: float, L: float, k: int, d: int) -> None:
    p = known_problem(4, k, d, l, L, seed=20 + k)
    u_i = smallest_potentials(p)
    z = interpolate(p.x, p.x_i, p.z_i, u_i, p.regularity, branch=branch)
    for b in range(4):
        x, x_i, z_i, _ = p.row(b)
        value, feature = enumerated(x, x_i, z_i, u_i[b].numpy(), l, L, branch)
        np.testing.assert_allclose(float(z.stats["value"][b]), value, atol=1e-9)
        np.testing.assert_allclose(z.checked()[b], feature, atol=1e-7)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), [(-1.0, 1.0), (0.0, 2.0)])
def test_any_pieces_define_a_function(branch: Branch, l: float, L: float) -> None:
    """Features and values that no potential fits still define an interpolant: only z(x_i) = z_i is lost."""
    rng = np.random.default_rng(21)
    x, x_i, z_i, u_i = (rng.normal(size=shape) for shape in ((8, 3), (8, 6, 3), (8, 6, 3), (8, 6)))
    t_x, t_x_i, t_z_i, t_u_i = (torch.from_numpy(a) for a in (x, x_i, z_i, u_i))
    z = interpolate(t_x, t_x_i, t_z_i, t_u_i, Regularity(l=l, L=L), branch=branch)
    for b in range(8):
        value, feature = enumerated(x[b], x_i[b], z_i[b], u_i[b], l, L, branch)
        np.testing.assert_allclose(float(z.stats["value"][b]), value, atol=1e-9)
        np.testing.assert_allclose(z.checked()[b], feature, atol=1e-7)


@pytest.mark.parametrize(("l", "L"), [(0.3, 1.5), (0.6, 1.4)])
def test_equals_python_optimal_transport(l: float, L: float) -> None:
    p = known_problem(2, 6, 3, l, L, seed=22)
    u_i = smallest_potentials(p)
    for b in range(2):
        x, x_i, z_i, _ = p.row(b)
        bounds = pot_bounds(x, x_i, z_i, u_i[b].numpy(), l, L)
        for branch in EXTREMES:
            z = solve(p.with_potentials(u_i).rows(slice(b, b + 1)), branch)
            # POT leaves the solver's default tolerance of 1e-8 on the value.
            np.testing.assert_allclose(float(z.stats["value"][0]), bounds[branch][0], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(z.checked()[0], bounds[branch][1], atol=1e-3)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), BOUNDS)
def test_interpolates_the_data(branch: Branch, l: float, L: float) -> None:
    p = known_problem(6, 8, 5, l, L, seed=23)
    for u_i in (smallest_potentials(p), p.phi_i):
        for i in range(8):
            z = interpolate(p.x_i[:, i], p.x_i, p.z_i, u_i, p.regularity, branch=branch)
            torch.testing.assert_close(z.checked(), p.z_i[:, i], atol=1e-6, rtol=0)
            torch.testing.assert_close(z.stats["value"], u_i[:, i], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("l", "L"), BOUNDS)
def test_known_potential_lies_between_the_two(l: float, L: float) -> None:
    """The lower interpolant is the smallest function of the class through the data, the upper the largest."""
    p = known_problem(32, 8, 3, l, L, seed=24, spread=0.5)
    lower, upper, mean = (solve(p, branch) for branch in BRANCHES)
    assert (lower.stats["value"] <= p.phi + 1e-9).all()
    assert (p.phi <= upper.stats["value"] + 1e-9).all()
    torch.testing.assert_close(mean.value, 0.5 * (lower.value + upper.value), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        mean.stats["value"], 0.5 * (lower.stats["value"] + upper.stats["value"]), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("branch", "slope"), [("lower", -0.4), ("upper", 1.6), ("mean", 0.6)])
def test_one_neighbor(branch: Branch, slope: float) -> None:
    """K = 1: a paraboloid of curvature l, L or their mean through the neighbour."""
    rng = np.random.default_rng(25)
    x, x_1, z_1, u_1 = (torch.from_numpy(rng.normal(size=shape)) for shape in ((5, 3), (5, 1, 3), (5, 1, 3), (5, 1)))
    z = interpolate(x, x_1, z_1, u_1, Regularity(l=-0.4, L=1.6), branch=branch)
    dx = x - x_1[:, 0]
    torch.testing.assert_close(z.checked(), z_1[:, 0] + slope * dx, atol=1e-12, rtol=0)
    paraboloid = u_1[:, 0] + (z_1[:, 0] * dx).sum(1) + 0.5 * slope * (dx**2).sum(1)
    torch.testing.assert_close(z.stats["value"], paraboloid, atol=1e-12, rtol=0)


def test_two_neighbors() -> None:
    """K = 2, l = 0: one weight, a clipped quotient."""
    p = known_problem(64, 2, 4, 0.0, 2.0, seed=26)
    z = solve(p)
    heights = p.phi_i + (p.z_i * (p.x[:, None] - p.x_i)).sum(2) + (p.z_i**2).sum(2) / (2 * p.L)
    edge = p.z_i[:, 0] - p.z_i[:, 1]
    t = (p.L * (heights[:, 0] - heights[:, 1]) - (p.z_i[:, 1] * edge).sum(1)) / (edge**2).sum(1)
    t = t.clamp(0, 1)
    assert 0.1 < ((t > 0) & (t < 1)).double().mean() < 1
    torch.testing.assert_close(z.checked(), p.z_i[:, 1] + t[:, None] * edge, atol=1e-8, rtol=0)
    torch.testing.assert_close(z.stats["weights"], torch.stack([t, 1 - t], 1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("branch", BRANCHES)
def test_nearly_fixed_curvature(branch: Branch) -> None:
    """phi = c |x|^2 / 2 with l = c - r, L = c + r: |z(x) - c x| <= r |x - x_i| for every neighbour."""
    rng = np.random.default_rng(27)
    x, x_i, c, r = (
        torch.from_numpy(rng.normal(size=(16, 3))),
        torch.from_numpy(rng.normal(size=(16, 7, 3))),
        0.8,
        1e-3,
    )
    regularity = Regularity(l=c - r, L=c + r)
    u_i = feasible_potentials(x_i, c * x_i, regularity).checked()
    z = interpolate(x, x_i, c * x_i, u_i, regularity, branch=branch).checked()
    nearest = (x[:, None] - x_i).norm(dim=2).min(1).values
    assert ((z - c * x).norm(dim=1) <= r * nearest * (1 + 1e-6)).all()


@pytest.mark.parametrize(("l", "L"), BOUNDS)
@pytest.mark.parametrize(("k", "d"), [(10, 4), (6, 16)])
def test_weights_satisfy_the_optimality_conditions(l: float, L: float, k: int, d: int) -> None:
    """Lower: g = sum_i lambda_i (z_i - l x_i), lambda in the simplex, positive on tight bounds only."""
    p = known_problem(32, k, d, l, L, seed=28)
    z = solve(p)
    weights = z.stats["weights"]
    assert weights.shape == (32, k)
    assert (weights >= -1e-12).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(32, dtype=torch.float64), atol=1e-12, rtol=0)
    shifted = p.z_i - l * p.x_i
    g = torch.einsum("bk,bkd->bd", weights, shifted)
    torch.testing.assert_close(z.checked(), g + l * p.x, atol=1e-9, rtol=0)
    heights = p.phi_i + (p.z_i * (p.x[:, None] - p.x_i)).sum(2) + l / 2 * ((p.x[:, None] - p.x_i) ** 2).sum(2)
    heights = heights + ((g[:, None] - shifted) ** 2).sum(2) / (2 * (L - l))
    slack = z.stats["value"][:, None] - heights
    assert (slack >= -1e-8).all()
    assert (weights * slack).abs().max() <= 1e-8
    assert (z.stats["residual"] <= 1e-8).all()
    assert (z.stats["steps"] >= 0).all()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("l", [-1.0, 0.0])
def test_float32_agrees_with_float64(branch: Branch, l: float) -> None:
    p = known_problem(32, 10, 20, l, 1.5, seed=35)
    double, single = solve(p, branch).checked(), solve(p.to(torch.float32), branch)
    assert single.checked().dtype == torch.float32
    torch.testing.assert_close(single.value.double(), double, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deterministic(dtype: torch.dtype) -> None:
    p = known_problem(16, 10, 6, seed=36).to(dtype)
    assert torch.equal(solve(p).value, solve(p).value)


def test_bad_arguments_are_refused() -> None:
    p = known_problem(2, 4, 3, seed=41)
    # ValueError from the library; TypeError where the tests' shape checker speaks first.
    with pytest.raises((ValueError, TypeError)):
        interpolate(p.x, p.x_i, p.z_i, p.phi_i, p.regularity, branch="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, TypeError)):
        interpolate(p.x[:, :2], p.x_i, p.z_i, p.phi_i, p.regularity)
    with pytest.raises((ValueError, TypeError)):
        interpolate(p.x, p.x_i, p.z_i, p.phi_i[:, :3], p.regularity)
