"""The whole convex integration problem of a neighbourhood, with its points read once."""

import torch
from jaxtyping import Float
from torch import Tensor

from otad.cip.adjoint import MEMORY, through_products
from otad.cip.gram import InnerProducts
from otad.cip.interpolation import Branch, Small, feature, needs_distances, weights_and_facts
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
    *,
    memory: int = MEMORY,
) -> Solution:
    """`feasible_potentials` and `interpolate` in one: the feature of each query from its neighbours.

    Differentiable once in x, x_i, z_i, and in l and L where they are tensors; potentials follow the points they come
    from.

    Args:
        x: queries, in stem units.
        x_i: neighbours.
        z_i: their features.
        regularity: the pair l < L.
        branch: "lower", "upper" or "mean".
        memory: bytes for the small problems solved together; the batch is worked on in chunks that keep to it. Beside
            it there are only the results, and what the adjoint keeps where gradients are wanted.

    Returns:
        As `interpolate`, with the potentials in `stats["potentials"]` (batch, k); INFEASIBLE rows are NaN.

    Raises:
        ValueError: shapes that do not fit, or an unknown branch.

    Source: as `feasible_potentials` and `interpolate`.
    """

    def solve(products: InnerProducts, l: float | Tensor, L: float | Tensor) -> Small:
        u_i = potentials(products, l, L - l, x_i.dtype)
        weights, pull, facts = weights_and_facts(products, u_i.value, l, L, branch)
        return weights, pull, (torch.maximum(facts[0], u_i.status), *facts[1:], u_i.value)

    *found, u_i = through_products(
        solve,
        x,
        x_i,
        z_i,
        (regularity.l, regularity.L),
        distances=needs_distances(regularity, branch),
        memory=memory,
    )
    solution = feature(x, found[0], tuple(found[1:]), regularity, branch)
    return Solution(solution.value, solution.status, solution.stats | {"potentials": u_i})
