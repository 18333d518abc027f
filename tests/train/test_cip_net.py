"""Training CIP-net: it must learn what no trivial guess knows, repeat itself, and go on after an interruption."""

import itertools
from pathlib import Path

import pytest
import torch

from otad.cip import Regularity, interpolate_neighborhood
from otad.cip.gram import inner_products
from otad.defense import NeighborhoodInterpolation, guessed_weights
from otad.errors import ModelFolderError
from otad.nn.cip_net import CIPNet
from otad.train.cip_net import Problems, fit_cip_net, imitate, solved_problems
from otad.train.state import TrainingState

SMALL = {"width": 16, "layers": 1, "heads": 2}


def solver(n: int = 150, d: int = 4, **settings: object) -> NeighborhoodInterpolation:
    """Over the gradient of a convex, 1.5-smooth function."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    settings = {"regularity": Regularity(0.0, 2.0), "k": 6} | settings
    return NeighborhoodInterpolation(x, 0.5 * x + torch.tanh(x), **settings)  # type: ignore[arg-type]


def head() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(4, 3)


@pytest.fixture(scope="module")
def problems() -> Problems:
    return solved_problems(solver(), 400, rows=torch.arange(150), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("regularity", [Regularity(0.0, 2.0), None], ids=["fixed", "searched"])
def test_it_beats_the_guesses_that_need_no_network(regularity: Regularity | None) -> None:
    """At most half the error of the nearest neighbour's feature, and of the mean feature, on held-out problems."""
    exact = solver(regularity=regularity)
    net, found, _ = imitate(exact, head(), n_problems=2000, epochs=12, seed=0, device="cpu")
    for imitation in found.values():
        assert 2 * imitation.feature_error < min(imitation.nearest_error, imitation.mean_error)
        assert imitation.label_agreement > 0.9
    # What it says of itself holds for queries from elsewhere.
    x = torch.randn(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    z, ours = exact(x).value, net(x)
    error = float(((ours.value - z).norm(dim=1) / z.norm(dim=1)).mean())
    assert error < 2 * float(ours.stats["expected_error"][0])


def test_inner_products_carry_the_whole_problem(problems: Problems) -> None:
    """Any points with the stored inner products have the stored solution."""
    zz, zd, dd, tilt, weights = (part.double() for part in problems)
    gram = torch.cat([torch.cat([zz, zd], 2), torch.cat([zd.transpose(1, 2), dd], 2)], 1)
    values, vectors = torch.linalg.eigh(gram)
    z_i, delta = (vectors * values.clamp(min=0).sqrt()[:, None]).split(6, dim=1)
    mean = torch.linalg.lstsq(delta, tilt[:, :, None], driver="gelsd", rcond=1e-3).solution.transpose(1, 2)
    found = interpolate_neighborhood(torch.zeros_like(delta[:, 0]), -delta, z_i + mean, Regularity(0.0, 2.0))
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), atol=1e-6, rtol=0)
    apart = ((found.stats["weights"] - weights)[:, None] @ z_i).norm(dim=2).squeeze(1)
    assert (found.status == 0).double().mean() > 0.9
    assert (apart[found.status == 0] < 0.01 * z_i.norm(dim=(1, 2))[found.status == 0]).double().mean() > 0.99


def test_queries_leave_their_own_point_out_or_move_away_from_it(problems: Problems) -> None:
    """A quarter and more of the queries are training points outside their neighbourhoods: no distance is 0."""
    assert (problems.dd.diagonal(dim1=1, dim2=2) > 0).all()
    assert problems.weights.shape == (400, 6)


def test_same_seed_same_network(problems: Problems) -> None:
    nets = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        nets.append(CIPNet(**SMALL))
        fit_cip_net(nets[-1], problems, 2.0, epochs=2, seed=seed, device="cpu")
    first, second, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not any(p.requires_grad for p in nets[0].parameters())


def test_loss_is_the_squared_error_of_the_features() -> None:
    """In units of the spread of the neighbours' features, from inner products alone."""
    exact = solver()
    found = solved_problems(exact, 64, rows=torch.arange(150), seed=3)
    torch.manual_seed(0)
    net = CIPNet(**SMALL)
    (epoch,) = fit_cip_net(net, found, 2.0, epochs=1, batch_size=64, learning_rate=1e-12, device="cpu")
    # Any features with these inner products will do: the rows of a root of the Gram matrix.
    values, vectors = torch.linalg.eigh(found.zz.double())
    z_i = vectors * values.clamp(min=0).sqrt()[:, None]
    guess = net(found.zz, found.zd, found.dd, found.tilt, 2.0).softmax(1).double() - found.weights.double()
    error = (guess[:, None] @ z_i).square().sum((1, 2)) / z_i.square().sum(2).mean(1)
    assert epoch.loss == pytest.approx(float(error.mean()), rel=1e-3)


def test_resumed_run_equals_an_uninterrupted_one(
    problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> CIPNet:
        torch.manual_seed(0)
        return CIPNet(**SMALL)

    whole, parts = fresh(), fresh()
    fit_cip_net(whole, problems, 2.0, epochs=3, device="cpu")
    save, calls = TrainingState.save, itertools.count(1)

    def interrupting(self, *args):  # type: ignore[no-untyped-def]
        save(self, *args)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        fit_cip_net(parts, problems, 2.0, epochs=3, checkpoint=tmp_path, device="cpu")
    parts = fresh()
    history = fit_cip_net(parts, problems, 2.0, epochs=3, checkpoint=tmp_path, resume=True, device="cpu")
    assert [row.epoch for row in history] == [1, 2, 3]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ModelFolderError, match="smoothness"):
        fit_cip_net(fresh(), problems, None, epochs=3, checkpoint=tmp_path, resume=True, device="cpu")


def test_one_neighbor_is_exact_and_tiny_sets_are_no_trouble() -> None:
    for n, k in ((3, 1), (2, 6)):
        exact = solver(n=n, k=k)
        net, found, _ = imitate(exact, head(), n_problems=8, epochs=1, device="cpu")
        x = torch.randn(5, 4, dtype=torch.float64)
        assert net(x).value.isfinite().all()
        if k == 1:
            torch.testing.assert_close(net(x).value, exact(x).value)
            assert found["perturbed"].feature_error < 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branch": "upper"}, "branch 'lower' alone"),
        ({"regularity": None, "ratio": -1.0}, "l = 0 alone"),
        ({"regularity": Regularity(-1.0, 2.0)}, "l = 0 alone"),
    ],
)
def test_what_cannot_be_imitated_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imitate(solver(**settings), head(), n_problems=8, epochs=1)


def test_weights_lie_on_the_simplex() -> None:
    net, exact = CIPNet(**SMALL), solver()
    x = 10 * torch.randn(40, 4, dtype=torch.float64)
    found = guessed_weights(net, inner_products(x, *exact.neighbors(x)[:2]), 2.0)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(40, dtype=torch.float64))
