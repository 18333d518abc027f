"""The estimator: scikit-learn's contract, exact fit, saving, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

from otad import OTADClassifier
from otad.attacks import ThreatModel
from otad.certificate import certify
from otad.data import load
from otad.errors import DataError, ModelFolderError
from otad.evaluation import evaluate
from otad.fitting import train_cells
from otad.runs import health_without_transport
from otad.train import Noise

QUICK = {"epochs": 8, "n_blocks": 2, "width": 32, "device": "cpu", "random_state": 0}


@parametrize_with_checks([OTADClassifier(epochs=60, n_blocks=2, width=16, learning_rate=5e-3, device="cpu")])  # type: ignore[untyped-decorator]
@pytest.mark.slow
def test_scikit_learn_contract(estimator, check) -> None:  # type: ignore[no-untyped-def]
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data / 16, data.target  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=["global", "neighborhood"])
def fitted(request: pytest.FixtureRequest, digits: tuple[np.ndarray, np.ndarray]) -> OTADClassifier:
    X, y = digits
    settings = QUICK | {"epochs": None, "width": 64}
    return OTADClassifier(interpolation=request.param, **settings).fit(X[:500], y[:500])  # type: ignore[arg-type]


def test_accuracy_and_certificate(fitted: OTADClassifier, digits: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = digits
    certificate = fitted.certify(X[1000:])
    # Digits have exact ties between neighbours, where rounding may choose: such a sample has radius 0.
    same = certificate.label == fitted.predict(X[1000:])
    assert (certificate.radius[~same] == 0).all()
    assert same.mean() > 0.99
    assert fitted.score(X[1000:], y[1000:]) > 0.85
    assert certificate.certified(0.1, y[1000:]) > 0.5


def test_fits_the_training_set_as_the_backbone_does(fitted: OTADClassifier) -> None:
    fit = fitted.training_fit()
    assert fit["feature_error"] < 1e-4
    assert fit["agreement"] == pytest.approx(1.0, abs=1e-6)
    assert fit["train_accuracy"] == pytest.approx(fit["backbone_train_accuracy"])


def test_explanation_of_a_training_sample_is_itself(
    fitted: OTADClassifier, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    explanation = fitted.explain(digits[0][:20], k=3)
    np.testing.assert_array_equal(explanation.indices[:, 0], np.arange(20))
    np.testing.assert_allclose(explanation.weights[:, 0], 1.0, atol=1e-4)
    many = fitted.explain(digits[0][900:920], k=500)
    np.testing.assert_allclose(many.weights.sum(1), 1.0, atol=1e-9)


def test_saved_model_is_the_same_model(
    fitted: OTADClassifier, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X = digits[0][1000:1100]
    fitted.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.decision_function(X), fitted.decision_function(X))
    np.testing.assert_array_equal(loaded.certify(X).radius, fitted.certify(X).radius)
    assert loaded.get_params() == fitted.get_params()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_string_labels_images_and_data_frames(digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    X, y = digits
    names = np.array(["zero", "one"])[y[y < 2]]
    images = X[y < 2].reshape(-1, 1, 8, 8)
    clf = OTADClassifier(**QUICK | {"epochs": 60}).fit(images[:100], names[:100])  # type: ignore[arg-type]
    assert clf.score(images[100:], names[100:]) > 0.9
    assert clf.decision_function(images).shape == (len(images),)
    with pytest.raises(ValueError, match="fit saw samples of shape"):
        clf.predict(images.reshape(len(images), 1, 4, 16))
    frame = pandas.DataFrame(X[:100], columns=[f"p{i}" for i in range(64)])
    clf = OTADClassifier(**QUICK).fit(frame, y[:100])  # type: ignore[arg-type]
    clf.save(tmp_path / "m")
    loaded = OTADClassifier.load(tmp_path / "m")
    assert list(loaded.feature_names_in_) == list(frame.columns)


def test_module_is_what_predict_uses(fitted: OTADClassifier, digits: tuple[np.ndarray, np.ndarray]) -> None:
    X = torch.tensor(digits[0][1000:1050], dtype=torch.float32, requires_grad=True)
    logits = fitted.module_(X)
    logits.sum().backward()
    assert X.grad is not None
    assert X.grad.isfinite().all()
    np.testing.assert_array_equal(fitted.classes_[logits.argmax(1)], fitted.predict(digits[0][1000:1050]))
    assert all(p.grad is None for p in fitted.module_.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"retrieval": "learned"}, "give interpolation='neighborhood'"),
        ({"interpolation": "neighborhood", "retrieval": "cosine"}, "retrieval must be one of"),
        ({"interpolation": "neighborhood", "embedding_epochs": 3}, "embedding_epochs and embedding_width belong to"),
        ({"interpolation": "neighborhood", "retrieval": "robust", "embedding_width": 7}, "must be even"),
        ({"branch": "middle"}, "branch must be one of"),
        ({"epochs": 0}, "epochs must be"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"smoothness": 1.0, "strong_convexity": 2.0}, "l < L"),
        ({"interpolation": "network", "branch": "mean"}, "imitates branch 'lower'"),
        ({"interpolation": "network", "network_heads": 3}, "divisor of width"),
        ({"network_problems": 0}, "network_problems must be"),
    ],
)
def test_bad_parameters(settings: dict, message: str, digits: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=message):
        OTADClassifier(**settings).fit(digits[0][:50], digits[1][:50])


def test_bad_data(digits: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = digits[0][:50].copy(), digits[1][:50]
    with pytest.raises(ValueError, match="class"):
        OTADClassifier(**QUICK).fit(X, np.zeros(50))  # type: ignore[arg-type]
    X[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        OTADClassifier(**QUICK).fit(X, y)  # type: ignore[arg-type]


def test_damaged_and_foreign_folders(fitted: OTADClassifier, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ModelFolderError, match="no model folder"):
        OTADClassifier.load(folder)
    fitted.save(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelFolderError, match="damaged"):
        OTADClassifier.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(facts | {"format": "something else"}))
    with pytest.raises(ModelFolderError, match="format"):
        OTADClassifier.load(folder)
    (folder / "model.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "classes"}))
    with pytest.raises(ModelFolderError, match="damaged"):
        OTADClassifier.load(folder)
    (folder / "model.json").unlink()
    with pytest.raises(ModelFolderError, match=r"model\.json"):
        OTADClassifier.load(folder)


def test_a_folder_of_an_older_version_is_loaded_or_refused_in_one_line(
    fitted: OTADClassifier, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    fitted.save(tmp_path)
    facts = json.loads((tmp_path / "model.json").read_text())
    for later in ("refinement", "network_error", "network_history", "embedding_history"):
        del facts[later]
    for later in ("target_radius", "refinement", "retrieval", "network_width"):
        del facts["parameters"][later]
    (tmp_path / "model.json").write_text(json.dumps(facts))
    loaded = OTADClassifier.load(tmp_path)
    assert loaded.refinement_ is None
    np.testing.assert_array_equal(loaded.decision_function(digits[0][:50]), fitted.decision_function(digits[0][:50]))
    for part in ("seed", "history"):
        (tmp_path / "model.json").write_text(json.dumps({k: v for k, v in facts.items() if k != part}))
        with pytest.raises(ModelFolderError, match="of another version") as found:
            OTADClassifier.load(tmp_path)
        assert "\n" not in str(found.value)
    facts["parameters"]["temperature"] = 1.0
    (tmp_path / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ModelFolderError, match="temperature"):
        OTADClassifier.load(tmp_path)


def test_same_seed_same_model(digits: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = digits
    first, second = (OTADClassifier(**QUICK).fit(X[:200], y[:200]) for _ in range(2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(first.decision_function(X[:50]), second.decision_function(X[:50]))


@pytest.fixture(scope="module")
def network(digits: tuple[np.ndarray, np.ndarray]) -> OTADClassifier:
    settings = QUICK | {"network_problems": 600, "network_width": 16, "network_layers": 1}
    return OTADClassifier(interpolation="network", smoothness=2.0, **settings).fit(digits[0][:300], digits[1][:300])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_network_reports_its_error_and_certifies_nothing(
    network: OTADClassifier, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    X = digits[0][1000:1100]
    assert set(network.network_error_) == {"new samples", "perturbed"}
    for figures in network.network_error_.values():
        assert 0 < figures["feature_error"] < min(figures["nearest_error"], figures["mean_error"])
        assert 0.8 < figures["label_agreement"] <= 1
    certificate = network.certify(X)
    assert (certificate.radius == 0).all()
    np.testing.assert_array_equal(certificate.label, network.predict(X))
    solved = network.module_.solved()(torch.tensor(X, dtype=torch.float32)).argmax(1).numpy()
    agreement = float((network.classes_[solved] == network.predict(X)).mean())
    assert network.measure_network(X)["label_agreement"] == pytest.approx(agreement)
    np.testing.assert_allclose(network.explain(X).weights.sum(1), 1.0, atol=1e-9)
    np.testing.assert_array_equal(network.predict(X), [network.predict(row[None])[0] for row in X])


@pytest.mark.slow
def test_a_saved_network_is_the_same_network(
    network: OTADClassifier, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X = digits[0][1000:1100]
    network.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.decision_function(X), network.decision_function(X))
    assert loaded.network_error_ == network.network_error_
    assert loaded.get_params() == network.get_params()


@pytest.mark.slow
@pytest.mark.parametrize("retrieval", ["learned", "robust"])
def test_an_embedding_is_part_of_the_model(
    retrieval: str, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X, y = digits[0].reshape(-1, 1, 8, 8), digits[1]
    settings = QUICK | {"epochs": 60, "retrieval": retrieval, "embedding_epochs": 10}
    clf = OTADClassifier("neighborhood", **settings).fit(X[:400], y[:400])  # type: ignore[arg-type]
    assert len(clf.embedding_history_) == 10
    assert clf.score(X[400:500], y[400:500]) > 0.7
    assert clf.training_fit()["agreement"] == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_array_equal(clf.explain(X[:20], k=1).indices[:, 0], np.arange(20))
    certified = clf.certify(X[400:450])
    assert bool((certified.radius > 0).any()) == (retrieval == "robust")
    clf.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    assert loaded.get_params() == clf.get_params()
    assert loaded.embedding_history_ == clf.embedding_history_
    for a, b in zip(clf.module_.state_dict().items(), loaded.module_.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert a[1].dtype == b[1].dtype
        assert torch.equal(a[1], b[1])
    np.testing.assert_array_equal(loaded.decision_function(X[400:450]), clf.decision_function(X[400:450]))
    np.testing.assert_array_equal(loaded.certify(X[400:450]).radius, certified.radius)
    assert loaded.module_.retrieval_space is loaded.module_.interpolation.retrieval


@pytest.mark.slow
@pytest.mark.parametrize("refinement", ["cells", "potential"])
def test_refined_for_a_radius_certifies_more_and_survives_saving(
    digits: tuple[np.ndarray, np.ndarray], tmp_path: Path, refinement: str
) -> None:
    X, y = (part[:150] for part in digits)
    radius = 0.5 if refinement == "potential" else 1.3  # cells start at the samples, most certified at 0.5
    clf = OTADClassifier(target_radius=radius, refinement=refinement, **QUICK).fit(X, y)  # type: ignore[arg-type]
    assert clf.lipschitz_ == (pytest.approx(1.0) if refinement == "potential" else None)
    assert clf.refinement_ is not None
    assert clf.refinement_["after"]["certified"] > clf.refinement_["before"]["certified"]
    assert clf.certify(X).certified(radius, y) >= clf.refinement_["after"]["certified"] - 0.02
    left = clf.interpolated()
    inputs = torch.tensor(X[:50], dtype=torch.float32)
    assert torch.equal(left(inputs).argmax(1), clf.backbone_(inputs).argmax(1))
    clf.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.decision_function(X[:50]), clf.decision_function(X[:50]))
    assert loaded.refinement_ == clf.refinement_
    found = clf.explain(X[:20], k=3)
    assert set(found.indices.ravel()) <= set(range(150))
    fit = clf.training_fit()
    assert "feature_error" not in fit
    assert fit == loaded.training_fit()
    assert fit["train_accuracy"] == pytest.approx(clf.score(X, y))
    assert fit["backbone_train_accuracy"] == pytest.approx((backbone_labels(clf, X) == y).mean())
    assert fit["agreement"] == pytest.approx((backbone_labels(clf, X) == clf.predict(X)).mean())


def backbone_labels(clf: OTADClassifier, X: np.ndarray) -> np.ndarray:
    return clf.classes_[clf.backbone_(torch.tensor(X, dtype=torch.float32)).argmax(1).numpy()]


@pytest.mark.slow
def test_a_refined_potential_lies_on_any_backbone(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Whose points may have more coordinates than its inputs."""
    X, y = digits[0][:60].reshape(-1, 1, 8, 8), digits[1][:60]
    settings = QUICK | {"backbone": "transformer", "backbone_options": {"patch": 4, "heads": 2, "hidden": 16}}
    with pytest.raises(ValueError, match="refinement"):
        OTADClassifier(target_radius=0.5, **settings).fit(X, y)  # type: ignore[arg-type]
    settings["refinement"] = "potential"
    clf = OTADClassifier(target_radius=0.5, **settings).fit(X, y)  # type: ignore[arg-type]
    assert clf.transport_.x.shape[1] != 64
    assert clf.lipschitz_ == pytest.approx(1.0)
    assert clf.decision_function(X).shape == (60, 10)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["dense", "patches"])
def test_cells_on_an_encoder_are_certified_attacked_and_saved(
    digits: tuple[np.ndarray, np.ndarray], tmp_path: Path, encoder: str
) -> None:
    X, y = digits[0][:200].reshape(-1, 1, 8, 8), digits[1][:200]
    clf = OTADClassifier(target_radius=0.5, encoder=encoder, **QUICK).fit(X, y)  # type: ignore[arg-type]
    assert clf.refinement_ is not None
    assert clf.refinement_["after"]["certified"] > clf.refinement_["before"]["certified"]
    certificate = clf.certify(X, box=(0.0, 1.0))
    assert set(certificate.kind) == {"cells"}  # an encoder keeps no box, and the certificate says so
    assert certificate.certified(0.5, y) >= clf.refinement_["after"]["certified"] - 0.02
    few = torch.tensor(X[:60], dtype=torch.float32)
    threat = ThreatModel("l2", 0.5)
    methods = {"exact_gradient": {"losses": ("margin",), "n_targets": 2, "steps": 15}}
    report = evaluate(clf.module_, few, y[:60], [threat], methods, certificate=certify(clf.module_, few))
    assert report.audit["certified_attacked_clean"].passed
    assert 0 < report.certified_accuracy[threat.key] <= report.robust_accuracy[threat.key]["worst_case"] < 1
    clf.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.decision_function(X[:50]), clf.decision_function(X[:50]))
    np.testing.assert_array_equal(loaded.certify(X[:50]).radius, clf.certify(X[:50]).radius)
    assert clf.explain(X[:5], k=2).indices.shape == (5, 2)
    assert loaded.training_fit() == clf.training_fit()


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [None, "dense"])
def test_cells_in_principal_components_are_saved(
    digits: tuple[np.ndarray, np.ndarray], tmp_path: Path, encoder: str | None
) -> None:
    X, y = (part[:200] for part in digits)
    settings = QUICK | {"target_radius": 0.5, "encoder": encoder}
    clf = OTADClassifier(components=12, **settings).fit(X, y)  # type: ignore[arg-type]
    assert clf.certify(X).certified(0.5, y) > 0.5
    if encoder is None:
        assert np.linalg.matrix_rank(clf.refined_.learned.slopes, tol=1e-4) <= 12  # type: ignore[union-attr]
    else:
        first = clf.stem_.encoders[0].weight.detach()  # type: ignore[union-attr,index]
        assert np.linalg.matrix_rank(first, tol=1e-4) == 12
    clf.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    assert loaded.components == 12
    np.testing.assert_array_equal(loaded.decision_function(X[:50]), clf.decision_function(X[:50]))
    np.testing.assert_array_equal(loaded.certify(X[:50]).radius, clf.certify(X[:50]).radius)
    assert clf.explain(X[:5], k=2).indices.shape == (5, 2)


@pytest.mark.slow
def test_options_of_cells_are_those_of_their_training(digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    X, y = (part[:200] for part in digits)
    chosen: dict = {"pieces": 3, "temperature": 0.3, "ramp": 1.0, "noise": 0.1, "learning_rate": 0.1, "epochs": 3}
    clf = OTADClassifier(target_radius=0.5, refinement_options=chosen, **QUICK).fit(X, y)  # type: ignore[arg-type]
    transport, stem = clf.transport_, clf.backbone_.stem
    _, expected, pieces = train_cells(
        stem,
        torch.tensor(X).float(),
        torch.tensor(y),
        transport.samples,
        transport.y,
        most=30,
        seed=clf.seed_,
        target_radius=0.5,
        temperature=0.3,
        ramp=1.0,
        learning_rate=0.1,
        epochs=3,
        augment=Noise(0.1),
    )
    assert torch.equal(clf.refined_.pieces, pieces)  # type: ignore[union-attr]
    torch.testing.assert_close(clf.refined_.learned.state_dict(), expected.diagram.state_dict())  # type: ignore[union-attr]
    clf.save(tmp_path / "model")
    assert OTADClassifier.load(tmp_path / "model").refinement_options == chosen


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"noise": 0.1}, {}, "needs target_radius"),
        ({"noise": 0.1}, {"target_radius": 0.5, "refinement": "potential"}, "needs target_radius"),
        (
            {"noises": 0.1},
            {"target_radius": 0.5},
            "known: pieces, poses, temperature, ramp, noise, learning_rate, epochs",
        ),
        ({"epochs": 2.5}, {"target_radius": 0.5}, "epochs must be a whole number of at least 1; got 2.5"),
        ({"pieces": 0}, {"target_radius": 0.5}, "at least 1; got 0"),
        ({"temperature": "warm"}, {"target_radius": 0.5}, "got 'warm'"),
        ({"ramp": math.nan}, {"target_radius": 0.5}, "ramp must be a number; got nan"),
        ({"noise": 0.1}, {"target_radius": 0.5, "components": 5}, "does not go with components"),
        ({"poses": 10}, {"target_radius": 0.5}, "there are 9 poses; got 10"),
        ({"poses": 3}, {"target_radius": 0.5, "encoder": "dense"}, "without an encoder"),
        ("noise", {"target_radius": 0.5}, "must be a dict"),
    ],
)
def test_wrong_options_of_cells_are_named(
    options: Any, settings: dict, message: str, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=message):
        OTADClassifier(refinement_options=options, **settings).fit(*digits)


def test_poses_and_noise_belong_to_images_and_tables(digits: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="poses belong to images"):
        OTADClassifier(target_radius=0.5, refinement_options={"poses": 3}).fit(*digits)
    images = digits[0].reshape(-1, 1, 8, 8)
    with pytest.raises(ValueError, match="noise belongs to tables"):
        OTADClassifier(target_radius=0.5, refinement_options={"noise": 0.1}).fit(images, digits[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "poses"),
    [({}, 9), ({"deform": False}, 1), ({"refinement_options": {"poses": 2}}, 2), ({"encoder": "dense"}, 1)],
)
def test_every_piece_of_images_has_poses(
    settings: dict, poses: int, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    X, y = digits[0][:200].reshape(-1, 1, 8, 8), digits[1][:200]
    options = {"pieces": 2, "epochs": 1} | settings.get("refinement_options", {})
    clf = OTADClassifier(target_radius=0.5, **(QUICK | settings | {"refinement_options": options})).fit(X, y)
    diagram = clf.refined_.learned  # type: ignore[union-attr]
    assert len(diagram.intercepts) == 20 * poses  # type: ignore[union-attr,arg-type]
    clf.save(tmp_path / "model")
    loaded = OTADClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.certify(X[:20]).radius, clf.certify(X[:20]).radius)
    assert all(len(set(named)) == 5 for named in clf.explain(X[:5], k=5).indices.tolist())


@pytest.mark.slow
def test_pieces_are_of_the_class_of_most_twins(digits: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = (part[:80] for part in digits)
    thrice, labels = np.concatenate([X] * 3), np.concatenate([(y + 1) % 10, y, y])
    clf = OTADClassifier(target_radius=0.4, **QUICK).fit(thrice, labels)  # type: ignore[arg-type]
    refined = clf.refined_
    assert refined is not None
    assert torch.equal(clf.transport_.y[refined.pieces].sort().values, refined.learned.classes)  # type: ignore[union-attr]
    assert torch.equal(clf.transport_.y[refined.pieces], torch.tensor(y)[clf.transport_.samples[refined.pieces] % 80])


@pytest.mark.parametrize("lost", [0, 4, 9])
def test_a_class_of_twins_of_others_has_no_pieces(digits: tuple[np.ndarray, np.ndarray], lost: int) -> None:
    X, y = (part[:200] for part in digits)
    others = X[y != lost], y[y != lost]
    twice = np.concatenate([others[0]] * 2 + [others[0][:20]])
    labels = np.concatenate([others[1]] * 2 + [np.full(20, lost)])
    with pytest.raises(DataError, match="no point of its own"):
        OTADClassifier(target_radius=0.4, **QUICK).fit(twice, labels)  # type: ignore[arg-type]


def test_health_without_transport_is_of_a_map_whatever_is_refined() -> None:
    data = load("digits", n_train=200, n_test=20)
    cells = {"target_radius": 0.5, "encoder": "dense", "refinement_options": {"pieces": 2}}
    health = health_without_transport(data, cells, epochs=1, seed=0)
    assert health == health_without_transport(data, {}, epochs=1, seed=0)


def test_components_belong_to_cells_of_tables(digits: tuple[np.ndarray, np.ndarray]) -> None:
    for settings in ({}, {"target_radius": 0.5, "refinement": "potential"}):
        with pytest.raises(ValueError, match="components"):
            OTADClassifier(components=5, **settings).fit(*digits)  # type: ignore[arg-type]
    images = digits[0].reshape(-1, 1, 8, 8)
    with pytest.raises(ValueError, match="tables"):
        OTADClassifier(components=5, target_radius=0.5, **QUICK).fit(images, digits[1])  # type: ignore[arg-type]


def test_an_encoder_belongs_to_cells(digits: tuple[np.ndarray, np.ndarray]) -> None:
    for settings in ({"encoder": "dense"}, {"encoder": "dense", "target_radius": 0.5, "refinement": "potential"}):
        with pytest.raises(ValueError, match="encoder"):
            OTADClassifier(**settings).fit(*digits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images"):
        OTADClassifier(encoder="patches", target_radius=0.5, **QUICK).fit(*digits)  # type: ignore[arg-type]


def test_target_radius_needs_the_global_potential() -> None:
    X, y = np.zeros((4, 2)), np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="target_radius"):
        OTADClassifier(interpolation="neighborhood", target_radius=0.5).fit(X, y)
    with pytest.raises(ValueError, match="target_radius"):
        OTADClassifier(target_radius=0.0).fit(X, y)
