"""Small random changes of training samples: deformations of images, noise on tables."""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

__all__ = ["Deformations", "Noise"]

BUMPS = 7  # control points of the elastic part, per side
MANY = 20_000  # images
SIDE = 28  # pixels of an image that moves by whole pixels do not tear apart


@dataclass(frozen=True)
class Deformations:
    """Shift, rotate, shear, stretch and bend images a little; what comes in from outside is black, or a reflection.

    Attributes:
        shift: pixels, at most, each way.
        rotation: radians, at most; also the shear.
        stretch: share, at most, of each side.
        bend: standard deviation of the control points' moves, in pixels.
        share: of the images, at most 1; the others stay as sharp as they are.
        mirrored: share of all images that are turned left to right; where it is not 0 they are taken for photographs,
            which go on beyond their sides as their reflection.
    """

    shift: float = 0.7
    rotation: float = 0.08
    stretch: float = 0.06
    bend: float = 0.3
    share: float = 1.0
    mirrored: float = 0.0

    @classmethod
    def usual(cls, images: Float[Tensor, "n channels height width"]) -> Self:
        """For cells: larger ones for few images, of which more is learned by heart; those in colour mirrored, too."""
        pixels = min(1.0, min(images.shape[2:]) / SIDE)
        mirrored = 0.5 if images.shape[1] == 3 else 0.0
        if len(images) < MANY:
            return cls(pixels, 0.12, 0.08, 0.4 * pixels, mirrored=mirrored)
        return cls(0.5 * pixels, 0.05, 0.04, 0.2 * pixels, mirrored=mirrored)

    @classmethod
    def gentle(cls, images: Float[Tensor, "n channels height width"]) -> Self:
        """For images that live by details which moving by parts of a pixel blurs: small ones, of half of the images."""
        pixels = min(1.0, min(images.shape[2:]) / SIDE)
        return cls(0.5 * pixels, 0.03, 0.02, 0.1 * pixels, share=0.5, mirrored=cls.usual(images).mirrored)

    def __call__(
        self, images: Float[Tensor, "n channels height width"], draws: torch.Generator
    ) -> Float[Tensor, "n channels height width"]:
        """Deformed copies.

        Args:
            images: in any range whose black is 0.
            draws: generator of the random numbers, on the CPU.
        """
        if self.mirrored:
            images = _some(self.mirrored, images.flip(3), images, draws)
        moved = self._moved(images, draws)
        return moved if self.share >= 1 else _some(self.share, moved, images, draws)

    def _moved(self, images: Tensor, draws: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        half = torch.tensor([width / 2, height / 2])  # pixels in half a side, which `grid_sample` counts as 1

        def uniform(most: float, *shape: int) -> Tensor:
            return (2 * torch.rand(n, *shape, generator=draws) - 1) * most

        angle, shear, side = uniform(self.rotation), uniform(self.rotation), 1 + uniform(self.stretch, 2)
        maps = torch.zeros(n, 2, 3)
        aspect = height / width
        maps[:, 0, 0], maps[:, 0, 1] = side[:, 0] * angle.cos(), (shear - side[:, 1] * angle.sin()) * aspect
        maps[:, 1, 0], maps[:, 1, 1] = side[:, 0] * angle.sin() / aspect, side[:, 1] * angle.cos()
        maps[:, :, 2] = uniform(self.shift, 2) / half
        grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
        moves = self.bend * torch.randn(n, 2, BUMPS, BUMPS, generator=draws) / half[:, None, None]
        moves = functional.interpolate(moves, size=(height, width), mode="bicubic", align_corners=True)
        grid = (grid + moves.permute(0, 2, 3, 1)).to(images)
        outside = "reflection" if self.mirrored else "zeros"
        return functional.grid_sample(images, grid, align_corners=False, padding_mode=outside)


@dataclass(frozen=True)
class Noise:
    """Normal noise on every value.

    Attributes:
        scale: standard deviation, in units of the samples.
    """

    scale: float

    def __call__(self, samples: Float[Tensor, "n ..."], draws: torch.Generator) -> Float[Tensor, "n ..."]:
        """Noisy copies; the numbers are drawn on the CPU."""
        return samples + self.scale * torch.randn(samples.shape, generator=draws).to(samples)


def _some(share: float, these: Tensor, others: Tensor, draws: torch.Generator) -> Tensor:
    """Each image from `these` with that probability, else from `others`."""
    chosen = torch.rand(len(these), generator=draws).to(these) < share
    return torch.where(chosen[:, None, None, None], these, others)
