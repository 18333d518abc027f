"""Certificates against closed forms and against attackers that know the geometry."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from otad.certificate import Certificate, boundary_distance, certify
from otad.cip import BrenierPotential, PowerDiagram, Regularity
from otad.defense import (
    OTAD,
    CellInterpolation,
    GlobalInterpolation,
    NeighborhoodInterpolation,
    NetworkInterpolation,
    identity_head,
)
from otad.nn import CenteredFlatten, OrthogonalEmbedding, residual_embedding
from otad.nn.cip_net import CIPNet, Imitation
from otad.retrieval import Retrieval


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


@pytest.mark.parametrize("kind", ["euclidean", "stretched"])
def test_a_network_has_no_certificate(kind: str) -> None:
    """Even where all neighbours agree, far from any boundary, at training points, whatever is asked for."""
    x, z, _ = blobs()
    retrieval = None if kind == "euclidean" else embedded(kind, x)
    solver = NeighborhoodInterpolation(x, z, k=5, retrieval=retrieval, regularity=Regularity(0.0, 2.0))
    model = model_of(NetworkInterpolation(solver, CIPNet(), Imitation(0.0, 0.0, 1.0, 1.0, 1.0, 1)))
    for conditional in (False, True):
        certificate = certify(model, torch.cat([x, queries()]), conditional=conditional, rounding=0.0)
        assert set(certificate.kind) == {"none"}
        assert (certificate.radius == 0).all()
    assert certificate.certified(0.0, certificate.label) == 0
    np.testing.assert_array_equal(certificate.label[: len(x)], model(x).argmax(1).numpy())
    assert (certify(model.solved(), x, rounding=0.0).radius > 0).mean() > 0.5


def test_coordinates_that_the_head_does_not_read_cost_nothing() -> None:
    """A head on one of many tokens: the allowance for its rounding is that of the token alone."""
    torch.manual_seed(0)
    small, large = nn.Linear(8, 3).double(), nn.Linear(8000, 3).double()
    z, error = torch.randn(20, 8, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    with torch.no_grad():
        large.weight[:] = nn.functional.pad(small.weight, [0, 7992])
        large.bias[:] = small.bias
        expected = boundary_distance(small, z, error, 1e-4)
        found = boundary_distance(large, nn.functional.pad(z, [0, 7992]), error, 1e-4)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert (found[1] > 0).any()


class Stretched(nn.Module):
    """Coordinates three times and half as long: what leaves the constant out is wrong by a factor of three."""

    lipschitz = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([3.0, 0.5], dtype=x.dtype)


def embedded(kind: str, x: Tensor) -> Retrieval:
    torch.manual_seed(0)
    embedding = Stretched() if kind == "stretched" else OrthogonalEmbedding(x.mean(0), width=16)
    return Retrieval.of(embedding, x)


@pytest.mark.parametrize(("kind", "branch"), [("stretched", "lower"), ("stretched", "mean"), ("orthogonal", "lower")])
def test_no_point_within_the_radius_of_an_embedded_retrieval_has_another_label(kind: str, branch) -> None:
    x, z, _ = blobs()
    z = z + 0.4 * torch.sin(2 * x)
    bounds = Regularity(0.0, 2.2) if branch == "lower" else None
    ratio = 0.0 if branch == "lower" else -1.0
    interpolation = NeighborhoodInterpolation(
        x, z, k=6, retrieval=embedded(kind, x), regularity=bounds, ratio=ratio, branch=branch
    )
    model, inputs = model_of(interpolation), queries(40)
    certificate = certify(model, inputs)
    assert (certificate.radius > 0.01).mean() > 0.4
    flip = smallest_flip(model, inputs, certificate.label, 0.9999 * certificate.radius)
    assert np.isinf(flip).all()
    assert set(certificate.kind) == ({"neighborhood", "unanimous"} if branch == "lower" else {"neighborhood"})


@pytest.mark.parametrize("kind", ["stretched", "orthogonal"])
def test_the_neighbors_of_an_embedded_retrieval_stay_within_their_room(kind: str) -> None:
    """On 64 rays around each query; and the stretched ones do change soon after it somewhere."""
    x, z, _ = blobs()
    retrieval = embedded(kind, x)
    model = model_of(NeighborhoodInterpolation(x, z, k=6, retrieval=retrieval, regularity=Regularity(0.0, 2.0)))
    inputs = queries(40).double()
    here = model.exact().features(inputs).stats
    room = (here["next_distance"] - here["distances"][:, -1]) / 2 / retrieval.lipschitz
    angles = torch.linspace(0, 2 * torch.pi, 65, dtype=torch.float64)[:-1]
    rays = torch.stack([angles.cos(), angles.sin()], 1)

    def changed(share: float) -> Tensor:
        moved = inputs[:, None] + share * room[:, None, None] * rays
        found = model.exact().features(moved.flatten(0, 1)).stats["indices"].reshape(len(inputs), len(rays), -1)
        return (found.sort(dim=2).values != here["indices"].sort(dim=1).values[:, None]).any(dim=2).any(dim=1)

    assert not bool(changed(0.999).any())
    assert kind != "stretched" or bool(changed(3.0).any())


def test_an_isotropic_embedding_certifies_what_euclidean_retrieval_does() -> None:
    """Twice as long in all directions: every distance doubles, and so does the constant."""

    class Doubled(Stretched):
        lipschitz = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x, z, _ = blobs()
    settings = {"k": 6, "regularity": Regularity(0.0, 2.0)}
    plain = certify(model_of(NeighborhoodInterpolation(x, z, **settings)), queries())
    doubled = NeighborhoodInterpolation(x, z, retrieval=Retrieval.of(Doubled(), x), **settings)
    found = certify(model_of(doubled), queries())
    np.testing.assert_allclose(found.radius, plain.radius, atol=1e-5)
    np.testing.assert_array_equal(found.kind, plain.kind)


def test_an_unknown_constant_certifies_nothing_but_a_retrieval_that_cannot_matter() -> None:
    x, z, y = blobs()
    torch.manual_seed(0)
    retrieval = Retrieval.of(residual_embedding(x.mean(0), width=16), x)
    settings = {"retrieval": retrieval, "regularity": Regularity(0.0, 2.0)}
    assert (certify(model_of(NeighborhoodInterpolation(x, z, k=6, **settings)), x).radius == 0).all()
    # All points are neighbours of all: no set to change.
    everyone = certify(model_of(NeighborhoodInterpolation(x, z, k=len(x), **settings)), x)
    assert everyone.certified(0.01, y.numpy()) > 0.5


def test_cells_are_certified_as_they_are_or_not_at_all() -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 3, generator=draws), torch.arange(40) % 3
    diagram = PowerDiagram(x, -x.double().square().sum(1) / 2, y)
    model = OTAD(CenteredFlatten(torch.zeros(3)), CellInterpolation(diagram), identity_head(3))
    assert (certify(model, x).radius > 0).all()
    with pytest.raises(ValueError, match="softened"):
        certify(model.smoothed(0.1), x)
    with pytest.raises(ValueError, match="identity"):
        certify(OTAD(model.stem, model.interpolation, nn.Linear(3, 3)), x)
    for scale in (1e39, 1e-46):  # logits that float32 does not hold
        extreme = PowerDiagram(x.double() * scale, -x.double().square().sum(1) / 2 * scale, y)
        shipped = OTAD(model.stem, CellInterpolation(extreme), identity_head(3))
        assert (certify(shipped, x).radius == 0).all()
