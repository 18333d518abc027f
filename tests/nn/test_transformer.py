"""The Transformer trunk: tokens of images and tables, an isometric stem, a linear head."""

import math

import pytest
import torch
from torch import Tensor

from otad.nn import Backbone, residual_transformer

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 7, 10), (30,), (765,), (3,)]


def stirred(backbone: Backbone, seed: int = 0) -> Backbone:
    """Weights as after training: no layer is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in backbone.parameters():
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return backbone.eval()


def stem_matrix(backbone: Backbone, shape: tuple[int, ...]) -> Tensor:
    """The linear part of the stem, column by column."""
    stem = backbone.stem.double()
    size = math.prod(shape)
    units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return (stem(units) - stem(torch.zeros_like(units))).T


@pytest.mark.parametrize("pool", ["class_token", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_untrained_trunk_is_the_identity(shape: tuple[int, ...], pool: str) -> None:
    backbone = residual_transformer(torch.rand(shape), 5, n_blocks=1, pool=pool)
    x = torch.rand(3, *shape)
    points = backbone.stem(x)
    z, cost = backbone.transport(points)
    assert torch.equal(z, points)
    assert torch.equal(cost, torch.zeros(3))
    assert backbone(x).shape == (3, 5)
    torch.testing.assert_close(backbone.stem.inverse(points), x, rtol=0, atol=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 8, 8), {}), ((2, 5, 7), {"patch": 3}), ((11,), {"patch": 4, "width": 8}), ((6,), {"pool": "mean"})],
)
def test_stem_is_an_isometry_of_the_stated_constant(shape: tuple[int, ...], options: dict) -> None:
    torch.manual_seed(0)
    backbone = stirred(residual_transformer(torch.rand(shape), 3, **options))
    values = torch.linalg.svdvals(stem_matrix(backbone, shape))
    torch.testing.assert_close(values, torch.full_like(values, float(backbone.stem.lipschitz)))  # type: ignore[arg-type]


def test_a_token_holds_one_patch() -> None:
    backbone = residual_transformer(torch.zeros(2, 6, 9), 3, patch=3, width=24)
    tokens = stem_matrix(backbone, (2, 6, 9)).reshape(1 + 2 * 3, 24, 2, 6, 9)
    assert (tokens[0] == 0).all()  # the class token sees nothing
    for token, (row, column) in enumerate([(r, c) for r in (0, 3) for c in (0, 3, 6)], start=1):
        seen = tokens[token].abs().amax(0)
        inside = torch.zeros_like(seen)
        inside[:, row : row + 3, column : column + 3] = 1
        assert torch.equal(seen, inside)


def test_head_is_linear_with_the_weights_it_states() -> None:
    torch.manual_seed(0)
    for pool in ("class_token", "mean"):
        backbone = stirred(residual_transformer(torch.rand(1, 8, 8), 4, pool=pool)).double()
        head, tokens = backbone.head, len(backbone.stem.position)  # type: ignore[arg-type]
        z = torch.randn(5, tokens * 64, dtype=torch.float64)
        assert isinstance(head, torch.nn.Linear)
        assert head.weight.shape == (4, tokens * 64) == (head.out_features, head.in_features)
        # By hand: pool the tokens, then the small linear map.
        pooled = z.reshape(5, tokens, 64)
        pooled = pooled[:, 0] if pool == "class_token" else pooled.mean(1)
        torch.testing.assert_close(head(z), pooled @ head.token_weight.T + head.bias)  # type: ignore[operator, union-attr]
        jacobian = torch.autograd.functional.jacobian(head, z[:1])
        torch.testing.assert_close(jacobian[0, :, 0], head.weight)  # type: ignore[index]


def test_published_setting_can_be_said() -> None:
    backbone = residual_transformer(torch.rand(3, 32, 32), 10, n_blocks=7, width=384, patch=4, heads=12)
    x = backbone.stem(torch.rand(2, 3, 32, 32))
    assert x.shape == (2, 24_960)
    assert len(backbone.blocks) == 14
    assert backbone.head.weight.shape == (10, 24_960)
    assert torch.equal(backbone.transport(x)[0], x)


def test_same_logits_in_every_batch() -> None:
    torch.manual_seed(0)
    backbone = stirred(residual_transformer(torch.rand(20), 3, patch=5, width=16, heads=2)).double()
    x = torch.rand(7, 20, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([backbone(row[None]) for row in x]), backbone(x), rtol=0, atol=1e-12)
    assert torch.equal(backbone(x), backbone(x))


def test_attention_is_softmax_of_scaled_products() -> None:
    """One branch against the formula, head by head."""
    torch.manual_seed(0)
    backbone = stirred(residual_transformer(torch.rand(12), 2, patch=3, width=8, heads=2)).double()
    branch, x = backbone.blocks[0], torch.randn(3, 5 * 8, dtype=torch.float64)
    t = x.reshape(3, 5, 8)
    scaled = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    q, k, v = (branch.qkv(scaled * branch.norm.weight + branch.norm.bias)).split(8, dim=2)  # type: ignore[operator, union-attr]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(2)
        heads.append(weights @ v[..., part])
    expected = (torch.cat(heads, 2) @ branch.out.weight.T + branch.out.bias).flatten(1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(branch(x), expected)


def test_derivative_agrees_with_differences() -> None:
    torch.manual_seed(0)
    backbone = stirred(residual_transformer(torch.rand(1, 4, 4), 3, patch=2, width=4, heads=2, n_blocks=2)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backbone, (x,), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((28, 28), {}, "images"),
        ((1, 8, 8), {"pool": "first"}, "pool must be one of"),
        ((1, 8, 8), {"width": 30}, "multiple of heads"),
        ((3, 8, 8), {"patch": 4, "width": 32}, "at least the 48 numbers"),
        ((1, 8, 8), {"heads": 0}, "heads must be at least 1"),
        ((1, 8, 8), {"patch": 0}, "patch must be at least 1"),
    ],
)
def test_what_cannot_be_built(shape: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_transformer(torch.zeros(shape), 3, **options)
