"""The shipped float32 module against its certificate where rounding is worst: near duplicates, far queries."""

import numpy as np
import pytest
import torch

from otad import OTADClassifier
from otad.certificate import ROUNDING, certify
from otad.cip import BrenierPotential, Regularity
from otad.cip.interpolation import Branch
from otad.defense import OTAD, GlobalInterpolation, NeighborhoodInterpolation
from otad.neighbors import nearest_neighbors
from otad.nn import CenteredFlatten, OrthogonalEmbedding
from otad.retrieval import Retrieval


def near_duplicates(jitter: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    base, labels = rng.normal(size=(60, 20)), rng.integers(0, 3, 60)
    X = (base[:, None] + jitter * rng.normal(size=(60, 8, 20))).reshape(-1, 20).astype(np.float32)
    return X, np.repeat(labels, 8)


@pytest.mark.parametrize("interpolation", ["global", "neighborhood"])
@pytest.mark.parametrize("jitter", [1e-2, 1e-4])
def test_no_label_flips_within_the_radius_near_duplicates(interpolation: str, jitter: float) -> None:
    X, y = near_duplicates(jitter)
    settings = {"n_blocks": 2, "width": 32, "epochs": 40, "device": "cpu", "random_state": 0}
    clf = OTADClassifier(interpolation=interpolation, **settings).fit(X, y)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    Q = (X[rng.integers(len(X), size=600)] + 2 * jitter * rng.normal(size=(600, 20))).astype(np.float32)
    certificate = clf.certify(Q)
    proven = certificate.radius > 0
    assert (clf.predict(Q) == certificate.label)[proven].all()
    step = rng.normal(size=Q.shape)
    step *= 0.999 * np.minimum(certificate.radius, 10)[:, None] / np.linalg.norm(step, axis=1, keepdims=True)
    assert (clf.predict((Q + step).astype(np.float32)) == certificate.label)[proven].all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("L", [2.0, 20.0])
def test_float32_error_is_within_the_allowance(scale: float, L: float) -> None:
    X, _ = near_duplicates(1e-3)
    x = torch.from_numpy(X)
    potential = BrenierPotential.fit(x, 1.2 * x, regularity=Regularity(-L, L))
    model = OTAD(CenteredFlatten(torch.zeros(20)), GlobalInterpolation(potential), torch.nn.Linear(20, 2))
    inputs = scale * torch.randn(300, 20, generator=torch.Generator().manual_seed(2))
    exact = model.exact().features(inputs.double())
    error = (model.features(inputs).value.double() - exact.value).norm(dim=1)
    assert (error <= ROUNDING * (1 + exact.value.norm(dim=1)) / 10).all()


def plain(head: torch.nn.Linear) -> OTAD:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    return OTAD(CenteredFlatten(torch.zeros(3)), GlobalInterpolation(BrenierPotential.fit(x, 1.1 * x)), head)


def test_a_head_that_is_not_finite_proves_nothing() -> None:
    head = torch.nn.Linear(3, 3)
    head.weight.data[2] = torch.nan
    assert (certify(plain(head), torch.randn(20, 3)).radius == 0).all()


def test_rows_that_float32_cannot_tell_apart_prove_nothing() -> None:
    head = torch.nn.Linear(3, 2)
    head.weight.data[:] = torch.tensor([100.0, 0.0, 0.0])
    head.bias.data[:] = torch.tensor([0.0, 1e-6])
    assert (certify(plain(head), torch.randn(20, 3)).radius == 0).all()


def test_a_bias_alone_is_drowned_far_away() -> None:
    """Two classes with one row: no feature changes the label, but float32 logits of long features do."""
    head = torch.nn.Linear(3, 2)
    head.weight.data[:] = torch.tensor([1.0, 0.7, 0.3])
    head.bias.data[:] = torch.tensor([0.0, 1e-3])
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    interpolation = GlobalInterpolation(BrenierPotential.fit(x, 1.1 * x), "lower")
    model = OTAD(CenteredFlatten(torch.zeros(3)), interpolation, head)
    certificate = certify(model, torch.zeros(1, 3))
    assert 0 < certificate.radius[0] < np.inf
    steps = torch.randn(2000, 3, generator=torch.Generator().manual_seed(1))
    steps /= steps.norm(dim=1, keepdim=True)
    assert (model(1e6 * steps).argmax(1) != int(certificate.label[0])).any()
    assert (model(0.99 * float(certificate.radius[0]) * steps).argmax(1) == int(certificate.label[0])).all()


def far_boundary(model: OTAD, reach: float) -> torch.Tensor:
    """Inputs of that length on and beside a boundary between two labels, by bisection."""
    generator = torch.Generator().manual_seed(0)
    a, b = reach * torch.randn(2, 40, 20, generator=generator, dtype=torch.float64) / 20**0.5
    exact = model.exact()
    label = exact(a).argmax(1)
    apart = label != exact(b).argmax(1)
    a, b, label = a[apart], b[apart], label[apart]
    for _ in range(36):
        same = (exact((a + b) / 2).argmax(1) == label)[:, None]
        a, b = torch.where(same, (a + b) / 2, a), torch.where(same, b, (a + b) / 2)
    noise = torch.randn(7, *a.shape, generator=generator, dtype=torch.float64)
    return torch.cat([a, *(a + 1e-8 * reach * noise)]).float()


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "branch"), [(-1.0, "mean"), (0.0, "lower")])
def test_float32_gives_the_certified_label_far_from_the_data(ratio: float, branch: Branch) -> None:
    """There the features of these branches stay bounded, and say nothing of how the stem rounds."""
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.randn(30, 20, generator=generator), torch.rand(20, generator=generator)
    potential = BrenierPotential.fit(x, 1.2 * x + 0.1 * torch.sin(2 * x), ratio)
    torch.manual_seed(1)
    model = OTAD(CenteredFlatten(mean), GlobalInterpolation(potential, branch), torch.nn.Linear(20, 3))
    inputs = far_boundary(model, 1e7)
    certificate = certify(model, inputs)
    assert (model(inputs).argmax(1).numpy() == certificate.label)[certificate.radius > 0].all()


def test_an_offset_that_costs_the_inputs_their_digits_costs_radius() -> None:
    """What `predict` is given in float64 is rounded to float32 before the model sees it."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(100, 2)))
    offset = torch.full((2,), 1e6, dtype=torch.float64)
    head = torch.nn.Linear(2, 2)
    head.weight.data[:] = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    head.bias.data.zero_()
    model = OTAD(CenteredFlatten(offset.float()), GlobalInterpolation(BrenierPotential.fit(x, x.clone())), head)
    inputs = offset + torch.from_numpy(rng.normal(size=(400, 2)))
    certificate = certify(model, inputs.float())
    step = torch.from_numpy(rng.normal(size=(400, 2)))
    step *= 0.999 * torch.from_numpy(certificate.radius)[:, None] / step.norm(dim=1, keepdim=True)
    proven = certificate.radius > 0
    assert proven.mean() > 0.5
    assert (model((inputs + step).float()).argmax(1).numpy() == certificate.label)[proven].all()


def test_features_within_rounding_of_a_boundary_vouch_for_no_class() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(4))
    z = torch.zeros(30, 2)
    z[:, 0] = 1e-9
    head = torch.nn.Linear(2, 2)
    head.weight.data[:] = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    head.bias.data.zero_()
    interpolation = NeighborhoodInterpolation(x, z, k=5, regularity=Regularity(0.0, 2.0))
    certificate = certify(OTAD(CenteredFlatten(torch.zeros(2)), interpolation, head), x)
    assert (certificate.radius == 0).all()


def test_negative_allowance_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        certify(plain(torch.nn.Linear(3, 2)), torch.zeros(1, 3), rounding=-1.0)


def test_constant_data_and_features_are_survived() -> None:
    clf = OTADClassifier(n_blocks=1, epochs=1, device="cpu").fit(np.ones((10, 3)), [0, 1] * 5)
    assert np.isfinite(clf.decision_function(np.ones((2, 3)))).all()
    x = torch.randn(20, 3)
    assert BrenierPotential.fit(x, torch.ones(20, 3)).gradient(x).value.isfinite().all()


def test_neighbors_of_two_far_groups_are_exact_in_float64() -> None:
    rng = np.random.default_rng(5)
    points = torch.from_numpy(np.concatenate([s * 1000 + 0.003 * rng.normal(size=(100, 4)) for s in (-1, 1)]))
    distances, _ = nearest_neighbors(points, points, 7)
    expected = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values[:, :7]
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=1e-12)


def near_points() -> torch.Tensor:
    """Twenty groups of ten, a hundred thousandth apart."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(20, 1, 10, generator=generator, dtype=torch.float64)
    return (groups + 1e-5 * torch.randn(20, 10, 10, generator=generator, dtype=torch.float64)).flatten(0, 1)


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_the_class_of_a_neighborhood_does_not_depend_on_the_query(ratio: float) -> None:
    """Seen from far away the neighbours are one point; their bounds are those that they have beside them."""
    x = near_points()
    interpolation = NeighborhoodInterpolation(x, 1.1 * x + 0.1 * torch.sin(3 * x), ratio=ratio)
    for reach in (10.0, 1e3, 1e8):
        queries = reach * torch.randn(30, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x_i, z_i, _ = interpolation.neighbors(queries)
        far, beside = interpolation(queries).stats, interpolation.solve(x_i[:, 0], x_i, z_i).stats
        torch.testing.assert_close(far["L"], beside["L"], rtol=1e-6, atol=0)
        assert not far["relaxed"].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("retrieval", ["euclidean", "robust"])
@pytest.mark.parametrize("regularity", [None, Regularity(0.0, 2.0)])
def test_one_unusable_input_does_not_cost_the_others_their_answers(
    bad: float, retrieval: str, regularity: Regularity | None
) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    chosen = None if retrieval == "euclidean" else Retrieval.of(OrthogonalEmbedding(x.mean(0), width=16), x)
    interpolation = NeighborhoodInterpolation(x, 1.2 * x, k=5, retrieval=chosen, regularity=regularity)
    model = OTAD(CenteredFlatten(torch.zeros(6)), interpolation, torch.nn.Linear(6, 3))
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    logits, expected = model(inputs), certify(model, inputs)
    assert (expected.radius > 0).any()
    inputs[2, 1] = bad
    others = [0, 1, 3, 4]
    torch.testing.assert_close(model(inputs)[others], logits[others])
    certificate = certify(model, inputs)
    np.testing.assert_allclose(certificate.radius[others], expected.radius[others], rtol=1e-6)
    assert certificate.radius[2] == 0
