"""Cells in principal components: the same function of all columns, at the same distances."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from otad.certificate import certify
from otad.defense import OTAD, CellInterpolation, identity_head
from otad.fitting import train_cells
from otad.fitting.cells import principal_basis
from otad.nn import CenteredFlatten, EncodedStem, MaxMinEncoder


def digits() -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)


def trained(components: int | None, encoder: str | None = None, n: int = 300) -> OTAD:
    x, y = digits()
    x, y = x[:n], y[:n]
    options = {"target_radius": 0.4, "epochs": 10, "temperature": 0.5, "seed": 1, "device": "cpu"}
    stem, found, pieces = train_cells(
        CenteredFlatten(x.mean(0)),
        x,
        y,
        torch.arange(n),
        y,
        most=10 if encoder else 60,
        encoder=encoder,
        components=components,
        **options,  # type: ignore[arg-type]
    )
    assert len(pieces) == len(found.diagram.slopes)
    assert torch.equal(y[pieces].sort().values, found.diagram.classes)
    return OTAD(stem, CellInterpolation(found.diagram), identity_head(10))


@pytest.mark.parametrize("n", [200, 40])
def test_the_basis_spans_what_the_points_vary_in(n: int) -> None:
    x = digits()[0][:n]
    basis = principal_basis(x, 12).double()
    assert torch.allclose(basis.T @ basis, torch.eye(12).double(), atol=1e-5)
    others = torch.tensor(PCA(12, svd_solver="full").fit(x.double().numpy()).components_)
    cosines = torch.linalg.svdvals(others @ basis)
    assert cosines.min() > 1 - 1e-6


@pytest.mark.parametrize("encoder", [None, "dense"])
def test_nothing_is_seen_outside_of_the_components(encoder: str | None) -> None:
    model = trained(10, encoder)
    x = digits()[0][:300]
    basis = principal_basis(model.stem.stem(x) if isinstance(model.stem, EncodedStem) else model.stem(x), 10)
    noise = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    outside = noise - noise @ basis @ basis.T
    fresh = digits()[0][1000:1040]
    assert torch.allclose(model(fresh + outside), model(fresh), atol=1e-4)
    assert not torch.allclose(model(fresh + noise - outside), model(fresh), atol=1e-2)
    # So radii are those of the components.
    certificate = certify(model, fresh)
    again = certify(model, fresh + outside)
    np.testing.assert_allclose(again.radius, certificate.radius, atol=1e-4)
    assert certificate.certified(0.4, digits()[1][1000:1040].numpy()) > 0.3


def test_a_lifted_layer_is_the_layer_of_the_coordinates() -> None:
    torch.manual_seed(0)
    layer, basis = MaxMinEncoder(5, 12).double(), torch.linalg.qr(torch.randn(9, 5).double()).Q
    x = torch.randn(7, 9).double()
    expected = layer(x @ basis).detach()
    layer.lift(basis)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert layer.lipschitz == pytest.approx(1.0, abs=1e-8)
    assert not any(p.requires_grad for p in layer.parameters())


def test_all_components_are_all_columns() -> None:
    x = digits()[0][1000:1100]
    assert torch.equal(trained(64)(x), trained(None)(x))


def test_images_have_no_columns() -> None:
    x, y = digits()
    images = x[:50].reshape(-1, 1, 8, 8)
    with pytest.raises(ValueError, match="tables"):
        train_cells(
            CenteredFlatten(images.mean(0)),
            images,
            y[:50],
            torch.arange(50),
            y[:50],
            most=20,
            seed=0,
            components=3,
            target_radius=0.3,
        )


@pytest.mark.parametrize("wrong", [{"components": 0}, {"components": 3, "box": (0.0, 1.0)}])
def test_what_does_not_go_with_components_is_refused(wrong: dict) -> None:
    x, y = (part[:50] for part in digits())
    options = {"most": 20, "seed": 0, "target_radius": 0.3} | wrong
    with pytest.raises(ValueError, match="component"):
        train_cells(CenteredFlatten(x.mean(0)), x, y, torch.arange(50), y, **options)


def test_directions_without_variance_are_left_out() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([x, torch.ones(30, 40)], 1)
    assert principal_basis(flat, 20).shape == (48, 8)
    assert principal_basis(flat[:5], 20).shape == (48, 4)
    assert torch.allclose(principal_basis(flat, 20)[8:], torch.zeros(40, 8), atol=1e-6)


@pytest.mark.parametrize("poses", [0, -1, 10])
def test_there_are_nine_poses_at_most(poses: int) -> None:
    x, y = digits()
    images = x[:60].unflatten(1, (1, 8, 8))
    settings = {"most": 20, "poses": poses, "target_radius": 0.4, "epochs": 1, "seed": 0}
    with pytest.raises(ValueError, match="poses must be from 1 to 9"):
        train_cells(CenteredFlatten(images.mean(0)), images, y[:60], torch.arange(60), y[:60], **settings)  # type: ignore[arg-type]


def test_pieces_start_somewhere() -> None:
    x, y = digits()
    with pytest.raises(ValueError, match="no samples"):
        train_cells(CenteredFlatten(x.mean(0)), x, y, y[:0], y[:0], most=20, target_radius=0.4, epochs=1, seed=0)


def test_an_encoder_has_the_precision_of_the_samples() -> None:
    x, y = (part[:200] for part in digits())
    x = x.double()
    options = {"target_radius": 0.4, "epochs": 2, "temperature": 0.5, "seed": 1, "device": "cpu"}
    stem, found, _ = train_cells(
        CenteredFlatten(x.mean(0)),
        x,
        y,
        torch.arange(200),
        y,
        most=10,
        encoder="dense",
        **options,  # type: ignore[arg-type]
    )
    assert stem(x).dtype == torch.float64
    model = OTAD(stem, CellInterpolation(found.diagram), identity_head(10))
    a, b = torch.randn(2, 2000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert ((stem(a) - stem(b)).norm(dim=1) <= (a - b).norm(dim=1) * (1 + 1e-9)).all()
    assert (certify(model, x).radius >= 0).all()
