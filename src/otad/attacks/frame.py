"""Samples of any shape as images in [0, 1], the form in which attacks from packages want them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from otad.attacks.threat_model import ThreatModel

__all__ = ["Frame", "Framed"]


@dataclass(frozen=True)
class Frame:
    """How samples become images in [0, 1] and back: u = (x - low) / width, padded where needed."""

    shape: tuple[int, ...]  # of one sample
    layout: tuple[int, int, int]  # before padding
    padded: tuple[int, int, int]
    low: float
    width: float

    @staticmethod
    def around(x: Tensor, threat: ThreatModel, *, pad: bool = True) -> "Frame":
        """The frame of these samples; `pad` for AutoAttack, whose Square needs images that its tiles fit."""
        shape = tuple(x.shape[1:])
        if threat.box is not None:
            low, high = threat.box
        else:
            # Wide enough that clamping to [0, 1] never holds back a point of the budget, nor FAB's steps
            # beyond it.
            low, high = float(x.min()) - 4 * threat.eps, float(x.max()) + 4 * threat.eps
        if len(shape) == 3:
            layout = (shape[0], shape[1], shape[2])
            padded = layout if not pad or threat.norm == "linf" or _tiles(layout) else _padded(layout)
        else:
            d = math.prod(shape)
            # Square lays its first guess for L2 in fifths of the height: five rows always come out even.
            rows = 5 if pad and threat.norm == "l2" else 1
            layout = (1, 1, d)
            padded = (1, rows, math.ceil(d / rows))
        return Frame(shape, layout, padded, low, high - low)

    def pack(self, x: Tensor) -> Tensor:
        u = ((x - self.low) / self.width).clamp(0.0, 1.0)
        if self.padded == self.layout:
            return u.reshape(len(x), *self.padded).float()
        if len(self.shape) == 3:
            right, below = self.padded[2] - self.layout[2], self.padded[1] - self.layout[1]
            return nn.functional.pad(u, (0, right, 0, below), value=0.5).float()
        extra = math.prod(self.padded) - math.prod(self.layout)
        return nn.functional.pad(u.flatten(1), (0, extra), value=0.5).reshape(len(x), *self.padded).float()

    def unpack(self, u: Tensor) -> Tensor:
        if len(self.shape) == 3:
            u = u[:, :, : self.layout[1], : self.layout[2]]
        else:
            u = u.flatten(1)[:, : math.prod(self.layout)]
        return self.low + self.width * u.reshape(len(u), *self.shape)


class Framed(nn.Module):
    """The model as AutoAttack wants it: images in [0, 1] -> fresh logits (Square writes into them)."""

    def __init__(self, model: nn.Module, frame: Frame, n_classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.frame = frame
        self.n_classes = n_classes
        self.dtype = dtype

    def forward(self, u: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        if len(u) == 0:
            return u.new_zeros(0, self.n_classes)
        return self.model(self.frame.unpack(u).to(self.dtype)).float().clone()


def _tiles(layout: tuple[int, int, int]) -> bool:
    """Whether Square's first guess for L2, tiles of a fifth of the height, stays inside such an image."""
    tile = layout[1] // 5
    first = (layout[1] - 5 * tile) // 2
    return tile >= 1 and all(tile == 1 or first + tile * (side // tile) <= side for side in layout[1:])


def _padded(layout: tuple[int, int, int]) -> tuple[int, int, int]:
    side = 5 * math.ceil(max(layout[1:]) / 5)
    return layout[0], side, side
