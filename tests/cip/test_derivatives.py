"""Jacobians of the interpolant: finite differences, eigenvalues, Lipschitz quotients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from otad.cip import Regularity, feasible_potentials, interpolate, interpolate_neighborhood

from .problems import BOUNDS, BRANCHES, Branch, known_problem, solve


def jacobian(x: Tensor, x_i: Tensor, z_i: Tensor, u_i: Tensor, regularity: Regularity, branch: Branch) -> Tensor:
    """(batch, d, d) by one backward pass per feature."""
    x = x.clone().requires_grad_()
    z = interpolate(x, x_i, z_i, u_i, regularity, branch=branch).checked()
    columns = [torch.autograd.grad(z[:, j].sum(), x, retain_graph=True)[0] for j in range(x.shape[1])]
    return torch.stack(columns, 1)


@pytest.mark.parametrize(("l", "L"), BOUNDS)
def test_jacobian_is_symmetric_with_two_eigenvalues(l: float, L: float) -> None:
    p = known_problem(16, 8, 4, l, L, seed=31, spread=0.5)
    jacobians = {branch: jacobian(p.x, p.x_i, p.z_i, p.phi_i, p.regularity, branch) for branch in BRANCHES}
    for branch in BRANCHES:
        torch.testing.assert_close(jacobians[branch], jacobians[branch].mT, atol=1e-8, rtol=0)
        eigenvalues = torch.linalg.eigvalsh(jacobians[branch])
        assert l - 1e-8 <= eigenvalues.min() <= eigenvalues.max() <= L + 1e-8
        if branch != "mean":
            assert torch.minimum((eigenvalues - l).abs(), (eigenvalues - L).abs()).max() <= 1e-7
            assert ((eigenvalues - l).abs() < 1e-7).any()
            assert ((eigenvalues - L).abs() < 1e-7).any()
    torch.testing.assert_close(jacobians["mean"], 0.5 * (jacobians["lower"] + jacobians["upper"]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), [(-1.0, 1.0), (0.0, 2.0), (0.3, 1.5)])
@pytest.mark.parametrize(("k", "d"), [(6, 3), (3, 4), (1, 2)])
def test_gradcheck_in_x(branch: Branch, l: float, L: float, k: int, d: int) -> None:
    p = known_problem(2, k, d, l, L, seed=32)

    def feature(x: Tensor) -> Tensor:
        return interpolate(x, p.x_i, p.z_i, p.phi_i, p.regularity, branch=branch).checked()

    assert torch.autograd.gradcheck(feature, (p.x.clone().requires_grad_(),), eps=1e-6, atol=1e-6)


def rows(*bounds: float, batch: int) -> tuple[Tensor, ...]:
    """Bounds as tensors, a little apart from row to row."""
    apart = 0.05 * torch.arange(batch, dtype=torch.float64)
    return tuple(bound + apart for bound in bounds)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L", "offset"), [(-1.0, 1.0, 0.0), (0.0, 2.0, 0.0), (0.3, 1.5, 3e3)])
def test_gradcheck_in_everything(branch: Branch, l: float, L: float, offset: float) -> None:
    """Pieces need not fit any potential; in general position the active set does not change nearby.

    The offset makes the products be centred before they are taken.
    """
    rng = np.random.default_rng(33)
    shapes = ((1, 2), (1, 4, 2), (1, 4, 2), (1, 4))
    x, x_i, z_i, u_i = (torch.from_numpy(rng.normal(size=shape)) for shape in shapes)
    inputs = (x + offset, x_i + offset, z_i, u_i, *rows(l, L, batch=1))

    def everything(x: Tensor, x_i: Tensor, z_i: Tensor, u_i: Tensor, l: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        found = interpolate(x, x_i, z_i, u_i, Regularity(l=l, L=L), branch=branch)
        return found.checked(), found.stats["value"], found.stats["weights"]

    leaves = tuple(part.clone().requires_grad_() for part in inputs)
    # Finite differences see the offset's rounding, 1e-12 over the step.
    eps, atol = (1e-6, 1e-6) if offset == 0 else (1e-4, 1e-5)
    assert torch.autograd.gradcheck(everything, leaves, eps=eps, atol=atol)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), [(-1.1, 1.1), (0.0, 2.0), (0.1, 1.6)])
def test_gradcheck_through_the_potentials(branch: Branch, l: float, L: float) -> None:
    p = known_problem(1, 4, 2, 0.25, 0.9, seed=35, spread=0.7)
    inputs = tuple(part.clone().requires_grad_() for part in (p.x, p.x_i, p.z_i, *rows(l, L, batch=1)))

    def feature(x: Tensor, x_i: Tensor, z_i: Tensor, l: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        found = interpolate_neighborhood(x, x_i, z_i, Regularity(l=l, L=L), branch)
        return found.checked(), found.stats["value"], found.stats["potentials"]

    assert torch.autograd.gradcheck(feature, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("bounds", [(-1.1, 1.1), (0.0, 2.0), (0.2, 1.6)])
def test_gradcheck_of_potentials(bounds: tuple[float, float]) -> None:
    """In general position the longest paths are unique, and stay the same nearby."""
    p = known_problem(2, 5, 2, 0.25, 0.9, seed=36)
    l, L = (torch.tensor(bound, dtype=torch.float64) for bound in bounds)  # one number for all rows
    inputs = tuple(part.clone().requires_grad_() for part in (p.x_i, p.z_i, l, L))

    def phi(x_i: Tensor, z_i: Tensor, l: Tensor, L: Tensor) -> Tensor:
        return feasible_potentials(x_i, z_i, Regularity(l=l, L=L)).checked()

    assert torch.autograd.gradcheck(phi, inputs, eps=1e-6, atol=1e-6)


def test_potentials_of_a_chain_move_with_its_edges() -> None:
    """Points on a line, z = x, l = 0: every longest path goes from neighbour to neighbour down the chain."""
    line = torch.tensor([0.0, 1.0, 2.5, 4.0, 7.0], dtype=torch.float64)[None, :, None]
    z_i = line.clone().requires_grad_()
    phi = feasible_potentials(line, z_i, Regularity(l=0.0, L=1.5)).checked()
    (moved,) = torch.autograd.grad(phi[0, -1], z_i)
    # phi_i - phi_j = z_j (x_i - x_j) + (z_i - z_j)^2 / (2 L) along the chain, j = i - 1.
    step, L = line[0, 1:, 0] - line[0, :-1, 0], 1.5
    expected = torch.zeros(5, dtype=torch.float64)
    expected[:-1] += step - step / L
    expected[1:] += step / L
    torch.testing.assert_close(moved[0, :, 0], expected, atol=1e-12, rtol=0)


def test_equal_points_share_a_finite_derivative() -> None:
    """Equal points make cycles of weight zero, round which a derivative must not run."""
    p = known_problem(4, 5, 3, l=-1.0, L=1.0, seed=37)

    def derivative(x_i: Tensor, z_i: Tensor) -> tuple[Tensor, ...]:
        leaves = x_i.clone().requires_grad_(), z_i.clone().requires_grad_()
        phi = feasible_potentials(leaves[0], leaves[1], p.regularity).checked()
        return torch.autograd.grad(phi[:, :5].square().sum(), leaves)

    of_doubled = derivative(torch.cat([p.x_i, p.x_i], 1), torch.cat([p.z_i, p.z_i], 1))
    for twice, once in zip(of_doubled, derivative(p.x_i, p.z_i), strict=True):
        torch.testing.assert_close(twice[:, :5] + twice[:, 5:], once, atol=1e-8, rtol=0)


@pytest.mark.parametrize("branch", BRANCHES)
def test_chunks_do_not_change_the_derivatives(branch: Branch) -> None:
    p = known_problem(7, 6, 3, 0.25, 0.9, seed=38)
    inputs = tuple(part.clone().requires_grad_() for part in (p.x, p.x_i, p.z_i, *rows(-1.0, 1.5, batch=7)))
    x, x_i, z_i, l, L = inputs
    found = []
    for memory in (1, 2**28):  # one row at a time; all together
        solution = interpolate_neighborhood(x, x_i, z_i, Regularity(l, L), branch, memory=memory)
        found.append((solution.checked(), *torch.autograd.grad(solution.value.square().sum(), inputs)))
    for apart, together in zip(*found, strict=True):
        torch.testing.assert_close(apart, together, atol=1e-10, rtol=0)


def test_rows_without_a_solution_leave_the_others_their_derivatives() -> None:
    p = known_problem(4, 5, 3, l=0.0, L=2.0, seed=39)
    z_i = torch.cat([p.z_i[:2], -p.x_i[2:3], p.z_i[3:]]).requires_grad_()
    value = interpolate_neighborhood(p.x, p.x_i, z_i, p.regularity).value
    (moved,) = torch.autograd.grad(value.nan_to_num(0.0).sum(), z_i)
    assert moved.isfinite().all()
    assert (moved[2] == 0).all()


@pytest.mark.parametrize("branch", BRANCHES)
def test_feature_is_the_gradient_of_the_value(branch: Branch) -> None:
    p, h = known_problem(8, 8, 3, l=-0.5, L=1.0, seed=34), 1e-5
    z = solve(p, branch).checked()
    for j, step in enumerate(h * torch.eye(3, dtype=torch.float64)):
        up, down = (
            interpolate(p.x + sign * step, p.x_i, p.z_i, p.phi_i, p.regularity, branch=branch).stats["value"]
            for sign in (1, -1)
        )
        torch.testing.assert_close((up - down) / (2 * h), z[:, j], atol=1e-6, rtol=0)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), [(-2.0, 2.0), (-0.5, 1.0), (-3.0, 1.0), (0.0, 2.0), (0.3, 1.5)])
def test_lipschitz_quotients(branch: Branch, l: float, L: float) -> None:
    """With the same neighbours z(.) is max(|l|, L)-Lipschitz, and l <= <dz, dx> / |dx|^2 <= L."""
    pairs, k, d = 400, 8, 3
    p = known_problem(1, k, d, l, L, seed=29, spread=0.7)
    rng = np.random.default_rng(30)
    x = torch.from_numpy(rng.normal(size=(pairs, d)))
    y = x + torch.from_numpy(rng.normal(size=(pairs, d)) * 10.0 ** rng.uniform(-3, 0.5, size=(pairs, 1)))
    x_i, z_i, u_i = (t.expand(pairs, *t.shape[1:]) for t in (p.x_i, p.z_i, p.phi_i))
    z_x = interpolate(x, x_i, z_i, u_i, p.regularity, branch=branch).checked()
    z_y = interpolate(y, x_i, z_i, u_i, p.regularity, branch=branch).checked()
    dx, dz = y - x, z_y - z_x
    lipschitz = max(abs(l), L)
    assert (dz.norm(dim=1) / dx.norm(dim=1)).max() <= lipschitz * (1 + 1e-6)
    curvature = (dz * dx).sum(1) / (dx**2).sum(1)
    assert curvature.min() >= l - 1e-6 * lipschitz
    assert curvature.max() <= L + 1e-6 * lipschitz


def test_flat_inside_one_piece_for_convex_potentials() -> None:
    """l = 0 and one active point: the Jacobian is exactly zero, which attacks must know about."""
    x_i = torch.tensor([[[0.0, 0.0], [10.0, 0.0]]], dtype=torch.float64)
    z_i = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    u_i = feasible_potentials(x_i, z_i, Regularity(l=0.0, L=2.0)).checked()
    x = torch.tensor([[0.5, 0.3]], dtype=torch.float64)
    assert jacobian(x, x_i, z_i, u_i, Regularity(l=0.0, L=2.0), "lower").abs().max() <= 1e-12
