"""Over 100,000 pairs of points, far and near: no trained model exceeds its Lipschitz constant or its radii."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from otad import OTADClassifier
from otad.nn import EncodedStem

ANCHORS, NEAR = 64, 6  # every point with every other one: 448 * 447 / 2 = 100,128 pairs


@pytest.fixture(scope="module")
def points() -> Tensor:
    """Held-out digits, and each of them moved, at random or towards another digit, by 1e-4 to 1."""
    x = torch.tensor(load_digits(return_X_y=True)[0][1000 : 1000 + ANCHORS] / 16)
    draws = torch.Generator().manual_seed(0)
    ways = [torch.randn(x.shape, generator=draws, dtype=x.dtype) for _ in range(NEAR // 2)]
    ways += [x.roll(shift, 0) - x for shift in range(1, NEAR - NEAR // 2 + 1)]
    sizes = 10 ** (-4 * torch.rand(NEAR, ANCHORS, 1, generator=draws, dtype=x.dtype))
    return torch.cat(
        [x, *(x + size * way / way.norm(dim=1, keepdim=True) for size, way in zip(sizes, ways, strict=True))]
    )


def trained(**settings: object) -> OTADClassifier:
    X, y = load_digits(return_X_y=True)
    return OTADClassifier(epochs=6, random_state=0, **settings).fit(X[:600] / 16, y[:600])  # type: ignore[arg-type]


def apart(points: Tensor) -> Tensor:
    """Distances of all pairs, one by one: a product of matrices would round short ones away."""
    return torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize(
    "settings", [{}, {"target_radius": 0.4, "refinement": "potential"}], ids=["interpolated", "refined potential"]
)
def test_features_never_move_further_than_the_lipschitz_constant_allows(settings: dict, points: Tensor) -> None:
    clf = trained(**settings)
    with torch.no_grad():
        features = clf.module_.double().features(points).value
    between = apart(points)
    assert clf.lipschitz_ is not None
    assert (apart(features) <= clf.lipschitz_ * between * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("encoder", [None, "dense"])
def test_no_label_changes_within_a_radius_of_cells(encoder: str | None, points: Tensor) -> None:
    clf = trained(target_radius=0.4, encoder=encoder)
    stem = clf.module_.double().stem
    with torch.no_grad():
        if isinstance(stem, EncodedStem):
            assert (apart(stem(points)) <= stem.lipschitz * apart(points) * (1 + 1e-9) + 1e-9).all()
        certificate = clf.certify(points.numpy())
    within = apart(points).numpy() < certificate.radius[:, None]
    same = certificate.label[:, None] == certificate.label[None]
    assert within.sum() > len(points), "some pairs lie within a radius"
    assert np.logical_or(~within, same).all()
