"""Pixel-unshuffle and back: the pixels of each square of an image become channels of one pixel.

Torch's functions of these names return a batch of no images as it is, in its old shape.
"""

from jaxtyping import Float
from torch import Tensor

__all__ = ["shuffle", "unshuffle"]


def unshuffle(image: Float[Tensor, "batch c h w"], side: int) -> Float[Tensor, "batch channels rows columns"]:
    """(batch, c, h, w) to (batch, c side^2, h / side, w / side)."""
    squares = image.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (batch, c, rows, side, columns, side)
    return squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def shuffle(image: Float[Tensor, "batch channels rows columns"], side: int) -> Float[Tensor, "batch c h w"]:
    """The way back."""
    squares = image.unflatten(1, (-1, side, side))  # (batch, c, side, side, rows, columns)
    return squares.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
