"""The encoder: orthonormal whatever its parameters, and a Lipschitz constant that holds."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from otad.certificate import POINT_ROUNDING, _size
from otad.nn import CenteredFlatten, EncodedStem, MaxMinEncoder, dense_encoders, patch_encoders
from otad.nn.orthogonal import PatchEncoder


def encoder(d: int, width: int, scale: float = 1.0) -> MaxMinEncoder:
    torch.manual_seed(0)
    found = MaxMinEncoder(d, width).double()
    assert found.free is not None
    with torch.no_grad():
        found.free.mul_(scale)
        found.bias.normal_()
    return found


@pytest.mark.parametrize(("d", "width"), [(12, 4), (5, 8), (6, 6)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_rows_or_columns_are_orthonormal(d: int, width: int, scale: float) -> None:
    weight = encoder(d, width, scale).weight.detach()
    product = weight.T @ weight if width > d else weight @ weight.T
    assert torch.allclose(product, torch.eye(min(d, width), dtype=torch.float64), atol=1e-9)


def test_lipschitz_constant_holds_and_is_attained() -> None:
    stem = EncodedStem(CenteredFlatten(torch.ones(2, 3).double()), encoder(6, 8), encoder(8, 8))
    assert stem.lipschitz == pytest.approx(1.0, abs=1e-8)
    x = torch.randn(200, 2, 3, dtype=torch.float64)
    near = x + 1e-3 * torch.randn(200, 2, 3, dtype=torch.float64)
    quotients = (stem(x) - stem(near)).norm(dim=1) / (x - near).flatten(1).norm(dim=1)
    assert quotients.max() <= stem.lipschitz * (1 + 1e-12)
    assert quotients.max() > 1 - 1e-9  # wide layers lose nothing of a small step


def test_derivatives_by_finite_differences() -> None:
    small = encoder(5, 4)
    assert small.free is not None
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda free: torch.func.functional_call(small, {"free": free}, (x,)), (small.free,), atol=1e-5
    )


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        MaxMinEncoder(4, 3)


@pytest.mark.parametrize(("image", "width"), [((3, 4, 1), 8), ((4, 5, 1), 8), ((4, 4, 1), 12)])
def test_patches_that_do_not_fit_are_refused(image: tuple[int, int, int], width: int) -> None:
    with pytest.raises(ValueError, match="patches"):
        PatchEncoder(image, width)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 12), (2, 5, 5)])
def test_patches_of_any_image_keep_the_lipschitz_constant(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.rand(40, *shape, dtype=torch.float64)
    stem = EncodedStem(CenteredFlatten(x.mean(0)), *patch_encoders(shape, 8, 16)).double()
    near = x + 1e-3 * torch.randn_like(x)
    quotients = (stem(x) - stem(near)).norm(dim=1) / (x - near).flatten(1).norm(dim=1)
    assert stem.lipschitz == pytest.approx(1.0, abs=1e-7)
    assert quotients.max() <= stem.lipschitz * (1 + 1e-12)


def test_a_layer_on_patches_is_an_isometry_of_images_until_it_sorts() -> None:
    """MaxMin permutes where pairs do not change order, so a square Q keeps small distances."""
    torch.manual_seed(0)
    layer = PatchEncoder((8, 6, 4), 16).double()
    x = torch.randn(20, 8 * 6 * 4, dtype=torch.float64)
    step = 1e-6 * torch.randn_like(x)
    assert torch.allclose((layer(x + step) - layer(x)).norm(dim=1), step.norm(dim=1), rtol=1e-5)


def test_patches_are_those_of_a_convolution() -> None:
    """The same Q at every patch of the moved image, by torch's own convolution."""
    torch.manual_seed(0)
    height, width, c, units = 6, 8, 3, 12
    layer = PatchEncoder((height, width, c), units, halve=True).double()
    x = torch.randn(5, height, width, c, dtype=torch.float64)
    kernel = layer.encoder.weight.unflatten(1, (2, 2, c)).permute(0, 3, 1, 2)
    moved = x.roll((1, 1), (1, 2)).permute(0, 3, 1, 2)
    a, b = functional.conv2d(moved, kernel, layer.encoder.bias, stride=2).chunk(2, dim=1)
    expected = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1).permute(0, 2, 3, 1)
    assert torch.allclose(layer(x.flatten(1)), expected.flatten(1))


def test_dense_layers_fit_each_other() -> None:
    for d, units, width in ((1, 16, 16), (7, 256, 128), (100, 256, 200), (900, 256, 256)):
        assert nn.Sequential(*dense_encoders(d, 3, units))(torch.randn(4, d)).shape == (4, width)


def test_a_settled_encoder_is_the_same_function_in_both_precisions() -> None:
    """Q is fixed once: only sums are rounded, by less than certificates allow for."""
    torch.manual_seed(0)
    x = torch.rand(200, 3, 16, 16)
    stem = EncodedStem(CenteredFlatten(x.mean(0)), *patch_encoders((3, 16, 16), 16, 64))
    before = stem(x).detach()
    stem.settle()
    assert torch.allclose(stem(x), before, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in stem.parameters())
    exact = copy.deepcopy(stem).double()
    error = (exact(x.double()) - stem(x)).norm(dim=1)
    assert (error < 0.5 * POINT_ROUNDING * _size(exact, x.double())).all()
    again = EncodedStem(CenteredFlatten(x.mean(0)), *patch_encoders((3, 16, 16), 16, 64))
    again.settle()
    again.load_state_dict(stem.state_dict())
    assert torch.equal(again(x), stem(x))
