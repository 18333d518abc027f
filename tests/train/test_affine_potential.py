"""The learned potential's fast path: equal to the exact envelope, right derivatives, Lipschitz whatever the pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otad.cip import BrenierPotential, Regularity
from otad.cip.simplex_qp import solve_simplex_qp
from otad.train.affine_potential import AffinePotential

BOUNDS = [Regularity(-1.0, 1.0), Regularity(0.0, 1.0), Regularity(-0.3, 1.0)]


def potential(n: int, d: int, bounds: Regularity, seed: int = 0, candidates: int = 20) -> AffinePotential:
    draws = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, n, d, generator=draws, dtype=torch.float64)
    return AffinePotential(x, z, x.square().sum(1) / 2, bounds, candidates)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("n", "d"), [(12, 3), (300, 5), (1000, 20)])
def test_fast_path_equals_the_exact_envelope(n: int, d: int, bounds: Regularity) -> None:
    fast = potential(n, d, bounds)
    x = 2 * torch.randn(100, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = fast.fixed().gradient(x, "lower").checked()
    assert torch.allclose(fast(x), exact, atol=1e-6)


def test_float32_costs_rounding_only() -> None:
    fast = potential(300, 10, BOUNDS[0])
    x = torch.randn(100, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(fast.float()(x.float()).double(), fast.double()(x), atol=1e-3)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_derivatives_by_finite_differences(bounds: Regularity) -> None:
    fast = potential(11, 2, bounds, candidates=10)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)

    def features(x: Tensor, z: Tensor, intercepts: Tensor) -> Tensor:
        return torch.func.functional_call(fast, {"features": z, "intercepts": intercepts}, (x,))

    assert torch.autograd.gradcheck(features, (x, fast.features, fast.intercepts), eps=1e-6, atol=1e-5)


def test_gradients_are_those_of_the_exact_envelope() -> None:
    fast, bounds = potential(200, 6, BOUNDS[0]), BOUNDS[0]
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pull = torch.randn(30, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = torch.autograd.grad((fast(x) * pull).sum(), [fast.features, fast.intercepts])
    # All pieces in one programme, whose derivatives are the solver's own.
    M = float(bounds.curvature_range)
    slopes = fast.features - float(bounds.l) * fast.x
    offsets = fast.intercepts + slopes.square().sum(1) / (2 * M)
    Q = (slopes @ slopes.T / M).expand(30, -1, -1)
    weights = solve_simplex_qp(Q, x @ slopes.T + offsets).weights
    expected = torch.autograd.grad((weights @ slopes * pull).sum(), [fast.features, fast.intercepts])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=6, deadline=None)
def test_gradient_is_one_lipschitz_whatever_the_pieces(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    x, z = 3 * torch.randn(2, 50, 3, generator=draws, dtype=torch.float64)
    fixed = AffinePotential(x, z, 10 * torch.randn(50, generator=draws), BOUNDS[seed % 3]).fixed()
    a = 5 * torch.randn(200, 3, generator=draws, dtype=torch.float64)
    b = a + torch.randn(200, 1, generator=draws, dtype=torch.float64) * torch.randn(200, 3, generator=draws).double()
    moved = (fixed.gradient(a, "lower").value - fixed.gradient(b, "lower").value).norm(dim=1)
    assert (moved <= (a - b).norm(dim=1) * (1 + 1e-9) + 1e-9).all()


def test_no_pair_found_by_ascent_exceeds_the_bound() -> None:
    fixed = potential(25, 3, BOUNDS[0]).fixed()
    draws = torch.Generator().manual_seed(5)
    a = torch.randn(20, 3, generator=draws, dtype=torch.float64).requires_grad_()
    b = torch.randn(20, 3, generator=draws, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(25):
        moved = (fixed.gradient(a, "lower").value - fixed.gradient(b, "lower").value).norm(dim=1)
        quotient = moved / (a - b).norm(dim=1)
        optimizer.zero_grad()
        (-quotient.sum()).backward()
        optimizer.step()
    assert quotient.max() <= 1 + 1e-9
    assert quotient.median() > 0.9  # the ascent found the steep directions


def test_started_from_a_fitted_potential_it_is_that_potential() -> None:
    draws = torch.Generator().manual_seed(6)
    x = torch.randn(80, 5, generator=draws, dtype=torch.float64)
    fitted = BrenierPotential.fit(x, x + 0.3 * torch.tanh(2 * x))
    started = AffinePotential.of(fitted)
    queries = torch.randn(40, 5, generator=draws, dtype=torch.float64)
    expected = fitted.gradient(queries, "lower").value / fitted.lipschitz
    assert torch.allclose(started(queries), expected, atol=1e-6)
    assert started.fixed().lipschitz == pytest.approx(1.0)


def test_bad_input_is_refused() -> None:
    x = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="candidates"):
        AffinePotential(x, x, x[:, 0], BOUNDS[0], candidates=8)
    with pytest.raises(ValueError, match="got"):
        AffinePotential(x[:0], x[:0], x[:0, 0], BOUNDS[0])
