"""1-Lipschitz encoders under potentials and cells: linear layers with orthonormal rows, each followed by MaxMin."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["EncodedStem", "MaxMinEncoder", "dense_encoders", "patch_encoders"]

SIDE = 2  # pixels of a patch, each way
LEAST_SIDE = 4  # of an image that is not halved any more
MOST_CHANNELS = 512
LEAST_UNITS = 128  # of a dense encoder, where it is to have so many
LAYERS = {1: 3, 2: 2}  # that keep the scale, by how often the image is halved


class MaxMinEncoder(nn.Module):
    """x -> MaxMin(Q x + b), Q with orthonormal rows, or columns where width > d, by the Cayley transform.

    Q is orthonormal at every step of a gradient descent, up to rounding; `lipschitz` is exact.

    Args:
        d: dimension of x.
        width: units; even, as MaxMin sorts them in pairs.

    Raises:
        ValueError: width is odd.

    Source: Trockman, Kolter, ICLR 2021, arXiv 2104.07167; Anil, Lucas, Grosse, ICML 2019, arXiv 1811.05381.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        if width % 2 or width < 2:
            raise ValueError(f"width must be even and at least 2; got {width}")
        tall, narrow = max(d, width), min(d, width)
        self.wide = width > d
        self.free: nn.Parameter | None = nn.Parameter(torch.randn(tall, narrow) / tall**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("settled", None)

    def settle(self) -> None:
        """Keep Q as it is, the layer to be trained no more: the same numbers in every precision, no inverse at a call.

        `OTAD` does so with all of its stem. Then `settled` is in the state instead of `free`.
        """
        if self.free is not None:
            self.settled = self._orthonormal(self.free.detach().double()).to(self.free)
            self.free = None
            self.bias.requires_grad_(False)

    def lift(self, basis: Float[Tensor, "whole d"]) -> None:
        """Settle, and take from now on points whose coordinates in this orthonormal basis were taken before."""
        self.settle()
        self.settled = (self.weight.double() @ basis.double().T).to(self.weight)

    @property
    def weight(self) -> Float[Tensor, "width d"]:
        """Q."""
        if self.free is None:
            return self.settled
        with torch.autocast(self.free.device.type, enabled=False):
            return self._orthonormal(self.free)

    def _orthonormal(self, free: Float[Tensor, "tall narrow"]) -> Float[Tensor, "width d"]:
        """Of free = (U, V), A = U - U' + V'V, it is ((I + A)^-1 (I - A), -2 V (I + A)^-1)'."""
        U, V = free.split([free.shape[1], len(free) - free.shape[1]])
        A = U - U.T + V.T @ V
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        inverse = torch.linalg.inv(identity + A)
        columns = torch.cat([inverse @ (identity - A), -2 * V @ inverse])
        return columns if self.wide else columns.T

    @property
    def lipschitz(self) -> float:
        """The largest singular value of Q, in float64, with an allowance for its own rounding."""
        weight = self.weight.detach().double()
        return float(torch.linalg.matrix_norm(weight, ord=2)) * (1 + 1e-9)

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch width"]:
        a, b = nn.functional.linear(x, self.weight, self.bias).chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class PatchEncoder(nn.Module):
    """x -> MaxMin(Q x + b) on each patch of 2 x 2 pixels, with the same Q and b.

    The image is moved by a pixel down and right first, and what leaves comes in again, so that patches overlap those of
    the layer before and not each other: as a map of images it has the Lipschitz constant of Q.

    Args:
        image: height, width (both even) and channels of its points (batch, height * width * channels).
        width: units of a patch; even, and a multiple of 8 where they become pixels again.
        halve: each patch becomes a pixel of `width` channels; else its units become its pixels again, `width` / 4
            channels each, both units of a pair of MaxMin in the same pixel.

    Raises:
        ValueError: sides or width that do not fit.

    Source: orthogonal convolutions from patches, as in Li et al., NeurIPS 2019, arXiv 1911.00937.
    """

    def __init__(self, image: tuple[int, int, int], width: int, *, halve: bool = False) -> None:
        super().__init__()
        if any(side % SIDE for side in image[:2]) or (not halve and width % (2 * SIDE**2)):
            raise ValueError(f"patches of {SIDE} x {SIDE} pixels fit neither image {image} nor width {width}")
        self.image, self.halve = image, halve
        self.encoder = MaxMinEncoder(SIDE * SIDE * image[2], width)

    @property
    def lipschitz(self) -> float:
        return self.encoder.lipschitz

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch units"]:
        pixels = x.unflatten(1, self.image).roll((1, 1), (1, 2))
        patches = pixels.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE)).transpose(2, 3).contiguous()
        units = self.encoder(patches.flatten(3).flatten(0, 2)).unflatten(0, patches.shape[:3])
        if not self.halve:
            units = units.unflatten(3, (2, SIDE, SIDE, -1)).permute(0, 1, 4, 2, 5, 3, 6)
        return units.flatten(1)


class ChannelsLast(nn.Module):
    """Points of images (channels, height, width) to those of (height, width, channels); an isometry."""

    lipschitz = 1.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return x.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1)


def dense_encoders(d: int, layers: int = 3, units: int = 256, *, components: int | None = None) -> list[nn.Module]:
    """Of points in R^d: orthogonal layers of so many units, of 2d or 128 where that is less.

    Args:
        d: of the points.
        layers: one after the other.
        units: of each.
        components: coordinates of the points that the first layer takes, see `MaxMinEncoder.lift`; None: all.
    """
    width = min(units, max(LEAST_UNITS, 2 * d))
    return [MaxMinEncoder(width if layer else components or d, width) for layer in range(layers)]


def patch_encoders(shape: tuple[int, int, int], channels: int = 32, units: int = 256) -> list[nn.Module]:
    """Of images: orthogonal layers on patches while both sides are even and above 4, then one on all that is left.

    Each halving but the first makes up to four times as many channels, twice as many where it leaves a side of 4 or
    less, and never more than 512.

    Args:
        shape: channels, height, width.
        channels: after the first halving; even.
        units: of the last layer, at most.
    """
    c, height, width = shape
    encoders: list[nn.Module] = [ChannelsLast(c)]
    scale = 0
    while height % SIDE == width % SIDE == 0 and min(height, width) > LEAST_SIDE:
        image = height, width, c
        encoders += [PatchEncoder(image, SIDE * SIDE * c) for _ in range(LAYERS.get(scale, 0))]
        growth = 4 if min(height, width) > 2 * LEAST_SIDE else 2
        wide = channels if scale == 0 else min(growth * c, MOST_CHANNELS)
        encoders.append(PatchEncoder(image, wide, halve=True))
        c, height, width, scale = wide, height // SIDE, width // SIDE, scale + 1
    return [*encoders, *dense_encoders(c * height * width, 1, units)]


class EncodedStem(nn.Module):
    """A stem and encoders on it: inputs to points, with a Lipschitz constant.

    Args:
        stem: inputs to points, with `stem.lipschitz`.
        encoders: one after the other; each takes and gives (batch, d), with its Lipschitz constant.
    """

    def __init__(self, stem: nn.Module, *encoders: nn.Module) -> None:
        super().__init__()
        self.stem, self.encoders = stem, nn.ModuleList(encoders)

    @property
    def lipschitz(self) -> float:
        """At most that of the whole: the product of its parts'."""
        constant = float(self.stem.lipschitz)  # type: ignore[arg-type]
        for encoder in self.encoders:
            constant *= float(encoder.lipschitz)  # type: ignore[arg-type]
        return constant

    def settle(self) -> None:
        """See `MaxMinEncoder.settle`."""
        for part in self.encoders.modules():
            if isinstance(part, MaxMinEncoder):
                part.settle()

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch d"]:
        return self.encoded(self.stem(x))

    def encoded(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch width"]:
        """Points of the inner stem to those of this one."""
        for encoder in self.encoders:
            x = encoder(x)
        return x
