"""Certificates against closed forms and against attackers that know the geometry."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from otad.certificate import Certificate, certify
from otad.cip import BrenierPotential, Regularity
from otad.defense import OTAD, GlobalInterpolation, NeighborhoodInterpolation, NetworkInterpolation
from otad.nn import CenteredFlatten
from otad.nn.cip_net import CIPNet, Imitation


def blobs(n: int = 90, d: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Three classes around a triangle; features are 1.2 x."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centers = torch.tensor([[0.0, 2.0], [-1.8, -1.0], [1.8, -1.0]])
    x = centers[y] + 0.35 * torch.randn(n, d, generator=generator)
    return x, 1.2 * x, y


def head_of(z: Tensor, y: Tensor) -> nn.Linear:
    """Nearest class mean, as a linear head."""
    means = torch.stack([z[y == c].mean(0) for c in range(3)])
    head = nn.Linear(2, 3)
    head.weight.data, head.bias.data = means, -means.square().sum(1) / 2
    return head


def model_of(interpolation: nn.Module) -> OTAD:
    _, z, y = blobs()
    return OTAD(CenteredFlatten(torch.zeros(2)), interpolation, head_of(z, y))


def queries(n: int = 60) -> Tensor:
    return 2.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(1))


def smallest_flip(model: OTAD, x: Tensor, label: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Distance of the nearest other label on 48 rays, up to `reach`, in the plane: a strong attacker for d = 2."""
    angles = torch.linspace(0, 2 * torch.pi, 49)[:-1]
    rays = torch.stack([angles.cos(), angles.sin()], 1)
    found = np.full(len(x), np.inf)
    finite = np.isfinite(reach)
    for share in torch.linspace(1.0, 0.1, 8):
        tries = x[finite, None] + float(share) * torch.from_numpy(reach[finite])[:, None, None] * rays
        labels = model(tries.flatten(0, 1).float()).argmax(1).reshape(-1, len(rays)).numpy()
        flipped = (labels != label[finite][:, None]).any(1)
        found[np.flatnonzero(finite)[flipped]] = float(share) * reach[finite][flipped]
    return found


def test_global_radius_of_a_scaling_is_the_distance_to_the_boundary() -> None:
    """Pairs with quotient L leave no freedom between them: there z = 1.2 x, and the bound is tight."""
    x, z, _ = blobs()
    model = model_of(GlobalInterpolation(BrenierPotential.fit(x, z, rtol=1e-6)))
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(2))]
    inputs = (x + shuffled) / 2
    certificate = certify(model, inputs, rounding=0.0)
    logits = model.head(1.2 * inputs)
    label = logits.argmax(1)
    apart = (model.head.weight[label][:, None] - model.head.weight).norm(dim=2)
    distance = (logits.gather(1, label[:, None]) - logits) / apart / 1.2
    expected = distance.scatter(1, label[:, None], torch.inf).amin(1)
    np.testing.assert_array_equal(certificate.label, label.numpy())
    np.testing.assert_allclose(certificate.radius, expected.numpy(), atol=5e-3)
    assert set(certificate.kind) == {"global"}


@pytest.mark.parametrize("kind", ["global", "neighborhood", "fixed"])
def test_no_point_within_the_radius_has_another_label(kind: str) -> None:
    x, z, _ = blobs()
    z = z + 0.4 * torch.sin(2 * x)
    interpolation: nn.Module = {
        "global": lambda: GlobalInterpolation(BrenierPotential.fit(x, z)),
        "neighborhood": lambda: NeighborhoodInterpolation(x, z, k=6, ratio=-1.0, branch="mean"),
        "fixed": lambda: NeighborhoodInterpolation(x, z, k=6, regularity=Regularity(0.0, 2.2)),
    }[kind]()
    model, inputs = model_of(interpolation), queries(40)
    certificate = certify(model, inputs)
    assert (certificate.radius > 0).mean() > 0.5
    flip = smallest_flip(model, inputs, certificate.label, 0.9999 * certificate.radius)
    assert np.isinf(flip).all()
    kinds = {"global": {"global"}, "neighborhood": {"neighborhood"}, "fixed": {"neighborhood", "unanimous"}}[kind]
    assert set(certificate.kind) == kinds


def test_unanimous_radius_of_two_points_is_the_distance_to_the_bisector() -> None:
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    interpolation = NeighborhoodInterpolation(x, x, k=1, regularity=Regularity(0.0, 2.0))
    head = nn.Linear(2, 2)
    head.weight.data, head.bias.data = x.clone(), torch.zeros(2)
    inputs = torch.tensor([[-0.7, 0.3], [0.2, 5.0]])
    certificate = certify(OTAD(CenteredFlatten(torch.zeros(2)), interpolation, head), inputs)
    np.testing.assert_allclose(certificate.radius, [0.7, 0.2], atol=1e-4)
    assert certificate.label.tolist() == [0, 1]


def test_stem_scale_enters_the_radius() -> None:
    class Doubled(CenteredFlatten):
        lipschitz = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, z, y = blobs()
    interpolation = GlobalInterpolation(BrenierPotential.fit(2 * x, 2 * z))
    doubled = OTAD(Doubled(torch.zeros(2)), interpolation, head_of(2 * z, y))
    plain = model_of(GlobalInterpolation(BrenierPotential.fit(x, z)))
    a, b = (certify(model, queries(), rounding=0.0) for model in (doubled, plain))
    np.testing.assert_allclose(a.radius, b.radius, rtol=1e-3, atol=1e-5)


def test_conditional_certificates_never_count() -> None:
    x, z, y = blobs()
    model = model_of(NeighborhoodInterpolation(x, z, k=6))
    certificate = certify(model, x, conditional=True)
    sound = certify(model, x)
    assert (certificate.radius >= sound.radius - 1e-9).mean() > 0.5
    assert certificate.certified(0.0, y.numpy()) == 0
    assert set(certificate.kind) == {"conditional"}
    assert sound.certified(0.1, y.numpy()) > 0


def test_rounding_allowance_lowers_every_radius() -> None:
    x, z, _ = blobs()
    model = model_of(GlobalInterpolation(BrenierPotential.fit(x, z)))
    exact, allowed = (certify(model, queries(), rounding=r).radius for r in (0.0, 1e-2))
    assert (allowed <= exact).all()
    assert (allowed < exact).any()


def test_share_certified() -> None:
    kind = np.array(["global", "global", "conditional", "global"])
    certificate = Certificate(np.array([0, 1, 1, 1]), np.array([0.5, 0.2, 9.0, 0.7]), kind)
    assert certificate.certified(0.4, np.array([0, 1, 1, 0])) == 0.25
    # At its own norm a perturbation is no longer covered.
    assert certificate.certified(0.5, np.array([0, 1, 1, 0])) == 0.0


def test_a_network_has_no_certificate() -> None:
    """Even where all neighbours agree, far from any boundary, at training points, whatever is asked for."""
    x, z, _ = blobs()
    solver = NeighborhoodInterpolation(x, z, k=5, regularity=Regularity(0.0, 2.0))
    model = model_of(NetworkInterpolation(solver, CIPNet(), Imitation(0.0, 0.0, 1.0, 1.0, 1.0, 1)))
    for conditional in (False, True):
        certificate = certify(model, torch.cat([x, queries()]), conditional=conditional, rounding=0.0)
        assert set(certificate.kind) == {"none"}
        assert (certificate.radius == 0).all()
    assert certificate.certified(0.0, certificate.label) == 0
    np.testing.assert_array_equal(certificate.label[: len(x)], model(x).argmax(1).numpy())
    assert (certify(model.solved(), x, rounding=0.0).radius > 0).mean() > 0.5
