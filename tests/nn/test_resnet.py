"""The residual convolutional network: a transport in pixel coordinates."""

import pytest
import torch

from otad.nn import residual_convnet
from otad.nn.backbone import Backbone
from otad.nn.resnet import ConvolutionBranch

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 8, 8), (1, 7, 9), (3, 5, 6), (1, 1, 64)]


def stirred(backbone: Backbone, seed: int = 0) -> Backbone:
    """Weights and batch statistics as after training: no layer is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in backbone.blocks.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
        backbone.train()
        inputs = torch.rand(16, *backbone.stem.mean.shape, generator=generator)  # type: ignore[union-attr]
        for _ in range(3):
            backbone(inputs)
    return backbone.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_untrained_trunk_is_the_identity_and_keeps_the_dimension(shape: tuple[int, ...]) -> None:
    mean, x = torch.rand(shape), torch.rand(4, *shape)
    for backbone in (residual_convnet(mean, 5, width=4), residual_convnet(mean, 5, width=4).eval()):
        points = backbone.stem(x)
        z, cost = backbone.transport(points)
        assert torch.equal(z, points)
        assert torch.equal(cost, torch.zeros(4))
        torch.testing.assert_close(points, (x - mean).flatten(1))
        torch.testing.assert_close(backbone.stem.inverse(points), x)  # type: ignore[operator]
    assert stirred(backbone)(x).shape == (4, 5)


def test_a_stage_needs_sides_that_can_be_halved() -> None:
    def factors(shape: tuple[int, ...]) -> list[int]:
        return [int(block.factor) for block in residual_convnet(torch.zeros(shape), 2).blocks]  # type: ignore[arg-type]

    assert factors((1, 28, 28)) == [1, 1, 2, 2, 4, 4]
    assert factors((1, 6, 10)) == [1, 1, 1, 2, 2, 2]
    assert factors((3, 7, 8)) == [1] * 6


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 4, 4), (2, 2, 4)])
def test_a_batch_of_one_small_image_can_be_trained_on(shape: tuple[int, ...]) -> None:
    backbone = residual_convnet(torch.zeros(shape), 2, width=4).train()
    assert backbone(torch.rand(1, *shape)).shape == (1, 2)


def test_branch_keeps_pixels_in_their_places() -> None:
    """What a branch adds to a pixel comes from its own neighbourhood, in every stage."""
    for factor in (1, 2, 4):
        torch.manual_seed(factor)
        branch = ConvolutionBranch((2, 32, 32), factor, 8).eval()
        torch.nn.init.normal_(branch.layers[-1].weight)  # type: ignore[arg-type]
        image = torch.rand(1, 2, 32, 32)
        other = image.clone()
        other[:, :, 17, 14] += 1.0
        changed = (branch(image.flatten(1)) - branch(other.flatten(1))).abs().reshape(2, 32, 32).amax(0) > 0
        rows, columns = changed.nonzero().T
        # Two convolutions reach two cells of `factor` pixels beyond the own one.
        assert changed[17, 14]
        assert int(rows.min()) >= 17 - 3 * factor
        assert int(rows.max()) <= 17 + 3 * factor
        assert int(columns.min()) >= 14 - 3 * factor
        assert int(columns.max()) <= 14 + 3 * factor


def test_batch_statistics_are_frozen_in_evaluation() -> None:
    torch.manual_seed(0)
    backbone = stirred(residual_convnet(torch.rand(1, 12, 12), 3, width=4)).double()
    x = torch.rand(9, 1, 12, 12, dtype=torch.float64)
    whole = backbone(x)
    torch.testing.assert_close(torch.cat([backbone(row[None]) for row in x]), whole, rtol=0, atol=1e-12)
    assert torch.equal(backbone(x), whole)
    assert not torch.allclose(backbone.train()(x), whole, atol=1e-3)


def test_derivative_agrees_with_differences() -> None:
    torch.manual_seed(0)
    backbone = stirred(residual_convnet(torch.rand(1, 4, 4), 3, width=4)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backbone, (x,), atol=1e-6)


@pytest.mark.parametrize("shape", [(30,), (28, 28), (1, 1, 1)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs images"):
        residual_convnet(torch.zeros(shape), 3)
