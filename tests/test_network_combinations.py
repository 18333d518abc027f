"""CIP-net over every backbone and with every kind of retrieval: one model, saved and loaded, without a certificate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from otad import OTADClassifier
from otad.attacks import AttackerKnowledge

pytestmark = pytest.mark.slow

OPTIONS = {"mlp": {}, "resnet": {"stages": 2}, "transformer": {"patch": 4, "heads": 2, "hidden": 16}}
CASES = [(backbone, retrieval) for backbone in OPTIONS for retrieval in ("euclidean", "robust")]


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    X, y = map(np.asarray, load_digits(n_class=3, return_X_y=True))
    return (X / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


@pytest.fixture(scope="module", params=[*CASES, ("mlp", "learned")], ids=" ".join)
def fitted(request: pytest.FixtureRequest, images: tuple[np.ndarray, np.ndarray]) -> OTADClassifier:
    backbone, retrieval = request.param
    settings: dict[str, Any] = {
        "backbone_options": OPTIONS[backbone],
        "n_blocks": 2,
        "width": 16,
        "epochs": 10,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "n_neighbors": 5,
        "network_problems": 256,
        "network_width": 8,
        "network_layers": 1,
        "network_heads": 2,
        "embedding_epochs": None if retrieval == "euclidean" else 3,
    }
    seeded: dict[str, Any] = {"device": "cpu", "random_state": 0}
    clf = OTADClassifier("network", backbone=backbone, retrieval=retrieval, smoothness=2.0, **settings, **seeded)
    return clf.fit(images[0][:120], images[1][:120])


def test_predicts_certifies_and_survives_saving(
    fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X, y = images[0][120:180], images[1][120:180]
    assert fitted.score(X, y) > 0.7
    certificate = fitted.certify(X)
    assert set(certificate.kind) == {"none"}
    assert (certificate.radius == 0).all()
    fitted.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.decision_function(X), fitted.decision_function(X))
    np.testing.assert_array_equal(loaded.explain(X).indices, fitted.explain(X).indices)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.measure_network(X) == fitted.measure_network(X)


def test_neighbors_are_those_of_the_solver_it_imitates(
    fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray]
) -> None:
    """And the attacker of either steers them in the same space, whatever it was told."""
    x = torch.tensor(images[0][120:140])
    network, solved = fitted.module_, fitted.module_.solved()
    assert torch.equal(network.features(x).stats["indices"], solved.features(x).stats["indices"])
    lost = AttackerKnowledge(embedding=torch.nn.Flatten())
    space = network.stem if fitted.retrieval == "euclidean" else network.interpolation.retrieval
    assert lost.about(network).embedding is lost.about(solved).embedding is space
    agreement = (network(x).argmax(1) == solved(x).argmax(1)).double().mean()
    assert fitted.measure_network(x.numpy())["label_agreement"] == pytest.approx(float(agreement))


def test_gradient_holds_the_neighbors(fitted: OTADClassifier, images: tuple[np.ndarray, np.ndarray]) -> None:
    """Against central differences in float64, along a random direction."""
    model = fitted.module_.exact()
    x = torch.tensor(images[0][120:124]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert gradient.isfinite().all()
    torch.manual_seed(0)
    step = 1e-6 * torch.nn.functional.normalize(torch.randn_like(x).flatten(1)).view_as(x)
    with torch.no_grad():
        assert torch.equal(model.features(x - step).stats["indices"], model.features(x + step).stats["indices"])
        difference = (model(x + step).square().sum() - model(x - step).square().sum()) / 2
    torch.testing.assert_close(difference, (gradient * step).sum(), rtol=1e-4, atol=1e-11)
