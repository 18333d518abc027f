import math

import numpy as np
import pytest
import torch

from otad.cip import Regularity

from .oracles import (
    theorem_right_side,
    worst_violation,
)
from .problems import BOUNDS, KnownPotential


@pytest.mark.parametrize(
    ("l", "L"), [(2.0, 1.0), (1.0, 1.0), (-1.0, 0.0), (-2.0, -1.0), (math.nan, 1.0), (0.0, math.inf)]
)
def test_impossible_bounds_are_refused(l: float, L: float) -> None:
    with pytest.raises(ValueError, match="L"):
        Regularity(l=l, L=L)


@pytest.mark.parametrize(
    ("l", "L", "lipschitz"), [(-3.0, 2.0, 3.0), (-1.0, 2.0, 2.0), (0.0, 2.0, 2.0), (1.0, 2.0, 2.0)]
)
def test_lipschitz_constant_of_the_gradient(l: float, L: float, lipschitz: float) -> None:
    assert float(torch.as_tensor(Regularity(l=l, L=L).lipschitz)) == lipschitz


def test_bounds_are_compared_in_double_precision() -> None:
    """1 and 1 + 1e-9 are equal in float32, and so are 1e-100 and 0."""
    assert Regularity(l=1.0, L=1.0 + 1e-9).curvature_range == pytest.approx(1e-9, rel=1e-6)
    assert Regularity(l=-1e-100, L=1e-100).lipschitz == 1e-100


@pytest.mark.parametrize(("l", "L"), BOUNDS)
def test_known_potentials_have_the_curvature_they_claim(l: float, L: float) -> None:
    """The generator of the other tests: finite differences for its gradient, eigenvalues for its Hessian."""
    rng = np.random.default_rng(0)
    phi = KnownPotential.random(4, l, L, rng)
    x, h = rng.normal(size=4), 1e-6
    steps = h * np.eye(4)
    np.testing.assert_allclose((phi(x + steps) - phi(x - steps)) / (2 * h), phi.gradient(x), atol=1e-8)
    hessian = (phi.gradient(x + steps) - phi.gradient(x - steps)) / (2 * h)
    eigenvalues = np.linalg.eigvalsh(0.5 * (hessian + hessian.T))
    assert l - 1e-7 <= eigenvalues.min() <= eigenvalues.max() <= L + 1e-7
    x = rng.normal(size=(12, 4))
    assert worst_violation(x, phi.gradient(x), phi(x), l, L) <= 1e-12


def test_the_theorem_is_tight_on_extreme_quadratics() -> None:
    """For phi = c |x|^2 / 2 with c = l or c = L the theorem holds with equality."""
    rng = np.random.default_rng(1)
    dx, l, L = rng.normal(size=(6, 3)), -0.7, 1.9
    for c in (l, L):  # phi_i - phi_j - <z_j, x_i - x_j> = c |dx|^2 / 2
        np.testing.assert_allclose(theorem_right_side(dx, c * dx, l, L), 0.5 * c * (dx**2).sum(1), atol=1e-12)
