"""Potentials against the theorem, HiGHS and closed forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from otad.cip import Regularity, Status, feasible_potentials, smallest_smoothness
from otad.errors import InfeasibleError

from .oracles import (
    lp_potentials,
    lp_smallest_smoothness,
    worst_violation,
)
from .problems import BOUNDS, known_problem

WIDE_BOUNDS = [*BOUNDS, (-3.0, 1.0)]
RATIOS = [-1.0, -0.5, 0.0]


def noisy_neighborhoods(batch: int, k: int, d: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Features that are a gradient plus noise: feasible for some bounds and not for others."""
    p = known_problem(batch, k, d, l=0.2, L=1.2, seed=seed)
    rng = np.random.default_rng(seed + 1)
    return p.x_i, p.z_i + noise * torch.from_numpy(rng.normal(size=p.z_i.shape))


@pytest.mark.parametrize(("l", "L"), WIDE_BOUNDS)
@pytest.mark.parametrize(("k", "d"), [(10, 5), (6, 12), (3, 1), (12, 2)])
def test_potentials_are_feasible_and_smallest(l: float, L: float, k: int, d: int) -> None:
    p = known_problem(8, k, d, l, L, seed=k)
    u = feasible_potentials(p.x_i, p.z_i, p.regularity)
    assert u.status.tolist() == [Status.CONVERGED] * 8
    phi = u.checked()
    assert phi.shape == (8, k)
    assert phi.dtype == torch.float64
    assert phi.min(1).values.abs().max() == 0  # the smallest one touches zero
    for b in range(8):
        _, x_i, z_i, known = p.row(b)
        assert worst_violation(x_i, z_i, phi[b].numpy(), l, L) <= 1e-9
        oracle = lp_potentials(x_i, z_i, l, L)
        assert oracle is not None
        np.testing.assert_allclose(phi[b], oracle, atol=1e-8)
        assert abs(float(phi[b].sum()) - oracle.sum()) <= 1e-8
        assert (phi[b].numpy() <= known - known.min() + 1e-9).all()  # no feasible phi >= 0 lies below


@pytest.mark.parametrize(("l", "L", "noise"), [(-2.0, 2.0, 0.6), (-0.5, 1.0, 0.15), (0.0, 2.0, 0.3), (0.2, 1.5, 0.1)])
def test_infeasible_exactly_where_highs_says_so(l: float, L: float, noise: float) -> None:
    x_i, z_i = noisy_neighborhoods(40, k=6, d=3, noise=noise, seed=5)
    u = feasible_potentials(x_i, z_i, Regularity(l=l, L=L))
    answers = [lp_potentials(x.numpy(), z.numpy(), l, L) for x, z in zip(x_i, z_i, strict=True)]
    assert 5 <= sum(answer is None for answer in answers) <= 35  # both kinds are tried
    for b, answer in enumerate(answers):
        if answer is None:
            assert u.status[b] == Status.INFEASIBLE
        else:
            assert u.status[b] == Status.CONVERGED
            np.testing.assert_allclose(u.value[b], answer, atol=1e-8)
    with pytest.raises(InfeasibleError, match=r"infeasible|INFEASIBLE|no potential"):
        u.checked()


@pytest.mark.parametrize(("l", "L"), WIDE_BOUNDS)
def test_quadratics_inside_the_bounds_are_feasible(l: float, L: float) -> None:
    """phi = x^T A x / 2 with eigenvalues in [l, L], the ends included; outside the bounds it is not."""
    rng = np.random.default_rng(2)
    d, k = 4, 9
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    x_i = rng.normal(size=(1, k, d))
    inside = (q * np.linspace(l, L, d)) @ q.T
    u = feasible_potentials(torch.from_numpy(x_i), torch.from_numpy(x_i @ inside), Regularity(l=l, L=L))
    assert worst_violation(x_i[0], x_i[0] @ inside, u.checked()[0].numpy(), l, L) <= 1e-9
    for eigenvalues in (np.linspace(l - 0.2, L, d), np.linspace(l, L + 0.2, d)):
        # Points on a line along the offending axis, so that the violation shows.
        outside, line = (q * eigenvalues) @ q.T, np.linspace(-1, 1, k)
        axis = q[:, 0] if eigenvalues[0] < l else q[:, -1]
        x = torch.from_numpy((line[:, None] * axis)[None])
        assert (
            feasible_potentials(x, x @ torch.from_numpy(outside), Regularity(l=l, L=L)).status[0] == Status.INFEASIBLE
        )


@pytest.mark.parametrize("c", [-2.0, 2.0])
def test_extreme_quadratics_fix_the_potential(c: float) -> None:
    """With z = c x and c = l or c = L the only potential is c |x|^2 / 2 and a constant."""
    x_i = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 7, 4)))
    phi = feasible_potentials(x_i, c * x_i, Regularity(l=-2.0, L=2.0)).checked()
    quadratic = 0.5 * c * (x_i**2).sum(2)
    torch.testing.assert_close(phi, quadratic - quadratic.min(1, keepdim=True).values, atol=1e-9, rtol=0)


def test_one_point() -> None:
    u = feasible_potentials(torch.ones(2, 1, 3), torch.ones(2, 1, 3), Regularity(l=0.0, L=2.0))
    assert u.checked().tolist() == [[0.0], [0.0]]


def test_infeasible_rows_leave_the_others_alone() -> None:
    p = known_problem(4, 6, 3, seed=6)
    z_i = p.z_i.clone()
    z_i[2] = -p.x_i[2]  # a concave potential, with l = 0
    u, alone = feasible_potentials(p.x_i, z_i, p.regularity), feasible_potentials(p.x_i, p.z_i, p.regularity)
    assert u.status.tolist() == [0, 0, int(Status.INFEASIBLE), 0]
    kept = [0, 1, 3]
    torch.testing.assert_close(u.value[kept], alone.value[kept], atol=1e-12, rtol=0)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("k", "d"), [(6, 3), (9, 2)])
def test_smallest_smoothness_equals_highs(ratio: float, k: int, d: int) -> None:
    x_i, z_i = noisy_neighborhoods(5, k, d, noise=0.1, seed=7 + k)
    L = smallest_smoothness(x_i, z_i, ratio=ratio)
    assert L.shape == (5,)
    oracle = [lp_smallest_smoothness(x.numpy(), z.numpy(), ratio) for x, z in zip(x_i, z_i, strict=True)]
    np.testing.assert_allclose(L, oracle, rtol=1e-6)
    for factor, status in ((0.99, Status.INFEASIBLE), (1.01, Status.CONVERGED)):
        for b in range(5):
            if not np.isfinite(oracle[b]):
                continue
            near = Regularity(l=ratio * factor * float(L[b]), L=factor * float(L[b]))
            assert feasible_potentials(x_i[b : b + 1], z_i[b : b + 1], near).status[0] == status


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [-1.0, -0.3, 0.0])
def test_smallest_smoothness_of_a_hundred_problems(ratio: float) -> None:
    """Equal to a bisection on HiGHS, which also says that 1 % less admits nothing."""
    checked = 0
    for turn, seed in enumerate(range(100, 134)):
        k, d = 3 + turn % 6, 2 + (7 * turn) % 19
        # In few dimensions noise is rarely a gradient: a little less, so that l = 0 is feasible for some L.
        x_i, z_i = noisy_neighborhoods(1, k, d, noise=0.05 if d < 6 else 0.1, seed=seed)
        L = float(smallest_smoothness(x_i, z_i, ratio=ratio))
        x, z = x_i[0].numpy(), z_i[0].numpy()
        np.testing.assert_allclose(L, lp_smallest_smoothness(x, z, ratio, tolerance=1e-8), rtol=1e-6)
        if np.isfinite(L):
            checked += 1
            assert lp_potentials(x, z, 0.99 * ratio * L, 0.99 * L) is None
            assert lp_potentials(x, z, 1.01 * ratio * L, 1.01 * L) is not None
    assert checked >= 30


@pytest.mark.parametrize("ratio", RATIOS)
def test_smallest_smoothness_of_two_points(ratio: float) -> None:
    """Two points fit exactly if (dz - l dx).(dz - L dx) <= 0: a quadratic equation for L."""
    rng = np.random.default_rng(8)
    x_i, z_i = rng.normal(size=(20, 2, 3)), rng.normal(size=(20, 2, 3))
    dx, dz = x_i[:, 0] - x_i[:, 1], z_i[:, 0] - z_i[:, 1]
    xx, xz, zz = (dx**2).sum(1), (dx * dz).sum(1), (dz**2).sum(1)
    if ratio == 0:
        expected = np.where(xz > 0, zz / np.where(xz > 0, xz, 1.0), np.inf)
    else:  # ratio xx L^2 - (1 + ratio) xz L + zz = 0
        a, b, c = ratio * xx, -(1 + ratio) * xz, zz
        expected = (-b - np.sqrt(b**2 - 4 * a * c)) / (2 * a)
    L = smallest_smoothness(torch.from_numpy(x_i), torch.from_numpy(z_i), ratio=ratio)
    np.testing.assert_allclose(L, expected, rtol=1e-6)


def test_smallest_smoothness_of_scaled_identity_and_its_opposite() -> None:
    x_i = torch.from_numpy(np.random.default_rng(9).normal(size=(2, 8, 5)))
    for ratio, c, expected in [
        (-1.0, 1.7, 1.7),
        (-1.0, -1.7, 1.7),
        (0.0, 1.7, 1.7),
        (0.0, -1.7, np.inf),
        (-0.5, -1.0, 2.0),
    ]:
        L = smallest_smoothness(x_i, c * x_i, ratio=ratio)
        np.testing.assert_allclose(L, [expected] * 2, rtol=1e-6)


def test_smallest_smoothness_falls_as_the_class_widens() -> None:
    x_i, z_i = noisy_neighborhoods(20, k=8, d=4, noise=0.1, seed=10)
    narrow, middle, wide = (smallest_smoothness(x_i, z_i, ratio=ratio) for ratio in (0.0, -0.5, -1.0))
    assert (wide <= middle * (1 + 1e-6)).all()
    assert (middle <= narrow * (1 + 1e-6)).all()
    assert torch.isfinite(wide).all()  # l = -L always fits distinct points


def test_duplicates() -> None:
    """A point repeated with its feature changes nothing; one point with two features fits no potential."""
    p = known_problem(1, 6, 3, l=-1.0, L=1.0, seed=11)
    x_i, z_i = torch.cat([p.x_i, p.x_i[:, 2:4]], 1), torch.cat([p.z_i, p.z_i[:, 2:4]], 1)
    u, alone = feasible_potentials(x_i, z_i, p.regularity), feasible_potentials(p.x_i, p.z_i, p.regularity)
    torch.testing.assert_close(u.checked()[:, :6], alone.checked(), atol=1e-9, rtol=0)
    torch.testing.assert_close(u.checked()[:, 6:], alone.checked()[:, 2:4], atol=1e-9, rtol=0)
    for ratio in (-1.0, 0.0):
        torch.testing.assert_close(
            smallest_smoothness(x_i, z_i, ratio=ratio),
            smallest_smoothness(p.x_i, p.z_i, ratio=ratio),
            rtol=1e-6,
            atol=0,
        )
    torn = z_i.clone()
    torn[:, 7] += 0.1
    for regularity in (p.regularity, Regularity(l=-1e4, L=1e4)):
        assert feasible_potentials(x_i, torn, regularity).status[0] == Status.INFEASIBLE
    for ratio in (-1.0, 0.0):
        assert torch.isinf(smallest_smoothness(x_i, torn, ratio=ratio)).all()


@pytest.mark.parametrize("scale_x", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("scale_z", [1e-8, 1.0, 1e8])
def test_scales(scale_x: float, scale_z: float) -> None:
    p = known_problem(3, 8, 4, l=-1.0, L=1.0, seed=12)
    ratio = scale_z / scale_x
    u = feasible_potentials(scale_x * p.x_i, scale_z * p.z_i, Regularity(l=-ratio, L=ratio)).checked()
    unscaled = feasible_potentials(p.x_i, p.z_i, p.regularity).checked()
    torch.testing.assert_close(u / (scale_x * scale_z), unscaled, atol=1e-9, rtol=0)
    L = smallest_smoothness(scale_x * p.x_i, scale_z * p.z_i)
    torch.testing.assert_close(L / ratio, smallest_smoothness(p.x_i, p.z_i), rtol=1e-6, atol=0)


def test_far_from_the_origin() -> None:
    """Inner products at 1e6 lose twelve digits if nothing is centred first."""
    p = known_problem(3, 8, 4, l=-1.0, L=1.0, seed=13)
    near = feasible_potentials(p.x_i, p.z_i, p.regularity).checked()
    far = feasible_potentials(p.x_i + 1e6, p.z_i, p.regularity).checked()
    torch.testing.assert_close(far, near, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        smallest_smoothness(p.x_i + 1e6, p.z_i), smallest_smoothness(p.x_i, p.z_i), rtol=1e-6, atol=0
    )


def test_far_outlier_does_not_hide_a_contradiction() -> None:
    """One point at 1e4 must not make points 1 apart look equal, nor a contradiction look like rounding."""
    p = known_problem(1, 6, 3, l=-1.0, L=1.0, seed=14)
    far = torch.full((1, 1, 3), 1e4, dtype=torch.float64)
    x_i, z_i = torch.cat([p.x_i, far], 1), torch.cat([p.z_i, p.z_i[:, :1]], 1)
    within = smallest_smoothness(p.x_i, p.z_i)
    assert smallest_smoothness(x_i, z_i)[0] >= 0.999 * within[0]  # more points never need less
    assert torch.isfinite(smallest_smoothness(x_i, z_i)).all()
    too_small = 0.9 * float(within[0])
    assert feasible_potentials(x_i, z_i, Regularity(l=-too_small, L=too_small)).status[0] == Status.INFEASIBLE


def test_float32_agrees_with_float64() -> None:
    p = known_problem(16, 10, 20, l=-1.0, L=1.0, seed=15)
    single = feasible_potentials(p.x_i.float(), p.z_i.float(), Regularity(l=-1.1, L=1.1))
    double = feasible_potentials(p.x_i, p.z_i, Regularity(l=-1.1, L=1.1))
    assert single.checked().dtype == torch.float32
    torch.testing.assert_close(single.checked().double(), double.checked(), atol=1e-4, rtol=1e-4)
    L = smallest_smoothness(p.x_i.float(), p.z_i.float())
    assert L.dtype == torch.float32
    torch.testing.assert_close(L.double(), smallest_smoothness(p.x_i, p.z_i), rtol=1e-3, atol=0)


def test_shapes_that_do_not_match_are_refused() -> None:
    # ValueError from the library; TypeError where the tests' shape checker speaks first.
    with pytest.raises((ValueError, TypeError)):
        feasible_potentials(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), Regularity(l=0.0, L=1.0))
    with pytest.raises((ValueError, TypeError)):
        feasible_potentials(torch.zeros(3, 4), torch.zeros(3, 4), Regularity(l=0.0, L=1.0))


def test_positive_ratio_is_refused() -> None:
    """The classes F(ratio L, L) grow with L only where ratio <= 0; otherwise no smallest L need exist."""
    p = known_problem(1, 4, 2, seed=16)
    with pytest.raises(ValueError, match="ratio"):
        smallest_smoothness(p.x_i, p.z_i, ratio=0.5)
