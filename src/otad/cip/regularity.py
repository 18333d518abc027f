"""The curvature bounds of a potential and the pair inequalities that they imply."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from otad.cip.gram import flat, inner_products

__all__ = ["Regularity", "potential_gaps"]


@dataclass(frozen=True)
class Regularity:
    """Bounds on the Hessian of a potential: l <= Hessian <= L.

    Attributes:
        l: lower curvature; negative where the potential need not be convex. A number, or one per row (batch,).
        L: upper curvature (smoothness). A number, or one per row (batch,).

    Raises:
        ValueError: not l < L, L <= 0, or a bound that is not finite.
    """

    l: float | Tensor
    L: float | Tensor

    def __post_init__(self) -> None:
        l, L = (torch.as_tensor(bound, dtype=torch.float64) for bound in (self.l, self.L))
        if not (torch.isfinite(l).all() and torch.isfinite(L).all() and (l < L).all() and (L > 0).all()):
            raise ValueError(f"Regularity needs finite l < L and L > 0; got l = {self.l}, L = {self.L}")

    @property
    def curvature_range(self) -> float | Tensor:
        """M = L - l, the smoothness of the shifted, convex potential."""
        return self.L - self.l

    @property
    def lipschitz(self) -> float | Tensor:
        """max(|l|, L): the Lipschitz constant of the gradient."""
        if isinstance(self.l, Tensor) or isinstance(self.L, Tensor):
            return torch.maximum(torch.as_tensor(self.l).abs(), torch.as_tensor(self.L))
        return max(abs(self.l), self.L)


def potential_gaps(
    x_i: Float[Tensor, "batch k d"], z_i: Float[Tensor, "batch k d"], regularity: Regularity
) -> Float[Tensor, "batch k k"]:
    """Least allowed differences W_ij <= phi_i - phi_j of a potential in F(l, L) with gradients z_i at x_i.

    W_ij = <z_j, x_i - x_j> + (l/2)|x_i - x_j|^2 + |(z_i - z_j) - l (x_i - x_j)|^2 / (2 (L - l)),
    which is the theorem's inequality with the terms sorted; it does not change when x or z is shifted.

    Args:
        x_i: points, in stem units.
        z_i: their features.
        regularity: the pair l < L.

    Returns:
        W, shape (batch, k, k), float64, in units of <x, z>.

    Raises:
        ValueError: x_i and z_i differ in shape, or are not (batch, k, d).

    Source: Taylor, Hendrickx, Glineur, Math. Program. 161 (2017), Theorem 4; for l < 0 Rotaru, Glineur,
    Patrinos (2022).
    """
    return inner_products(None, x_i, z_i, distances=not flat(regularity.l)).gaps(
        regularity.l, regularity.curvature_range
    )
