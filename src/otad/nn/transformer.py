"""The Transformer as a residual trunk: attention and token-wise networks are steps of one transport in R^d."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from otad.nn.backbone import Backbone
from otad.nn.pixels import shuffle, unshuffle

__all__ = ["POOLS", "AttentionBranch", "TokenBranch", "TokenHead", "TokenStem", "residual_transformer"]

POOLS = ("class_token", "mean")
PATCHES_A_SIDE = 8
TOKENS_OF_A_TABLE = 64


def residual_transformer(
    mean: Float[Tensor, "..."],
    n_classes: int,
    *,
    n_blocks: int = 4,
    width: int | None = None,
    patch: int | None = None,
    heads: int = 4,
    hidden: int | None = None,
    pool: str = "class_token",
) -> Backbone:
    """A pre-LayerNorm Transformer whose trunk keeps the dimension d = tokens x width and starts as the identity.

    Every layer is two residual steps, attention and a network on each token, so m = 2 n_blocks. The head is linear on
    R^d, as certificates need it; the published head puts a LayerNorm before it, which makes margins non-linear.

    Args:
        mean: training mean of a sample: an image (channels, height, width) or a table row (features,).
        n_classes: outputs of the head.
        n_blocks: layers.
        width: coordinates of a token, a multiple of `heads`, at least the numbers in a patch; None takes 64 or more.
        patch: side of the square patches, or features a token in a table; None makes 8 patches a side (at least 2
            pixels each), or at most 64 tokens.
        heads: of the attention.
        hidden: units of the network on each token; 2 width where not given.
        pool: what the head reads: "class_token", a token without a patch, or the "mean" over the patches.

    Raises:
        ValueError: samples that are neither images nor rows, or an option out of its range.

    Source: Vaswani et al., NeurIPS 2017; Dosovitskiy et al., ICLR 2021. Published setting of OTAD-T on 3 x 32 x 32:
    n_blocks 7, width 384, patch 4, heads 12, class token: d = 65 x 384 = 24,960 (arXiv 2408.00329).
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}; got {pool!r}")
    if mean.ndim not in (1, 3):
        raise ValueError(
            "a Transformer needs images (channels, height, width) or table rows (features,); "
            f"got samples of shape {tuple(mean.shape)}"
        )
    patch = _patch(mean) if patch is None else patch
    sizes = {"patch": patch, "heads": heads, "hidden": 1 if hidden is None else hidden}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    numbers = patch if mean.ndim == 1 else mean.shape[0] * patch**2
    width = heads * math.ceil(max(64, numbers) / heads) if width is None else width
    if width < numbers or width % heads:
        raise ValueError(
            f"width must be a multiple of heads = {heads} and at least the {numbers} numbers in a patch, so that the "
            f"stem loses nothing; got {width}"
        )
    stem = TokenStem(mean, patch, width, class_token=pool == "class_token")
    blocks: list[nn.Module] = []
    for _ in range(n_blocks):
        blocks += [AttentionBranch(width, heads), TokenBranch(width, 2 * width if hidden is None else hidden)]
    tokens = len(stem.position)
    shares = torch.full((tokens,), 1 / tokens) if pool == "mean" else torch.eye(tokens)[0]
    return Backbone(stem, blocks, TokenHead(shares, width, n_classes))


def _patch(mean: Tensor) -> int:
    if mean.ndim == 1:
        return math.ceil(len(mean) / TOKENS_OF_A_TABLE)
    return max(2, math.ceil(max(mean.shape[1:]) / PATCHES_A_SIDE))


class TokenStem(nn.Module):
    """Stem that cuts a sample into tokens: an isometry, so radii after it are radii before it.

    The numbers of a patch are the first coordinates of its token, the rest is zero, and a trained position is added.
    A trained patch matrix could do two things more. It could rotate, which the linear layers of the first branches do
    as well. And it could shrink: the transport cost would fall with the square of the scale while the head grew by as
    much, with the same classifier and the same Lipschitz quotients. So it is held at scale one; positions, which
    only shift, are free.

    Args:
        mean: training mean, (channels, height, width) or (features,).
        patch: side of the patches in pixels, or features a token; where it does not divide, zeros are added.
        width: coordinates of a token.
        class_token: put a token without a patch first; its position is what is elsewhere called the class token.
    """

    mean: Tensor
    lipschitz = 1.0

    def __init__(self, mean: Float[Tensor, "..."], patch: int, width: int, *, class_token: bool) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.patch, self.width, self.class_token = patch, width, int(class_token)
        sides = mean.shape[-1:] if mean.ndim == 1 else mean.shape[1:]
        self.counts = [math.ceil(side / patch) for side in sides]
        # For `functional.pad`, last axis first.
        self.padding = [n for side, count in zip(sides, self.counts) for n in (count * patch - side, 0)][::-1]
        # Of length about 1, as a patch is: LayerNorm then sees both.
        tokens = self.class_token + math.prod(self.counts)
        self.position = nn.Parameter(torch.randn(tokens, width) / math.sqrt(width))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch d"]:
        padded = functional.pad(x - self.mean, self.padding)
        if self.mean.ndim == 1:
            tokens = padded.unflatten(1, (-1, self.patch))
        else:
            tokens = unshuffle(padded, self.patch).flatten(2).transpose(1, 2)
        tokens = functional.pad(tokens, [0, self.width - tokens.shape[2], self.class_token, 0])
        return (tokens + self.position).flatten(1)

    def inverse(self, points: Float[Tensor, "batch d"]) -> Float[Tensor, "batch ..."]:
        """The inputs of points."""
        tokens = (points.unflatten(1, (-1, self.width)) - self.position)[:, self.class_token :]
        if self.mean.ndim == 1:
            return tokens[:, :, : self.patch].flatten(1)[:, : len(self.mean)] + self.mean
        channels, height, width = self.mean.shape
        patches = tokens[:, :, : channels * self.patch**2].transpose(1, 2).unflatten(2, self.counts)
        return shuffle(patches, self.patch)[:, :, :height, :width] + self.mean


class AttentionBranch(nn.Module):
    """LayerNorm, multi-head attention and a linear layer that starts at zero, (batch, d) -> (batch, d).

    Args:
        width: coordinates of a token.
        heads: divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), _zero(width, width)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        tokens = self.norm(x.unflatten(1, (-1, self.width)))
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)  # (batch, heads, tokens, width / heads)
        return self.out(mixed.transpose(1, 2).flatten(2)).flatten(1)


class TokenBranch(nn.Module):
    """LayerNorm and a two-layer network on each token, the last layer zero at the start, (batch, d) -> (batch, d).

    Args:
        width: coordinates of a token.
        hidden: units.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), _zero(hidden, width))

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return self.layers(x.unflatten(1, (-1, self.width))).flatten(1)


def _zero(inputs: int, outputs: int) -> nn.Linear:
    """A layer that gives zero at first, so that the untrained trunk is the identity."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TokenHead(nn.Linear):
    """A linear head on a weighted mean of the tokens: a linear layer on R^d whose rows are w_j = shares x u_j.

    Args:
        shares: weight of each token.
        width: coordinates of a token.
        n_classes: outputs.
    """

    shares: Tensor

    def __init__(self, shares: Float[Tensor, " tokens"], width: int, n_classes: int) -> None:
        nn.Module.__init__(self)  # the parent would make its own d weights per class
        self.in_features, self.out_features = len(shares) * width, n_classes
        self.register_buffer("shares", shares)
        start = nn.Linear(width, n_classes)
        self.token_weight, self.bias = start.weight, start.bias

    @property
    def weight(self) -> Float[Tensor, "classes d"]:  # type: ignore[override]
        return (self.token_weight[:, None] * self.shares[:, None]).flatten(1)
