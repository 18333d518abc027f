import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from otad.attacks import ThreatModel, lines
from otad.baselines.nearest import NearestNeighbor, fit_nearest


def data(n: int = 40, d: int = 3, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.arange(n) % classes


def test_logits_are_negative_distances() -> None:
    x_train, y_train = data()
    x = torch.randn(7, 3)
    distance = torch.cdist(x.double(), x_train.double())
    expected = torch.stack([-distance[:, y_train == j].amin(dim=1) for j in range(3)], dim=1)
    assert torch.allclose(NearestNeighbor(x_train, y_train)(x).double(), expected, atol=1e-6)


def test_gradients_are_exact_and_finite_at_training_samples() -> None:
    x_train, y_train = data()
    model = NearestNeighbor(x_train.double(), y_train)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    at = x_train[:2].clone().requires_grad_()
    NearestNeighbor(x_train, y_train)(at).sum().backward()
    assert at.grad is not None
    assert bool(torch.isfinite(at.grad).all())


def test_two_points_have_a_closed_form() -> None:
    a, b = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    model = NearestNeighbor(torch.cat([a, b]), torch.tensor([0, 1]))
    certificate = model.certify(torch.tensor([[0.25, 5.0], [1.0, 0.0], [1.75, -3.0]]))
    label, radius = certificate.label, certificate.radius
    assert certificate.kind.tolist() == ["nearest"] * 3
    assert label.tolist() == [0, 0, 1]
    assert radius == pytest.approx([0.75, 0.0, 0.75], abs=1e-4)
    assert (radius <= [0.75, 0.0, 0.75]).all()
    assert radius.dtype == np.float64


def test_certificate_equals_brute_force() -> None:
    x_train, y_train = data(n=200)
    x = torch.randn(30, 3)
    certificate = NearestNeighbor(x_train, y_train).certify(x)
    label, radius = certificate.label, certificate.radius
    points = x_train.double()
    d = torch.cdist(x.double(), points)
    for row in range(len(x)):
        own = y_train == int(label[row])
        apart = (points[own][:, None] - points[~own][None]).norm(dim=2)
        planes = (d[row, ~own][None] ** 2 - d[row, own][:, None] ** 2) / (2 * apart)
        expected = float(planes.amax(dim=0).amin())
        assert radius[row] <= max(expected, 0.0)
        assert radius[row] == pytest.approx(max(expected, 0.0), abs=1e-4)


def test_no_point_inside_the_radius_has_another_label() -> None:
    """The nearest point of each wrong sample's Voronoi cell, found by quadratic programming, lies outside."""
    x_train, y_train = data(n=24, d=2)
    x = torch.randn(8, 2)
    certificate = NearestNeighbor(x_train, y_train).certify(x)
    label, radius = certificate.label, certificate.radius
    points = x_train.double().numpy()
    for row in range(len(x)):
        at = x[row].double().numpy()
        own = points[y_train.numpy() == label[row]]
        exact = np.inf
        for other in points[y_train.numpy() != label[row]]:
            normals, offsets = 2 * (other - own), (other**2).sum() - (own**2).sum(axis=1)
            closer = {"type": "ineq", "fun": lambda p, n=normals, o=offsets: n @ p - o}
            found = minimize(lambda p, at=at: ((p - at) ** 2).sum(), other, constraints=[closer], method="SLSQP")
            exact = min(exact, float(np.sqrt(found.fun)))
        assert radius[row] <= exact + 1e-6
        assert radius[row] > 0.2 * exact


def test_lines_never_succeed_below_the_radius() -> None:
    x_train, y_train = data(n=300, d=5)
    model = NearestNeighbor(x_train, y_train)
    x = torch.randn(40, 5)
    certificate = model.certify(x)
    label, radius = certificate.label, certificate.radius
    y = torch.as_tensor(label)
    for row in range(len(x)):
        if radius[row] > 1e-3:
            threat = ThreatModel("l2", float(radius[row]) * 0.999)
            x_adv = lines(model, x[row : row + 1], y[row : row + 1], threat, x_train=x_train, y_train=y_train)
            assert model(x_adv).argmax(dim=1).item() == label[row]


def test_images_duplicates_and_one_class() -> None:
    images = torch.rand(6, 1, 3, 3)
    model = NearestNeighbor(torch.cat([images, images]), torch.tensor([0] * 6 + [1] * 6))
    certificate = model.certify(images)
    label, radius = certificate.label, certificate.radius
    assert model(images).shape == (6, 2)
    assert label.tolist() == [0] * 6
    assert (radius == 0).all()
    assert NearestNeighbor(images, torch.zeros(6, dtype=torch.long)).certify(images).radius.tolist() == [np.inf] * 6


def test_bad_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"classes \[1\] have no"):
        NearestNeighbor(torch.zeros(2, 2), torch.tensor([0, 2]))


def test_float32_labels_hold_up_to_the_radius_between_near_duplicates() -> None:
    """Samples of two classes a hair apart and queries far away: there the logits of both round to nearly the same."""
    generator = torch.Generator().manual_seed(0)
    x_train = torch.randn(20, 6, generator=generator)
    twins = x_train + 1e-3 * torch.randn(20, 6, generator=generator)
    model = NearestNeighbor(torch.cat([x_train, twins]), torch.tensor([0] * 20 + [1] * 20))
    x = 3 * torch.randn(200, 6, generator=generator)
    certificate = model.certify(x)
    points = model.points.double()
    for row in (certificate.radius > 0).nonzero()[0]:
        at, own = x[row].double(), model.labels == int(certificate.label[row])
        d = (points - at).norm(dim=1)
        nearest = points[own][d[own].argmin()]
        normals = torch.nn.functional.normalize(points[~own] - nearest, dim=1)
        moved = (at + 0.999 * float(certificate.radius[row]) * normals).float()
        assert (model(moved).argmax(dim=1) == int(certificate.label[row])).all()


def test_fit_reports_and_ignores_the_threat() -> None:
    x_train, y_train = data()
    model = fit_nearest(x_train, y_train, ThreatModel("linf", 0.1), minutes=1.0)
    assert model.fitted["train_accuracy"] == 1.0
    assert model.fitted["epochs"] == 0
    assert not model.training


def test_within_a_box_more_is_certified_and_lines_to_other_samples_break_nothing() -> None:
    draws = torch.Generator().manual_seed(0)
    points, y = torch.rand(60, 9, generator=draws).round(decimals=1), torch.arange(60) % 3
    x = torch.rand(30, 9, generator=draws)
    model = NearestNeighbor(points, y)
    anywhere, inside = model.certify(x), model.certify(x, box=(0.0, 1.0))
    assert (inside.radius >= anywhere.radius).all()
    assert (inside.radius > 1.02 * anywhere.radius).any()
    for point in points:  # every way from a sample to a training sample stays in the box
        step = point - x
        share = torch.from_numpy(0.9999 * inside.radius).float() / step.norm(dim=1)
        moved = x + share.clamp(max=1)[:, None] * step
        assert (model(moved).argmax(1).numpy() == inside.label)[inside.radius > 1e-4].all()
    outside = x.clone()
    outside[:, 0] = 1.5
    np.testing.assert_array_equal(model.certify(outside, box=(0.0, 1.0)).radius, model.certify(outside).radius)


def test_what_is_no_number_is_not_certified() -> None:
    model = NearestNeighbor(torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0]))
    x = torch.tensor([[float("nan"), 0.5], [float("inf"), 0.5]])
    for box in (None, (0.0, 1.0)):
        assert (model.certify(x, box=box).radius == 0).all()
        assert model.certify(x[:0], box=box).radius.shape == (0,)
