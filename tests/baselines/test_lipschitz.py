import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from otad.attacks import ThreatModel, apgd
from otad.baselines import LipschitzNetwork, fit_lipschitz
from otad.baselines.lipschitz import TEMPERATURES
from otad.errors import MissingExtraError
from otad.nn import CenteredFlatten
from tests.baselines.problems import digits, two_clouds


def network(d: int, classes: int, seed: int = 0) -> LipschitzNetwork:
    """Random weights, not normalised, so that the constant must be computed."""
    torch.manual_seed(seed)
    return LipschitzNetwork(CenteredFlatten(torch.randn(d)), [nn.Linear(d, 8), nn.Linear(8, 6)], nn.Linear(6, classes))


@pytest.fixture(scope="module")
def trained() -> LipschitzNetwork:
    x, y, _, _ = digits(n_train=256)
    return fit_lipschitz(x, y, ThreatModel("l2", 0.5), minutes=60.0, epochs=4, temperature=0.25)


def test_a_linear_network_is_certified_up_to_its_plane() -> None:
    """Without hidden layers the radius is the exact distance to the nearest boundary, less the allowance."""
    torch.manual_seed(0)
    head = nn.Linear(5, 3)
    model = LipschitzNetwork(CenteredFlatten(torch.zeros(5)), [], head)
    x = torch.randn(40, 5)
    certificate = model.certify(x)
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    logits = x.double() @ weight.T + bias
    best = logits.argmax(dim=1)
    apart = (weight[best][:, None] - weight).norm(dim=2)
    margin = logits.gather(1, best[:, None]) - logits
    exact = (margin / apart).nan_to_num(math.inf).amin(dim=1).numpy()
    assert certificate.label.tolist() == best.tolist()
    assert (certificate.radius <= exact).all()
    assert certificate.radius == pytest.approx(exact, abs=1e-3)


def test_two_prototypes_reach_their_plane_and_no_further() -> None:
    """Samples on the line through two prototypes, one orthogonal layer: no radius exceeds the way to the plane between
    the prototypes, at which the exact attack along the line changes the label."""
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])
    turn, head = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        turn.weight.copy_(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
        turn.bias.copy_(torch.tensor([100.0, 0.0]))  # MaxMin then keeps the order of the pair
        head.weight.copy_(torch.stack([a, b]) @ turn.weight.T)
        head.bias.copy_(-head.weight @ turn.bias)
    model = LipschitzNetwork(CenteredFlatten(torch.zeros(2)), [turn], head)
    x = torch.tensor([[1.5, 0.3], [0.2, -1.0], [-0.7, 0.0]])
    exact = x[:, 0].abs()
    certificate = model.certify(x)
    assert certificate.label.tolist() == [0, 0, 1]
    assert (certificate.radius < exact.numpy()).all()
    assert certificate.radius == pytest.approx(exact.numpy(), abs=0.03)  # features of size 100: larger allowance
    beyond = x - 1.01 * x * torch.tensor([1.0, 0.0])
    assert (model(beyond).argmax(dim=1) != model(x).argmax(dim=1)).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-4, 10.0))
def test_trained_features_and_logits_are_1_lipschitz(trained: LipschitzNetwork, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = x + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    exact = trained.double()
    moved, apart = (exact(x) - exact(y)).norm(dim=1), (x - y).flatten(1).norm(dim=1)
    trained.float()
    assert bool((moved <= apart * (1 + 1e-6)).all())


def test_effective_weights_are_orthogonal(trained: LipschitzNetwork) -> None:
    for layer in [*trained.layers, trained.head]:
        assert type(layer) is nn.Linear
        values = np.linalg.svd(layer.weight.double().numpy(), compute_uv=False)
        assert values == pytest.approx(np.ones_like(values), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_succeeds_within_the_radius(seed: int) -> None:
    model, x = network(6, 3, seed), torch.randn(60, 6)
    certificate = model.certify(x)
    y = torch.as_tensor(certificate.label)
    radius = torch.as_tensor(certificate.radius)
    for eps in radius[radius > 1e-3].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist():
        rows = radius >= eps
        found = apgd(model, x[rows], y[rows], ThreatModel("l2", eps), steps=40, restarts=2)
        assert model(found).argmax(dim=1).equal(y[rows])


@pytest.mark.slow
def test_margins_are_certified_on_two_clouds() -> None:
    x, y = two_clouds()
    threat = ThreatModel("l2", 0.5)
    certificate = fit_lipschitz(x, y, threat, minutes=60.0, epochs=15, temperature=0.25).certify(x)
    assert certificate.certified(0.5, y.numpy()) > 0.9
    # No sample keeps its label as far as the nearest sample that has another one.
    label = torch.as_tensor(certificate.label)
    nearest = torch.cdist(x.double(), x.double()).where(label[:, None] != label, torch.inf).amin(dim=1)
    assert (certificate.radius <= nearest.numpy()).all()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deel.torchlip", None)
    x, y = two_clouds(n=8)
    with pytest.raises(MissingExtraError, match=r"otad\[rivals\]"):
        fit_lipschitz(x, y, ThreatModel("l2", 1.0), minutes=1.0)


@pytest.mark.slow
def test_the_temperature_with_the_largest_radius_on_held_out_samples_is_kept() -> None:
    pytest.importorskip("deel.torchlip")
    x, y = two_clouds()
    fitted = fit_lipschitz(x, y, ThreatModel("l2", 0.5), minutes=60.0, epochs=6).fitted
    radii = {float(name.rpartition(" ")[2]): r for name, r in fitted.items() if name.startswith("mean radius")}
    assert len(radii) == len(TEMPERATURES)
    assert all(0 <= r <= 1 for r in radii.values())
    assert radii[fitted["temperature"]] == max(radii.values())
