"""The mean of potentials: value, gradient, Lipschitz constant and what its pieces add up to."""

import pytest
import torch

from otad.certificate import certify
from otad.cip import BrenierPotential, Regularity
from otad.cip.mean_potential import MeanPotential
from otad.defense import OTAD, GlobalInterpolation
from otad.nn import CenteredFlatten


def members() -> list[BrenierPotential]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for n, L in ((20, 1.0), (30, 3.0)):
        x, z = torch.randn(2, n, 4, generator=draws, dtype=torch.float64)
        found.append(BrenierPotential(x, z, torch.zeros(n), Regularity(-L, L)))
    return found


def queries() -> torch.Tensor:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gradient_is_that_of_the_mean_value() -> None:
    mean = MeanPotential(members())
    x = queries().requires_grad_()
    (gradient,) = torch.autograd.grad(mean(x, "lower").value.sum(), x)
    assert torch.allclose(mean.gradient(x, "lower").value, gradient, atol=1e-8)


def test_lipschitz_constant_holds() -> None:
    mean = MeanPotential(members())
    assert mean.lipschitz == pytest.approx(2.0)
    x = queries()
    near = x + 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = (mean.gradient(x).value - mean.gradient(near).value).norm(dim=1)
    assert (moved <= 2 * (x - near).norm(dim=1) * (1 + 1e-9) + 1e-9).all()


def test_named_pieces_make_up_the_feature() -> None:
    """z(x) - l x is the weighted sum of the slopes z_i - l x_i."""
    parts = members()
    mean = MeanPotential(parts)
    solution = mean.gradient(queries(), "lower")
    slopes = torch.cat([part.z + part.lipschitz * part.x for part in parts])
    combined = (solution.stats["weights"][:, :, None] * slopes[solution.stats["indices"]]).sum(1)
    assert torch.allclose(solution.value, combined - mean.lipschitz * queries(), atol=1e-8)
    assert torch.allclose(solution.stats["weights"].sum(1), torch.ones(40, dtype=torch.float64))


def test_a_classifier_on_it_is_certified() -> None:
    """Two members that are one potential certify what the one does."""
    one = members()[0]
    head = torch.nn.Linear(4, 3, dtype=torch.float64)
    stem = CenteredFlatten(torch.zeros(4, dtype=torch.float64))
    alone = certify(OTAD(stem, GlobalInterpolation(one, "lower"), head), queries())
    both = certify(OTAD(stem, GlobalInterpolation(MeanPotential([one, one]), "lower"), head), queries())
    assert (both.label == alone.label).all()
    assert both.radius == pytest.approx(alone.radius, abs=1e-9)


def test_members_must_fit() -> None:
    with pytest.raises(ValueError, match="one space"):
        MeanPotential([])
