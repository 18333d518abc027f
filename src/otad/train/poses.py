"""Images in a few fixed poses, so that pieces need not learn each of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["USUAL_POSES", "Pose", "Poses"]


class Pose(NamedTuple):
    """An affine map of the plane.

    Attributes:
        slant: of the top to the right, as a share of the way from the middle.
        turn: radians, against the clock.
        wide: stretch along the rows.
        right: shift along the rows, in widths.
    """

    slant: float = 0.0
    turn: float = 0.0
    wide: float = 1.0
    right: float = 0.0

    def rows(self) -> list[list[float]]:
        """As `affine_grid` takes it: from places in the moved image to those it is taken from."""
        c, s = math.cos(self.turn), math.sin(self.turn)
        return [[c / self.wide, self.slant - s, -2 * self.right], [s / self.wide, c, 0.0]]


# What hands do to digits: in these a piece stands for nine, slanted, turned, stretched and shifted.
USUAL_POSES = (
    Pose(),
    Pose(slant=0.2),
    Pose(slant=-0.2),
    Pose(turn=0.12),
    Pose(turn=-0.12),
    Pose(wide=0.89),
    Pose(wide=1.12),
    Pose(right=0.025),
    Pose(right=-0.025),
)


class Poses(nn.Module):
    """Maps of points that stand for images less their mean: each image in other poses, black where it has nothing.

    Args:
        mean: the image at the origin, (channels, height, width), as `CenteredFlatten` has it.
        poses: the first of them ought to leave images as they are.
    """

    mean: Tensor
    grids: Tensor

    def __init__(self, mean: Float[Tensor, "channels height width"], poses: Sequence[Pose] = USUAL_POSES) -> None:
        super().__init__()
        self.count = len(poses)
        channels, height, width = mean.shape
        maps = torch.tensor([pose.rows() for pose in poses])
        maps[:, 0, 1] *= height / width
        maps[:, 1, 0] *= width / height
        self.register_buffer("mean", mean.clone())
        grids = functional.affine_grid(maps, [len(maps), channels, height, width], align_corners=False)
        self.register_buffer("grids", grids.to(mean))

    def forward(self, points: Float[Tensor, "n d"], pose: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Each point in the pose of that index, affine in the point; on a GPU gradients sum in no fixed order."""
        images = points.unflatten(1, self.mean.shape) + self.mean
        return (functional.grid_sample(images, self.grids[pose], align_corners=False) - self.mean).flatten(1)

    def every(self, points: Float[Tensor, "n d"]) -> Float[Tensor, "n_poses d"]:
        """The first point in every pose, then the second, and so on."""
        pose = torch.arange(self.count, device=points.device)
        return self(points.repeat_interleave(self.count, 0), pose.repeat(len(points)))
