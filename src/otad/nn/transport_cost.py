"""The kinetic energy of the path that a residual trunk moves its inputs along."""

from jaxtyping import Float
from torch import Tensor

__all__ = ["block_cost", "transport_cost"]


def transport_cost(residuals: list[Float[Tensor, "batch d"]]) -> Float[Tensor, " batch"]:
    """M * sum_t |h_t(x_t)|^2 per sample, in squared stem units.

    For m blocks this is the energy of m steps of length |h_t| taken in unit time: at least |z - x|^2, with equality
    on a straight path at constant speed.

    Args:
        residuals: what each of the m blocks added.

    Source: Benamou and Brenier, Numer. Math. 84 (2000); Gai, Wang, Zhang, arXiv 2408.00329, Section 3.
    """
    return sum(block_cost(residual, len(residuals)) for residual in residuals)  # type: ignore[return-value]


def block_cost(residual: Float[Tensor, "batch d"], m: int) -> Float[Tensor, " batch"]:
    """M * |h_t(x_t)|^2 per sample: the part of one of m blocks, in squared stem units.

    Args:
        residual: what the block added.
        m: blocks of the trunk.
    """
    return m * residual.square().flatten(1).sum(1)
