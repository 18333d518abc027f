"""The whole convex integration problem of a neighbourhood, with its points read once."""

import torch
from jaxtyping import Float
from torch import Tensor

from otad.cip.gram import flat, inner_products
from otad.cip.interpolation import Branch, interpolant
from otad.cip.potentials import potentials
from otad.cip.regularity import Regularity
from otad.cip.solution import Solution

__all__ = ["interpolate_neighborhood"]


def interpolate_neighborhood(
    x: Float[Tensor, "batch d"],
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    regularity: Regularity,
    branch: Branch = "lower",
) -> Solution:
    """`feasible_potentials` and `interpolate` in one: the feature of each query from its neighbours.

    Differentiable in x, x_i, z_i; potentials follow the points they come from.

    Args:
        x: queries, in stem units.
        x_i: neighbours.
        z_i: their features.
        regularity: the pair l < L.
        branch: "lower", "upper" or "mean".

    Returns:
        As `interpolate`, with the potentials in `stats["potentials"]` (batch, k); INFEASIBLE rows are NaN.

    Raises:
        ValueError: shapes that do not fit, or an unknown branch.

    Source: as `feasible_potentials` and `interpolate`.
    """
    products = inner_products(x, x_i, z_i, distances=branch != "lower" or not flat(regularity.l))
    u_i = potentials(products, regularity.l, regularity.curvature_range, x_i.dtype)
    solution = interpolant(products, x, x_i, z_i, u_i.value, regularity, branch)
    status = torch.maximum(solution.status, u_i.status)
    return Solution(solution.value, status, solution.stats | {"potentials": u_i.value})
