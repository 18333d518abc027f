"""Embeddings that choose neighbours: inputs to coordinates in which near means alike."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otad.nn.backbone import CenteredFlatten

__all__ = ["OrthogonalEmbedding", "UnitEmbedding", "build_embedding", "residual_embedding"]

COORDINATES = 128


def build_embedding(kind: str, mean: Float[Tensor, "..."], width: int | None = None) -> nn.Module:
    """An untrained embedding: "learned" (`residual_embedding`) or "robust" (`OrthogonalEmbedding`).

    Args:
        kind: of the two.
        mean: training mean, in the shape of one sample.
        width: of the network; None for its default.
    """
    if kind == "learned":
        return residual_embedding(mean, width=width)
    return OrthogonalEmbedding(mean, width=width)


class UnitEmbedding(nn.Module):
    """A network whose outputs are scaled to norm 1: expressive, with no Lipschitz constant that is known.

    Args:
        mean: training mean, in the shape of one sample.
        layers: centred inputs to coordinates.
    """

    mean: Tensor
    lipschitz = None

    def __init__(self, mean: Float[Tensor, "..."], layers: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.layers = layers

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch e"]:
        return nn.functional.normalize(self.layers(x - self.mean), dim=1)


def residual_embedding(mean: Float[Tensor, "..."], *, width: int | None = None) -> UnitEmbedding:
    """A pre-activation ResNet for images, a perceptron for rows of a table; 128 coordinates of norm 1.

    Args:
        mean: training mean, in the shape of one sample: (c, h, w) is an image, anything else is flattened.
        width: channels of the first stage (published: 64; None: 8), or hidden units (None: 256).

    Source: He et al., arXiv 1603.05027; sizes of Gai, Wang, Zhang, arXiv 2408.00329.
    """
    if mean.ndim != 3:
        hidden = width or 256
        layers = [nn.Linear(mean.numel(), hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        return UnitEmbedding(mean, nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden, COORDINATES)))
    channels = width or 8
    sizes = [channels, channels, 2 * channels, 4 * channels]
    stages = [nn.Conv2d(mean.shape[0], channels, 3, padding=1, bias=False)]
    for stage, (a, b) in enumerate(itertools.pairwise(sizes)):
        stages += [_PreActivationBlock(a, b, stride=2 if stage else 1), _PreActivationBlock(b, b)]
    pooled = [nn.BatchNorm2d(sizes[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return UnitEmbedding(mean, nn.Sequential(*stages, *pooled, nn.Linear(sizes[-1], COORDINATES)))


class _PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3 x 3 convolutions; a 1 x 1 one around them where sizes change."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        )
        changes = stride != 1 or channels_in != channels
        self.around = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c2 h2 w2"]:
        active = self.first(x)
        return self.second(active) + (x if self.around is None else self.around(active))


class OrthogonalEmbedding(nn.Module):
    """Orthogonal linear layers with MaxMin between them: no step makes a distance longer.

    MaxMin (units in pairs, each pair sorted) permutes its inputs, hence is 1-Lipschitz. Outputs are not scaled to norm
    1, which would stretch short ones.

    Args:
        mean: training mean, in the shape of one sample.
        width: units of the two hidden layers, an even number; None: 256.

    Raises:
        ValueError: an odd width.

    Source: Anil, Lucas, Grosse, ICML 2019, arXiv 1811.05381.
    """

    def __init__(self, mean: Float[Tensor, "..."], *, width: int | None = None) -> None:
        super().__init__()
        width = width or 256
        if width % 2:
            raise ValueError(f"MaxMin takes units in pairs: width must be even; got {width}")
        self.flatten = CenteredFlatten(mean)
        sizes = [mean.numel(), width, width, COORDINATES]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for weight in self.weights:
            nn.init.orthogonal_(weight)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch e"]:
        e = self.layers[0](self.flatten(x))
        for layer in self.layers[1:]:
            a, b = e.chunk(2, dim=1)
            e = layer(torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1))
        return e

    @property
    def weights(self) -> list[Tensor]:
        """Of the linear layers, in the order they act."""
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    @property
    def lipschitz(self) -> float:
        """Product of the spectral norms, from the weights as they are; the excess covers the rounding of the norms."""
        norms = [torch.linalg.matrix_norm(weight.detach().double(), ord=2) for weight in self.weights]
        return math.prod(float(norm) for norm in norms) * (1 + 1e-9)

    @torch.no_grad()
    def orthogonalise(self) -> None:
        """Give each weight orthonormal rows, or columns where it has fewer; every step of training ends with this."""
        for weight in self.weights:
            wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
            triangle = torch.linalg.cholesky(wide @ wide.T)
            wide.copy_(torch.linalg.solve_triangular(triangle, wide, upper=False))
