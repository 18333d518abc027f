"""Problems on which solvers break: right answers, or a status that says otherwise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from otad.cip import Regularity, Status, feasible_potentials, interpolate
from otad.cip.simplex_qp import solve_simplex_qp

from .problems import BRANCHES, Branch, known_problem, solve


# Neighbourhoods on which solvers break; each is feasible for l = -L with the bounds given beside it.
def degenerate_neighborhoods() -> dict[str, tuple[Tensor, Tensor, float]]:
    k, d = 8, 3
    p = known_problem(1, k, d, l=-1.0, L=1.0, seed=37)
    x_i, z_i = p.x_i[0], p.z_i[0]
    axis = torch.linspace(-1, 1, k, dtype=torch.float64)[:, None] * x_i[:1]
    cases = {
        "plain": (x_i, z_i, 1.0),
        "duplicates": (x_i[[0, 0, 0, 3, 3, 5, 6, 7]], z_i[[0, 0, 0, 3, 3, 5, 6, 7]], 1.0),
        "all equal": (x_i[[0] * k], z_i[[0] * k], 1.0),
        "equal features": (x_i, z_i[[0] * k], 1.0),
        "zero features": (x_i, torch.zeros_like(z_i), 1.0),
        "identity, l = -L tight": (x_i, x_i, 1.0),
        "collinear": (axis, 0.5 * axis, 1.0),
        "on a lattice, exact ties": (
            torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3),
            torch.zeros(k, d, dtype=torch.float64),
            1.0,
        ),
        "almost duplicates": (x_i[[0] * k] + 1e-7 * x_i, z_i[[0] * k] + 1e-7 * z_i, 1.0),
    }
    for scale in (1e-8, 1e-4, 1e4, 1e8):
        cases[f"points at {scale:g}"] = (scale * x_i, z_i, 1.0 / scale)
        cases[f"features at {scale:g}"] = (x_i, scale * z_i, scale)
        cases[f"both at {scale:g}"] = (scale * x_i, scale * z_i, 1.0)
    for distance in (1e2, 1e4, 1e8):
        far = x_i.clone()
        far[-1] = distance
        cases[f"one point at {distance:g}"] = (far, torch.cat([z_i[:-1], z_i[:1]]), 1.5)
    return cases


DEGENERATE = degenerate_neighborhoods()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("name", list(DEGENERATE))
def test_degenerate_neighborhoods(name: str, branch: Branch) -> None:
    """Finite answers in class, right at the data points, or a status that says otherwise."""
    x_i, z_i, L = DEGENERATE[name]
    k, d = x_i.shape
    regularity = Regularity(l=-L, L=L)
    u = feasible_potentials(x_i[None], z_i[None], regularity)
    u_i = u.checked()
    rng = np.random.default_rng(38)
    centre, extent = x_i[:-1].mean(0), (x_i[:-1] - x_i[:-1].mean(0)).abs().max().clamp(min=1e-12)
    x = torch.cat([x_i, centre + extent * torch.from_numpy(rng.normal(size=(8, d))), centre[None]])
    m = len(x)
    z = interpolate(x, x_i.expand(m, k, d), z_i.expand(m, k, d), u_i.expand(m, k), regularity, branch=branch)
    feature = z.checked()
    assert torch.isfinite(feature).all()
    assert torch.isfinite(z.stats["value"]).all()
    # Rounding is relative to the largest terms that enter: features, and L times the extent of the points.
    size = float(z_i.abs().max() + L * (x_i - x_i.mean(0)).abs().max())
    assert (feature[:k] - z_i).abs().max() <= 1e-6 * size
    dx, dz = torch.cdist(x, x), torch.cdist(feature, feature)
    assert (dz <= L * dx * (1 + 1e-6) + 2e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("branch", BRANCHES)
def test_degenerate_rows_leave_their_batch_alone(branch: Branch, dtype: torch.dtype) -> None:
    """All degenerate neighbourhoods in one batch, with ordinary rows between them."""
    p = replace(known_problem(len(DEGENERATE), 8, 3, l=-1.0, L=1.0, seed=39).to(dtype), l=-1.5, L=1.5)
    regularity, alone = p.regularity, solve(p, branch)
    x_i = torch.stack([points for points, _, _ in DEGENERATE.values()]).to(dtype)
    z_i = torch.stack([features for _, features, _ in DEGENERATE.values()]).to(dtype)
    u = feasible_potentials(x_i, z_i, regularity)
    mixed = interpolate(
        torch.cat([x_i.mean(1), p.x]),
        torch.cat([x_i, p.x_i]),
        torch.cat([z_i, p.z_i]),
        torch.cat([u.value, p.phi_i]),  # NaN in the rows that 1.5 does not fit
        regularity,
        branch=branch,
    )
    n = len(DEGENERATE)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(mixed.value[n:], alone.checked(), atol=tolerance, rtol=0)
    assert (mixed.status[n:] == Status.CONVERGED).all()
    solved = mixed.status[:n] == Status.CONVERGED
    assert torch.isfinite(mixed.value[:n][solved]).all()
    assert not solved[u.status == Status.INFEASIBLE].any()  # a row without potentials has no feature
    if dtype == torch.float64:
        assert (solved | (u.status == Status.INFEASIBLE)).all()


@pytest.mark.parametrize(("k", "d"), [(16, 3), (16, 4), (10, 50)])
def test_many_random_problems_converge(k: int, d: int) -> None:
    """Interior points without safeguards stall on about one problem of a thousand where K > d."""
    n, rng = 5000, np.random.default_rng(43)
    x = torch.from_numpy(rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-1, 1, size=(n, 1)))
    x_i, z_i, u_i = (torch.from_numpy(rng.normal(size=shape)) for shape in ((n, k, d), (n, k, d), (n, k)))
    z = interpolate(x, x_i, z_i, u_i, Regularity(l=-1.0, L=1.0))
    assert (z.status == Status.CONVERGED).all()
    assert (z.stats["residual"] <= 1e-8).all()


def test_more_neighbors_than_dimensions_and_fewer() -> None:
    for k, d in [(50, 2), (30, 1), (2, 100), (3, 784)]:
        p = known_problem(3, k, d, seed=40)
        u_i = feasible_potentials(p.x_i, p.z_i, p.regularity).checked()
        z = interpolate(p.x, p.x_i, p.z_i, u_i, p.regularity)
        assert (z.stats["residual"] <= 1e-8).all()
        at = interpolate(p.x_i[:, 1], p.x_i, p.z_i, u_i, p.regularity).checked()
        torch.testing.assert_close(at, p.z_i[:, 1], atol=1e-6, rtol=0)
        assert z.checked().shape == (3, d)


def test_far_from_all_neighbors() -> None:
    """A query at 1e6 meets one paraboloid, whose slope is known."""
    p = known_problem(4, 6, 3, l=-1.0, L=1.0, seed=42)
    x = 1e6 * p.x / p.x.norm(dim=1, keepdim=True)
    z = interpolate(x, p.x_i, p.z_i, p.phi_i, p.regularity)
    assert torch.isfinite(z.checked()).all()
    shifted = (p.z_i + p.x_i)[torch.arange(4), ((p.z_i + p.x_i) @ x[:, :, None]).squeeze(2).argmax(1)]
    torch.testing.assert_close(z.checked(), shifted - x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("slack", [1e-4, 1e-6, 1e-8, 1e-10])
def test_pieces_that_almost_carry_weight_are_not_on_the_face(slack: float) -> None:
    """Near a kink the weights hardly tell the face, and the derivative depends on it."""
    rng = np.random.default_rng(0)
    S = torch.from_numpy(rng.normal(size=(300, 8, 12)))
    Q = S @ S.transpose(1, 2)
    weights = torch.zeros(300, 8, dtype=torch.float64)
    weights[:, :4] = torch.from_numpy(rng.dirichlet(np.full(4, 5.0), size=300))
    # At these scores the first four are optimal, and each other piece stays short of them by the slack.
    c = (Q @ weights[:, :, None]).squeeze(2)
    c[:, 4:] -= slack
    solved = solve_simplex_qp(Q, c).weights
    torch.testing.assert_close(solved, weights, atol=1e-9, rtol=0)
    assert torch.equal(solved > 0, weights > 0)
