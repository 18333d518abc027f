"""One potential through all points: against known potentials, HiGHS, and Clarabel given every point."""

import numpy as np
import pytest
import torch
from torch import Tensor

from otad.cip import BrenierPotential, Regularity, feasible_potentials, interpolate
from otad.cip import envelope as envelopes
from otad.cip.envelope import MoreauEnvelope
from otad.cip.simplex_qp import SimplexOptimum, solve_simplex_qp
from otad.cip.solution import Status
from otad.errors import InfeasibleError

from .oracles import enumerated, lp_potentials, lp_smallest_smoothness, qcqp, worst_violation
from .problems import BRANCHES, Branch, KnownPotential

pytestmark = pytest.mark.slow


# How far above the smallest feasible L `fit` may stay.
SMOOTHNESS_SLACK = 1.001e-3


def known_map(n: int, d: int, l: float = -1.0, L: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, KnownPotential]:
    rng = np.random.default_rng(seed)
    potential = KnownPotential.random(d, l, L, rng)
    x = rng.normal(size=(n, d))
    return torch.from_numpy(x), torch.from_numpy(potential.gradient(x)), potential


def queries(m: int, d: int, seed: int = 1) -> Tensor:
    """Some among the points, some far outside."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(m, d)) * 10.0 ** rng.uniform(-1, 1, size=(m, 1)))


@pytest.fixture(scope="module")
def fitted() -> tuple[Tensor, Tensor, BrenierPotential]:
    x, z, _ = known_map(200, 4)
    return x, z, BrenierPotential.fit(x, z, ratio=-1.0)


@pytest.mark.parametrize(("l", "L"), [(-1.0, 1.0), (-0.5, 1.5), (0.0, 2.0), (0.3, 1.5)])
def test_given_bounds_hold_over_all_pairs(l: float, L: float) -> None:
    x, z, potential = known_map(200, 4, l, L)
    phi = BrenierPotential.fit(x, z, regularity=Regularity(l=l, L=L))
    assert (float(phi.regularity.l), float(phi.regularity.L)) == (l, L)
    assert float(phi.lipschitz) == max(abs(l), L)
    assert phi.potentials.shape == (200,)
    known = potential(x.numpy())
    assert worst_violation(x.numpy(), z.numpy(), phi.potentials.numpy(), l, L) <= 1e-9 * np.ptp(known)
    torch.testing.assert_close(phi(x).checked(), phi.potentials, atol=1e-8, rtol=0)
    for branch in BRANCHES:
        torch.testing.assert_close(phi.gradient(x, branch=branch).checked(), z, atol=1e-6, rtol=0)


def test_smallest_bounds_hold_over_all_pairs(fitted: tuple[Tensor, Tensor, BrenierPotential]) -> None:
    x, z, phi = fitted
    l, L = float(phi.regularity.l), float(phi.regularity.L)
    assert l == pytest.approx(-L)
    assert L <= 1.0 + SMOOTHNESS_SLACK  # the known potential fits with 1
    assert float(phi.lipschitz) == pytest.approx(L)
    assert worst_violation(x.numpy(), z.numpy(), phi.potentials.numpy(), l, L) <= 1e-9
    for branch in BRANCHES:
        torch.testing.assert_close(phi.gradient(x, branch=branch).checked(), z, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", [-1.0, -0.5, 0.0])
def test_smallest_smoothness_equals_highs(ratio: float) -> None:
    x, z, _ = known_map(25, 3, l=0.1, L=1.0, seed=2)
    rng = np.random.default_rng(3)
    z = z + 0.02 * torch.from_numpy(rng.normal(size=z.shape))
    phi = BrenierPotential.fit(x, z, ratio=ratio)
    oracle = lp_smallest_smoothness(x.numpy(), z.numpy(), ratio)
    L = float(phi.regularity.L)
    assert oracle * (1 - 1e-6) <= L <= oracle * (1 + SMOOTHNESS_SLACK)
    assert float(phi.regularity.l) == pytest.approx(ratio * L)
    below = Regularity(l=0.99 * ratio * L, L=0.99 * L)
    with pytest.raises(InfeasibleError):
        BrenierPotential.fit(x, z, regularity=below)


def test_potentials_are_the_smallest() -> None:
    x, z, _ = known_map(25, 3, seed=4)
    phi = BrenierPotential.fit(x, z, regularity=Regularity(l=-1.2, L=1.2))
    oracle = lp_potentials(x.numpy(), z.numpy(), -1.2, 1.2)
    assert oracle is not None
    np.testing.assert_allclose(phi.potentials - phi.potentials.min(), oracle, atol=1e-8)
    few = feasible_potentials(x[None], z[None], Regularity(l=-1.2, L=1.2)).checked()[0]
    torch.testing.assert_close(phi.potentials - phi.potentials.min(), few, atol=1e-9, rtol=0)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("l", "L"), [(-1.0, 1.0), (0.0, 2.0)])
def test_equals_the_programme_with_all_points(branch: Branch, l: float, L: float) -> None:
    x, z, _ = known_map(40, 3, l, L, seed=5)
    phi = BrenierPotential.fit(x, z, regularity=Regularity(l=l, L=L))
    x_new = queries(4, 3)
    value, feature = phi(x_new, branch=branch), phi.gradient(x_new, branch=branch)
    for b in range(4):
        dense = qcqp(x_new[b].numpy(), x.numpy(), z.numpy(), phi.potentials.numpy(), l, L, branch)
        assert float(value.checked()[b]) == pytest.approx(dense[0], rel=1e-7, abs=1e-7)
        np.testing.assert_allclose(feature.checked()[b], dense[1], atol=1e-4, rtol=1e-4)  # see test_interpolation


@pytest.mark.parametrize("branch", BRANCHES)
def test_equals_the_dense_kernel(fitted: tuple[Tensor, Tensor, BrenierPotential], branch: Branch) -> None:
    """The working set against the local kernel given all 200 points as neighbours."""
    x, z, phi = fitted
    x_new = queries(20, 4)
    feature, value = phi.gradient(x_new, branch=branch), phi(x_new, branch=branch)
    x_i, z_i, u_i = (t.expand(20, *t.shape) for t in (x, z, phi.potentials))
    dense = interpolate(x_new, x_i, z_i, u_i, phi.regularity, branch=branch)
    torch.testing.assert_close(feature.checked(), dense.checked(), atol=1e-6, rtol=1e-7)
    torch.testing.assert_close(value.checked(), dense.stats["value"], atol=1e-8, rtol=1e-8)
    assert (feature.stats["gap"] <= 1e-8 * (1 + value.value.abs())).all()


def test_few_points_by_enumeration() -> None:
    x, z, _ = known_map(7, 2, seed=6)
    phi = BrenierPotential.fit(x, z, regularity=Regularity(l=-1.0, L=1.0))
    x_new = queries(6, 2)
    for branch in BRANCHES:
        for b in range(6):
            value, feature = enumerated(
                x_new[b].numpy(), x.numpy(), z.numpy(), phi.potentials.numpy(), -1.0, 1.0, branch
            )
            assert float(phi(x_new, branch=branch).checked()[b]) == pytest.approx(value, abs=1e-8)
            np.testing.assert_allclose(phi.gradient(x_new, branch=branch).checked()[b], feature, atol=1e-6)


def test_lower_below_mean_below_upper() -> None:
    x, z, potential = known_map(60, 3, seed=7)
    phi = BrenierPotential.fit(x, z, regularity=Regularity(l=-1.0, L=1.0))
    known = potential(x.numpy())
    assert (phi.potentials.numpy() - float(phi.potentials.min()) <= known - known.min() + 1e-9).all()
    x_new = queries(50, 3)
    lower, upper, mean = (phi(x_new, branch=branch).checked() for branch in BRANCHES)
    assert (lower <= upper + 1e-9).all()
    torch.testing.assert_close(mean, 0.5 * (lower + upper), atol=1e-9, rtol=1e-12)
    features = [phi.gradient(x_new, branch=branch).checked() for branch in BRANCHES]
    torch.testing.assert_close(features[2], 0.5 * (features[0] + features[1]), atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradient_is_the_derivative_of_the_value(
    fitted: tuple[Tensor, Tensor, BrenierPotential], branch: Branch
) -> None:
    _, _, phi = fitted
    x = queries(12, 4, seed=8).requires_grad_()
    feature = phi.gradient(x.detach(), branch=branch).checked()
    (automatic,) = torch.autograd.grad(phi(x, branch=branch).checked().sum(), x)
    torch.testing.assert_close(automatic, feature, atol=1e-7, rtol=1e-7)
    h = 1e-4
    for j, step in enumerate(h * torch.eye(4, dtype=torch.float64)):
        up, down = (phi(x.detach() + sign * step, branch=branch).checked() for sign in (1, -1))
        # phi is twice differentiable between pieces only; its second derivative is at most L in size.
        torch.testing.assert_close((up - down) / (2 * h), feature[:, j], atol=2 * h, rtol=0)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradcheck(branch: Branch) -> None:
    x, z, _ = known_map(60, 3, seed=9)
    phi = BrenierPotential.fit(x, z, regularity=Regularity(l=-1.1, L=1.1))
    x_new = queries(2, 3, seed=10).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: phi(q, branch=branch).checked(), (x_new,), eps=1e-6, atol=1e-5)
    assert torch.autograd.gradcheck(lambda q: phi.gradient(q, branch=branch).checked(), (x_new,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["forward", "gradient"])
def test_a_second_derivative_is_refused(fitted: tuple[Tensor, Tensor, BrenierPotential], method: str) -> None:
    x, _, potential = fitted
    query = (x[:3] + 0.1).requires_grad_()
    value = getattr(potential, method)(query).value
    (plain,) = torch.autograd.grad(value.sum(), query, retain_graph=True)
    (first,) = torch.autograd.grad(value.sum(), query, create_graph=True)
    torch.testing.assert_close(first, plain)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (first.square().sum() + query.sum()).backward()


@pytest.mark.parametrize("branch", BRANCHES)
def test_globally_lipschitz(fitted: tuple[Tensor, Tensor, BrenierPotential], branch: Branch) -> None:
    _, _, phi = fitted
    rng = np.random.default_rng(11)
    x = queries(400, 4, seed=12)
    y = x + torch.from_numpy(rng.normal(size=(400, 4)) * 10.0 ** rng.uniform(-3, 1, size=(400, 1)))
    dz = phi.gradient(y, branch=branch).checked() - phi.gradient(x, branch=branch).checked()
    assert (dz.norm(dim=1) / (y - x).norm(dim=1)).max() <= float(phi.lipschitz) * (1 + 1e-6)


def test_branches_and_defaults(fitted: tuple[Tensor, Tensor, BrenierPotential]) -> None:
    _, _, phi = fitted
    with pytest.raises((ValueError, TypeError)):  # TypeError where the tests' shape checker speaks first
        phi.gradient(queries(2, 4), branch="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, TypeError)):
        phi.gradient(torch.zeros(2, 5, dtype=torch.float64))


def test_rows_do_not_depend_on_their_batch(fitted: tuple[Tensor, Tensor, BrenierPotential]) -> None:
    _, _, phi = fitted
    x = queries(30, 4, seed=13)
    whole = phi.gradient(x, branch="mean").checked()
    parts = torch.cat([phi.gradient(rows, branch="mean").checked() for rows in x.split(7)])
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=0)
    assert phi.gradient(x[:0], branch="mean").value.shape == (0, 4)


def test_duplicates() -> None:
    """Equal points with equal features are one point; with different features they fit no potential."""
    x, z, _ = known_map(50, 3, seed=14)
    regularity = Regularity(l=-1.0, L=1.0)
    once = BrenierPotential.fit(x, z, regularity=regularity)
    twice = BrenierPotential.fit(torch.cat([x, x[:10]]), torch.cat([z, z[:10]]), regularity=regularity)
    x_new = queries(20, 3)
    for branch in BRANCHES:
        torch.testing.assert_close(
            twice.gradient(x_new, branch=branch).checked(),
            once.gradient(x_new, branch=branch).checked(),
            atol=1e-6,
            rtol=1e-7,
        )
    torn = torch.cat([z, z[:1] + 0.5])
    with pytest.raises(ValueError, match=r"equal points|duplicates"):
        BrenierPotential.fit(torch.cat([x, x[:1]]), torn, ratio=-1.0)
    with pytest.raises(InfeasibleError):
        BrenierPotential.fit(torch.cat([x, x[:1]]), torn, regularity=regularity)


def test_convex_bounds_that_nothing_fits() -> None:
    x, _, _ = known_map(20, 3, seed=15)
    with pytest.raises(InfeasibleError):
        BrenierPotential.fit(x, -x, ratio=0.0)
    with pytest.raises(InfeasibleError):
        BrenierPotential.fit(x, -x, regularity=Regularity(l=0.0, L=2.0))


def test_extreme_quadratic_is_reproduced_between_the_points() -> None:
    """z = c x needs L = |c| for l = -L, and then every branch is c x in the convex hull of the points."""
    x, _, _ = known_map(30, 3, seed=16)
    x_new = torch.from_numpy(np.random.default_rng(17).dirichlet(np.full(30, 0.2), size=10)) @ x
    for c in (1.3, -1.3):
        phi = BrenierPotential.fit(x, c * x, ratio=-1.0)
        assert float(phi.regularity.L) == pytest.approx(1.3, rel=SMOOTHNESS_SLACK)
        exact = BrenierPotential.fit(x, c * x, regularity=Regularity(l=-1.3, L=1.3))
        for branch in BRANCHES:
            torch.testing.assert_close(exact.gradient(x_new, branch=branch).checked(), c * x_new, atol=1e-5, rtol=1e-5)


def test_one_point() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    phi = BrenierPotential.fit(x, x + 1.0, regularity=Regularity(l=-1.0, L=2.0))
    x_new = queries(3, 2)
    for branch, slope in zip(BRANCHES, (-1.0, 2.0, 0.5), strict=True):
        torch.testing.assert_close(phi.gradient(x_new, branch=branch).checked(), 1.0 + slope * x_new, atol=1e-9, rtol=0)


def test_float32_agrees_with_float64() -> None:
    x, z, _ = known_map(150, 8, seed=17)
    regularity = Regularity(l=-1.05, L=1.05)
    double = BrenierPotential.fit(x, z, regularity=regularity)
    single = BrenierPotential.fit(x.float(), z.float(), regularity=regularity)
    x_new = torch.from_numpy(np.random.default_rng(18).normal(size=(20, 8)))
    for branch in BRANCHES:
        feature = single.gradient(x_new.float(), branch=branch).checked()
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature.double(), double.gradient(x_new, branch=branch).checked(), atol=5e-3, rtol=0)
    torch.testing.assert_close(single.gradient(x.float()).checked(), z.float(), atol=1e-3, rtol=0)


def test_fit_wants_one_of_ratio_and_regularity_and_matching_shapes() -> None:
    x, z, _ = known_map(5, 2, seed=19)
    with pytest.raises((ValueError, TypeError)):
        BrenierPotential.fit(x, z[:, :1])
    with pytest.raises((ValueError, TypeError)):
        BrenierPotential.fit(x[:0], z[:0])
    with pytest.raises(ValueError, match="ratio"):
        BrenierPotential.fit(x, z, ratio=0.5)
    for bad in (torch.nan, torch.inf):
        broken = z.clone()
        broken[1, 1] = bad
        with pytest.raises(ValueError):
            BrenierPotential.fit(x, broken)


def test_an_envelope_whose_pieces_change_in_place_answers_for_the_new_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    slopes, x = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (200, 20))
    offsets = torch.zeros(200, dtype=torch.float64)
    envelope = MoreauEnvelope(slopes.clone(), offsets.clone(), 2.0)
    envelope(x)
    envelope.slopes.mul_(-3.0)
    envelope.offsets.add_(slopes[:, 0])
    expected = MoreauEnvelope(-3.0 * slopes, slopes[:, 0], 2.0)(x)
    torch.testing.assert_close(envelope(x).gradient, expected.gradient)


def whole(slopes: Tensor, offsets: Tensor, M: float, x: Tensor) -> SimplexOptimum:
    """The dual over all pieces at once."""
    centered = slopes - slopes.mean(0)
    c = x @ slopes.T + offsets - centered @ slopes.mean(0) / M
    return solve_simplex_qp((centered @ centered.T / M).expand(len(x), -1, -1), c)


@pytest.mark.parametrize("constant", [0.0, 1e6, 1e12])
@pytest.mark.parametrize(("n", "d"), [(1, 2), (30, 1), (60, 6), (150, 40)])
def test_envelope_is_the_programme_over_all_pieces(n: int, d: int, constant: float) -> None:
    generator = torch.Generator().manual_seed(n)
    slopes, x = (torch.randn(m, d, dtype=torch.float64, generator=generator) for m in (n, 15))
    offsets = torch.randn(n, dtype=torch.float64, generator=generator)
    expected = whole(slopes, offsets, 0.7, x).weights @ slopes
    found = MoreauEnvelope(slopes, offsets + constant, 0.7)(x)
    torch.testing.assert_close(found.gradient, expected, atol=1e-7 + 1e-14 * constant, rtol=0)
    assert bool(((found.gradient - expected).norm(dim=1) <= (2 * 0.7 * found.gap).sqrt() + 1e-14 * constant).all())


def test_the_gap_holds_where_the_search_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelopes, "MAX_ROUNDS", 2)
    generator = torch.Generator().manual_seed(1)
    slopes, x = (torch.randn(m, 40, dtype=torch.float64, generator=generator) for m in (400, 30))
    slopes /= slopes.norm(dim=1, keepdim=True)
    offsets = 0.01 * torch.randn(400, dtype=torch.float64, generator=generator)
    exact = MoreauEnvelope(slopes, offsets, 0.05)
    cut = exact(0.01 * x)
    monkeypatch.undo()
    full = exact(0.01 * x)
    assert bool((cut.status == Status.MAX_STEPS).any())
    assert bool((full.status == Status.CONVERGED).all())
    assert bool(((cut.value - full.value).abs() <= cut.gap + full.gap).all())


def test_queries_that_a_sketch_says_nothing_of_are_exact() -> None:
    generator = torch.Generator().manual_seed(2)
    slopes = torch.randn(700, 600, dtype=torch.float64, generator=generator)
    slopes /= slopes.norm(dim=1, keepdim=True)
    x = torch.rand(6, 600, dtype=torch.float64, generator=generator)
    offsets = torch.zeros(700, dtype=torch.float64)
    found = MoreauEnvelope(slopes, offsets, 1.0)(x)
    assert bool((found.status == Status.CONVERGED).all())
    y = x - found.gradient
    attained = (y * found.gradient).sum(1)
    torch.testing.assert_close((y @ slopes.T).amax(1), attained, atol=1e-10, rtol=0)


def test_rows_that_are_not_finite_leave_the_others_their_derivatives() -> None:
    generator = torch.Generator().manual_seed(3)
    slopes = torch.randn(50, 4, dtype=torch.float64, generator=generator).requires_grad_()
    x = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    x[2] = torch.nan
    found = MoreauEnvelope(slopes, torch.zeros(50, dtype=torch.float64), 1.0)(x)
    good = [0, 1, 3, 4]
    (to_slopes,) = torch.autograd.grad(found.gradient[good].square().sum(), slopes)
    alone = MoreauEnvelope(slopes, torch.zeros(50, dtype=torch.float64), 1.0)(x[good])
    (expected,) = torch.autograd.grad(alone.gradient.square().sum(), slopes)
    torch.testing.assert_close(to_slopes, expected)


def test_a_loaded_state_is_the_one_evaluated() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randn(30, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    known, other = (BrenierPotential.fit(x, 0.5 * x.tanh()) for x in (first, second))
    copy = BrenierPotential(other.x.clone(), other.z.clone(), other.potentials.clone(), known.regularity)
    copy.load_state_dict(known.state_dict())
    torch.testing.assert_close(copy.gradient(second).value, known.gradient(second).value)
