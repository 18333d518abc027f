"""The defended module: exact fit, Lipschitz bound, gradients, invariances, both interpolations."""

import pytest
import torch
from torch import Tensor

from otad.cip import BrenierPotential, Regularity, Status
from otad.defense import OTAD, GlobalInterpolation, NeighborhoodInterpolation, NetworkInterpolation
from otad.errors import InfeasibleError
from otad.nn import CenteredFlatten
from otad.nn.cip_net import CIPNet, Imitation


def training_points(n: int = 120, d: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Points and the gradient of a convex, 1.5-smooth function at them."""
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=dtype)
    return x, 0.5 * x + torch.tanh(x)


def module(kind: str, dtype: torch.dtype = torch.float64, **settings: object) -> OTAD:
    x, z = training_points(dtype=dtype)
    torch.manual_seed(1)
    head = torch.nn.Linear(5, 3, dtype=dtype)
    interpolation: torch.nn.Module
    if kind == "global":
        interpolation = GlobalInterpolation(BrenierPotential.fit(x, z))
    else:
        interpolation = NeighborhoodInterpolation(x, z, **{"k": 8} | settings)  # type: ignore[arg-type]
        if kind == "network":
            net = CIPNet(width=16, layers=2, heads=2).to(dtype)
            interpolation = NetworkInterpolation(interpolation, net, Imitation(0.05, 0.1, 0.98, 0.4, 0.3, 500))
    return OTAD(CenteredFlatten(torch.zeros(5, dtype=dtype)), interpolation, head)


SOLVED = ["global", "neighborhood"]
KINDS = [*SOLVED, "network"]


@pytest.mark.parametrize("kind", SOLVED)
def test_fits_the_training_points_exactly(kind: str) -> None:
    x, z = training_points()
    torch.testing.assert_close(module(kind).features(x).value, z, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_sample_alone_gets_what_it_gets_in_a_batch(kind: str, dtype: torch.dtype, atol: float) -> None:
    model = module(kind, dtype)
    torch.manual_seed(2)
    x = torch.randn(17, 5, dtype=dtype)
    together = model(x)
    assert together.dtype == dtype
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=atol, rtol=0)
    assert torch.equal(together, model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind: str) -> None:
    model = module(kind)
    torch.manual_seed(3)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,), atol=1e-5)


def test_global_features_obey_the_bound_everywhere() -> None:
    model = module("global")
    torch.manual_seed(4)
    x = torch.randn(500, 5, dtype=torch.float64)
    y = x + torch.randn_like(x) * 10 ** (6 * torch.rand(500, 1, dtype=torch.float64) - 5)
    quotient = (model.features(x).value - model.features(y).value).norm(dim=1) / (x - y).norm(dim=1)
    assert model.lipschitz is not None
    assert quotient.amax() <= model.lipschitz * (1 + 1e-6)


def test_a_neighborhood_obeys_its_bound_while_its_neighbors_stay() -> None:
    model = module("neighborhood")
    torch.manual_seed(5)
    x = torch.randn(300, 5, dtype=torch.float64)
    here = model.features(x)
    room = (here.stats["next_distance"] - here.stats["distances"][:, -1]) / 2
    direction = torch.nn.functional.normalize(torch.randn_like(x), dim=1)
    there = model.features(x + 0.999 * room[:, None] * direction)
    assert torch.equal(here.stats["indices"].sort().values, there.stats["indices"].sort().values)
    moved = (here.value - there.value).norm(dim=1)
    assert (moved <= here.stats["L"] * room * (1 + 1e-6) + 1e-9).all()


def test_weights_name_points_that_make_up_the_feature() -> None:
    """For l = 0 the lower interpolant's feature is the weighted mean of the features named."""
    model = module("neighborhood", regularity=Regularity(0.0, 2.0))
    torch.manual_seed(6)
    solution = model.features(torch.randn(20, 5, dtype=torch.float64))
    _, z = training_points()
    mean = (solution.stats["weights"][:, :, None] * z[solution.stats["indices"]]).sum(1)
    torch.testing.assert_close(mean, solution.value, atol=1e-9, rtol=0)
    assert not solution.stats["relaxed"].any()


def test_infeasible_neighborhoods_are_flagged_or_raised() -> None:
    tight = Regularity(0.0, 0.6)  # the map's quotients reach 1.5
    x = torch.randn(10, 5, dtype=torch.float64)
    relaxed = module("neighborhood", regularity=tight).features(x)
    assert relaxed.stats["relaxed"].any()
    assert relaxed.value.isfinite().all()
    with pytest.raises(InfeasibleError, match="raise L"):
        module("neighborhood", regularity=tight, infeasible="raise").features(x)


def test_wider_smoothing_gives_a_gradient_where_the_true_one_vanishes() -> None:
    model = module("neighborhood", regularity=Regularity(0.0, 50.0))
    x, _ = training_points()
    inputs = x[:30].clone().requires_grad_()
    (flat,) = torch.autograd.grad(model(inputs).square().sum(), inputs)
    (slope,) = torch.autograd.grad(model.smoothed(0.005)(inputs).square().sum(), inputs)
    assert (flat.norm(dim=1) == 0).any()
    assert ((slope.norm(dim=1) > 0) >= (flat.norm(dim=1) > 0)).all()
    assert (slope.norm(dim=1) > 0).double().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_float64_copy_is_the_same_function(kind: str) -> None:
    model = module(kind, torch.float32)
    torch.manual_seed(7)
    x = torch.randn(50, 5)
    torch.testing.assert_close(model.exact()(x.double()).float(), model(x), atol=2e-4, rtol=0)
    assert model(x).dtype == torch.float32


def test_a_network_answers_within_the_hull_and_says_how_near_it_is() -> None:
    """Every feature is the mean of the neighbours' features with the weights named, none of them negative."""
    model = module("network")
    torch.manual_seed(8)
    solution = model.features(3 * torch.randn(30, 5, dtype=torch.float64))
    weights, (_, z) = solution.stats["weights"], training_points()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close((weights[:, :, None] * z[solution.stats["indices"]]).sum(1), solution.value)
    assert (solution.status == int(Status.GUESSED)).all()
    assert (solution.stats["expected_error"] == 0.05).all()
    assert (solution.stats["expected_agreement"] == 0.98).all()
    assert model.lipschitz is None


def test_a_network_over_one_neighbor_is_exact() -> None:
    model = module("network", k=1)
    x = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), model.solved()(x))


def test_a_smoothed_network_spreads_its_weights() -> None:
    model = module("network")
    x = torch.randn(20, 5, dtype=torch.float64)
    sharp, wide = (m.features(x).stats["weights"] for m in (model, model.smoothed(0.1)))
    assert (wide.amax(1) < sharp.amax(1)).all()
    assert model.solved().smoothed(0.1).interpolation.smoothing == 0.1


def test_what_a_network_imitates_is_the_solver_itself() -> None:
    network, solved = module("network"), module("neighborhood")
    x = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(network.solved()(x), solved(x))
    assert solved.solved() is solved
