"""Every backbone through the estimator: saved and loaded, exact derivatives, independent of the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from otad import OTADClassifier
from otad.transport import health

OPTIONS = {"mlp": {}, "resnet": {"stages": 2}, "transformer": {"patch": 4, "heads": 2, "hidden": 16}}


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    X, y = map(np.asarray, load_digits(n_class=3, return_X_y=True))
    return (X / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


@pytest.fixture(
    scope="module",
    params=[(b, i) for b in ("mlp", "resnet", "transformer") for i in ("global", "neighborhood")],
    ids=lambda case: " ".join(case),
)
def fitted(request: pytest.FixtureRequest, images: tuple[np.ndarray, np.ndarray]) -> OTADClassifier:
    backbone, interpolation = request.param
    seeded = {"device": "cpu", "random_state": 0}
    settings = {"backbone": backbone, "backbone_options": OPTIONS[backbone], "n_blocks": 2, "width": 16}
    clf = OTADClassifier(interpolation, **settings, epochs=20, batch_size=32, learning_rate=3e-3, **seeded)
    return clf.fit(images[0][:120], images[1][:120])


def test_learns_and_certifies(fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = images[0][120:220], images[1][120:220]
    assert fitted.score(X, y) > 0.8
    certificate = fitted.certify(X)
    assert certificate.certified(0.0, y) <= fitted.score(X, y)
    assert certificate.certified(0.0, y) > 0.3
    assert fitted.training_fit()["agreement"] == pytest.approx(1.0, abs=1e-6)
    assert [len(epoch["block_costs"]) for epoch in fitted.history_] == [len(fitted.backbone_.blocks)] * 20


def test_saved_model_gives_the_same_logits(
    fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X = images[0][120:150]
    fitted.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.decision_function(X), fitted.decision_function(X))
    assert torch.equal(loaded.backbone_(torch.tensor(X)), fitted.backbone_(torch.tensor(X)))
    assert loaded.get_params() == fitted.get_params()
    assert loaded.history_ == fitted.history_


def test_one_sample_at_a_time_gives_the_same(fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray]) -> None:
    x = torch.tensor(images[0][120:128])
    alone = torch.cat([fitted.module_(row[None]) for row in x])
    torch.testing.assert_close(fitted.module_(x), alone, rtol=1e-5, atol=1e-5)
    points = torch.cat([fitted.module_.stem(row[None]) for row in x])
    assert torch.equal(fitted.module_.stem(x), points)  # so that equal samples are equal points


def test_derivative_agrees_with_differences(fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray]) -> None:
    module = fitted.module_.exact()
    torch.manual_seed(0)
    x = torch.tensor(images[0][120:130], dtype=torch.float64, requires_grad=True)
    way = torch.nn.functional.normalize(torch.randn(10, 64, dtype=torch.float64), dim=1).reshape(x.shape)
    weights = torch.randn(3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((module(x) @ weights).sum(), x)
    step = 1e-6
    with torch.no_grad():
        measured = (module(x + step * way) - module(x - step * way)) @ weights / (2 * step)
    exact = (gradient * way).flatten(1).sum(1)
    # The map is smooth in pieces; a step may cross from one piece to the next.
    close = (exact - measured).abs() < 1e-5 * (1 + exact.abs())
    assert close.double().mean() >= 0.9


def test_distances_in_the_stem_are_those_of_the_inputs(
    fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray]
) -> None:
    """Training cannot lower the transport cost by shrinking the points."""
    x = torch.tensor(images[0][:50], dtype=torch.float64)
    stem = fitted.module_.exact().stem
    torch.testing.assert_close(torch.pdist(stem(x)), torch.pdist(x.flatten(1)))
    inputs = torch.tensor(images[0][:120])[fitted.transport_.samples]
    torch.testing.assert_close(fitted.module_.stem.inverse(fitted.transport_.x), inputs, rtol=0, atol=1e-6)  # type: ignore[operator]


def test_health_is_finite_where_neighborhoods_are_monotone(fitted: OTADClassifier) -> None:
    wide = health(fitted.transport_, k=4, ratio=-1.0)
    assert wide["feasible"] == 1.0  # l = -L admits distinct points always
    assert 0 < wide["median"] < np.inf


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"backbone": "vit"}, (64,), "backbone must be one of"),
        ({"backbone": "resnet"}, (64,), "needs images"),
        ({"backbone": "transformer", "backbone_options": {"depth": 3}}, (64,), "no option 'depth'"),
        ({"n_blocks": 0}, (64,), "n_blocks must be"),
    ],
)
def test_what_cannot_be_built(
    settings: dict, shape: tuple[int, ...], message: str, images: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=message):
        OTADClassifier(**settings, device="cpu").fit(images[0][:50].reshape(50, *shape), images[1][:50])
