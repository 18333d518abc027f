"""Inner products of a neighbourhood: the only place where the problem sees the dimension d.

With delta_i = x - x_i everything that the convex integration problem needs is in three (k, k) matrices and one vector,
so the points are read once and all that follows costs k^2 or k^3 a query, whatever d is.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["InnerProducts", "inner_products"]


def per_row(value: float | Tensor, like: Tensor, axes: int) -> float | Tensor:
    """A bound, as a number or as (batch, 1, ..) with so many trailing axes."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.to(like).reshape(-1, *[1] * axes)


@dataclass(frozen=True)
class InnerProducts:
    """Inner products in float64; z is centred, delta_i = origin - x_i.

    Attributes:
        zz: <zc_i, zc_j>.
        zd: <zc_i, delta_j>.
        dd: <delta_i, delta_j>.
        tilt: <mean of z, delta_j>: what centring took from <z_i, delta_j>, the same for every i.
    """

    zz: Float[Tensor, "batch k k"]
    zd: Float[Tensor, "batch k k"]
    dd: Float[Tensor, "batch k k"]
    tilt: Float[Tensor, "batch k"]

    def gaps(self, l: float | Tensor, M: float | Tensor) -> Float[Tensor, "batch k k"]:
        """W_ij of `potential_gaps`."""
        l, M = per_row(l, self.zz, 2), per_row(M, self.zz, 2)
        zd = self.zd + self.tilt[:, None, :]  # <z_i, delta_j>
        # x_i - x_j = delta_j - delta_i
        rise = zd.diagonal(dim1=1, dim2=2)[:, None, :] - zd.transpose(1, 2)  # <z_j, x_i - x_j>
        distance = squared_distances(self.dd)
        return rise + l / 2 * distance + squared_distances(self.slopes(l)) / (2 * M)

    def slopes(self, l: float | Tensor) -> Float[Tensor, "batch k k"]:
        """Gram matrix of p_i = z_i + l delta_i, the gradients at the origin of the lower bounds of the potential."""
        l = per_row(l, self.zz, 2)
        return self.zz + l * (self.zd + self.zd.transpose(1, 2)) + l * l * self.dd

    def bounds(self, u_i: Float[Tensor, "batch k"], l: float | Tensor) -> Float[Tensor, "batch k"]:
        """Values at the origin of the lower bounds: u_i + <z_i, delta_i> + (l/2)|delta_i|^2."""
        l = per_row(l, self.zz, 1)
        rise = self.zd.diagonal(dim1=1, dim2=2) + self.tilt
        return u_i + rise + l / 2 * self.dd.diagonal(dim1=1, dim2=2)


def inner_products(
    x: Float[Tensor, "batch d"] | None, x_i: Float[Tensor, "batch k d"], z_i: Float[Tensor, "batch k d"]
) -> InnerProducts:
    """Read a batch of neighbourhoods once.

    Args:
        x: the queries, taken as origins; None takes each neighbourhood's first point.
        x_i: neighbours.
        z_i: their features.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x_i.ndim != 3 or x_i.shape != z_i.shape or x_i.shape[1] == 0:
        raise ValueError(
            f"x_i and z_i must both be (batch, k, d) with k >= 1; got {tuple(x_i.shape)} and {tuple(z_i.shape)}"
        )
    if x is not None and x.shape != (x_i.shape[0], x_i.shape[2]):
        raise ValueError(f"x must be (batch, d) = {(x_i.shape[0], x_i.shape[2])}; got {tuple(x.shape)}")
    origin = x_i[:, 0] if x is None else x
    delta = origin[:, None] - x_i
    mean = z_i.mean(1, keepdim=True)
    centered = z_i - mean
    return InnerProducts(
        zz=_gram(centered, centered),
        zd=_gram(centered, delta),
        dd=_gram(delta, delta),
        tilt=(delta @ mean.transpose(1, 2)).squeeze(2).double(),
    )


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).double()


def squared_distances(gram: Float[Tensor, "batch k k"]) -> Float[Tensor, "batch k k"]:
    """|a_i - a_j|^2 from <a_i, a_j>, never negative."""
    square = gram.diagonal(dim1=1, dim2=2)
    return (square[:, :, None] + square[:, None, :] - 2 * gram).clamp(min=0)
