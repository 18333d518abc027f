"""Inner products of a neighbourhood: the only place where the problem sees the dimension d.

With delta_i = x - x_i everything that the convex integration problem needs is in three (k, k) matrices and one vector,
so the points are read once and all that follows costs k^2 or k^3 a query, whatever d is.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["InnerProducts", "check_points", "inner_products", "piece_rows"]

CACHE = 2**20  # bytes of x_i worked on at a time: what a core holds near itself
GPU_PIECE = 2**27  # the same on an accelerator, where only memory limits
# Centring afterwards may lose this factor of precision: then 1e-10 (float64) or 1e-6 (float32) is left.
LOSS = {torch.float64: 1e6, torch.float32: 16.0}


def per_row(value: float | Tensor, like: Tensor, axes: int) -> float | Tensor:
    """A bound, as a number or as (batch, 1, ..) with so many trailing axes."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.to(like).reshape(-1, *[1] * axes)


def flat(curvature: float | Tensor) -> bool:
    """Whether a bound is the number 0, for which distances between points do not matter."""
    return not isinstance(curvature, Tensor) and curvature == 0


@dataclass(frozen=True)
class InnerProducts:
    """Inner products in float64; z is centred, delta_i = origin - x_i.

    Attributes:
        zz: <zc_i, zc_j>.
        zd: <zc_i, delta_j>.
        dd: <delta_i, delta_j>, None where l = 0 leaves no use for it.
        tilt: <mean of z, delta_j>: what centring took from <z_i, delta_j>, the same for every i.
    """

    zz: Float[Tensor, "batch k k"]
    zd: Float[Tensor, "batch k k"]
    dd: Float[Tensor, "batch k k"] | None
    tilt: Float[Tensor, "batch k"]

    def gaps(self, l: float | Tensor, M: float | Tensor) -> Float[Tensor, "batch k k"]:
        """W_ij of `potential_gaps`."""
        l, M = per_row(l, self.zz, 2), per_row(M, self.zz, 2)
        zd = self.zd + self.tilt[:, None, :]  # <z_i, delta_j>
        # x_i - x_j = delta_j - delta_i
        rise = zd.diagonal(dim1=1, dim2=2)[:, None, :] - zd.transpose(1, 2)  # <z_j, x_i - x_j>
        gaps = rise + squared_distances(self.slopes(l)) / (2 * M)
        return gaps if self.dd is None else gaps + l / 2 * squared_distances(self.dd)

    def slopes(self, l: float | Tensor) -> Float[Tensor, "batch k k"]:
        """Gram matrix of p_i = z_i + l delta_i, the gradients at the origin of the lower bounds of the potential."""
        if self.dd is None:
            return self.zz
        l = per_row(l, self.zz, 2)
        return self.zz + l * (self.zd + self.zd.transpose(1, 2)) + l * l * self.dd

    def bounds(self, u_i: Float[Tensor, "batch k"], l: float | Tensor) -> Float[Tensor, "batch k"]:
        """Values at the origin of the lower bounds: u_i + <z_i, delta_i> + (l/2)|delta_i|^2."""
        l = per_row(l, self.zz, 1)
        rise = self.zd.diagonal(dim1=1, dim2=2) + self.tilt
        bounds = u_i + rise
        return bounds if self.dd is None else bounds + l / 2 * self.dd.diagonal(dim1=1, dim2=2)

    def rows(self, chosen: Bool[Tensor, " batch"]) -> "InnerProducts":
        """The products of some problems of the batch."""
        dd = None if self.dd is None else self.dd[chosen]
        return InnerProducts(self.zz[chosen], self.zd[chosen], dd, self.tilt[chosen])


def inner_products(
    x: Float[Tensor, "batch d"] | None,
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    distances: bool = True,
) -> InnerProducts:
    """Read a batch of neighbourhoods once.

    Products of the points as they are need no copies; where subtracting the origin and the mean afterwards would cost
    digits (points far from 0 and near each other), those rows are centred first.

    Args:
        x: the queries, taken as origins; None takes each neighbourhood's first point.
        x_i: neighbours.
        z_i: their features.
        distances: whether `dd` is wanted; potentials and the lower interpolant with l = 0 do without.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_points(x, x_i, z_i)
    origin = x_i[:, 0] if x is None else x
    plain, digits_left = _plain(origin, x_i, z_i, distances)
    if bool(digits_left.all()):
        return plain
    far = (~digits_left).nonzero().squeeze(1)
    pieces = [_centered(origin[part], x_i[part], z_i[part], distances) for part in far.split(piece_rows(x_i))]
    rows = (far,)
    centered = InnerProducts(
        zz=torch.cat([piece.zz for piece in pieces]),
        zd=torch.cat([piece.zd for piece in pieces]),
        dd=torch.cat([piece.dd for piece in pieces if piece.dd is not None]) if distances else None,
        tilt=torch.cat([piece.tilt for piece in pieces]),
    )
    return InnerProducts(
        zz=plain.zz.index_put(rows, centered.zz),
        zd=plain.zd.index_put(rows, centered.zd),
        dd=None if plain.dd is None or centered.dd is None else plain.dd.index_put(rows, centered.dd),
        tilt=plain.tilt.index_put(rows, centered.tilt),
    )


def check_points(x: Tensor | None, x_i: Tensor, z_i: Tensor) -> None:
    """Raises ValueError where the shapes of a batch of neighbourhoods do not fit."""
    if x_i.ndim != 3 or x_i.shape != z_i.shape or x_i.shape[1] == 0:
        raise ValueError(
            f"x_i and z_i must both be (batch, k, d) with k >= 1; got {tuple(x_i.shape)} and {tuple(z_i.shape)}"
        )
    if x is not None and x.shape != (x_i.shape[0], x_i.shape[2]):
        raise ValueError(f"x must be (batch, d) = {(x_i.shape[0], x_i.shape[2])}; got {tuple(x.shape)}")


def piece_rows(x_i: Float[Tensor, "batch k d"]) -> int:
    """Neighbourhoods to work on at a time so that they are read from memory once."""
    bytes_a_row = x_i.shape[1] * x_i.shape[2] * x_i.element_size()
    return max(1, (GPU_PIECE if x_i.is_cuda else CACHE) // max(1, bytes_a_row))


def _plain(origin: Tensor, x_i: Tensor, z_i: Tensor, distances: bool) -> tuple[InnerProducts, Bool[Tensor, " batch"]]:
    """The products, and the rows in which centring afterwards has not cost too many digits."""
    zz, zx, xx = _raw(x_i, z_i, distances)
    zq = (z_i @ origin[:, :, None]).squeeze(2).double()
    xq = (x_i @ origin[:, :, None]).squeeze(2).double()
    qq = origin.double().square().sum(1)
    x_squares = xx if xx.ndim == 2 else xx.diagonal(dim1=1, dim2=2)
    zd = zq[:, :, None] - zx
    tilt = zd.mean(1)
    rows = zz.mean(2)
    centered = zz - rows[:, :, None] - rows[:, None, :] + rows.mean(1)[:, None, None]
    dd = qq[:, None, None] - xq[:, :, None] - xq[:, None, :] + xx if distances else None
    with torch.no_grad():
        z_size, z_spread = (m.diagonal(dim1=1, dim2=2).amax(1) for m in (zz, centered))
        x_size = torch.maximum(x_squares.amax(1), qq)
        x_spread = (qq[:, None] - 2 * xq + x_squares).amax(1)
        limit = LOSS[x_i.dtype]
        good = (z_size <= limit * z_spread) & (x_size <= limit * x_spread)
    return InnerProducts(centered, zd - tilt[:, None, :], dd, tilt), good


def _raw(x_i: Tensor, z_i: Tensor, distances: bool) -> tuple[Tensor, Tensor, Tensor]:
    """<z_i, z_j>, <z_i, x_j>, and <x_i, x_j> or its diagonal, in pieces small enough to be read from memory once."""
    tracked = torch.is_grad_enabled() and (x_i.requires_grad or z_i.requires_grad)
    rows = max(1, len(x_i)) if tracked or x_i.is_cuda else piece_rows(x_i)
    parts = []
    for x, z in zip(x_i.split(rows), z_i.split(rows), strict=True):
        z_t, x_t = z.transpose(1, 2), x.transpose(1, 2)
        squares = x @ x_t if distances else torch.linalg.vector_norm(x, dim=2).square()
        parts.append((z @ z_t, z @ x_t, squares))
    zz, zx, xx = (torch.cat([part[i] for part in parts]).double() for i in range(3))
    return zz, zx, xx


def _centered(origin: Tensor, x_i: Tensor, z_i: Tensor, distances: bool) -> InnerProducts:
    delta = origin[:, None] - x_i
    mean = z_i.mean(1, keepdim=True)
    centered = z_i - mean
    return InnerProducts(
        zz=(centered @ centered.transpose(1, 2)).double(),
        zd=(centered @ delta.transpose(1, 2)).double(),
        dd=(delta @ delta.transpose(1, 2)).double() if distances else None,
        tilt=(delta @ mean.transpose(1, 2)).squeeze(2).double(),
    )


def squared_distances(gram: Float[Tensor, "batch k k"]) -> Float[Tensor, "batch k k"]:
    """|a_i - a_j|^2 from <a_i, a_j>, never negative."""
    square = gram.diagonal(dim1=1, dim2=2)
    return (square[:, :, None] + square[:, None, :] - 2 * gram).clamp(min=0)
