"""Potentials of a neighbourhood by longest paths, and the smallest smoothness that admits them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.cip.adjoint import MEMORY, rows_at_once, through_products
from otad.cip.gram import InnerProducts, flat, inner_products, squared_distances
from otad.cip.regularity import Regularity
from otad.cip.solution import Solution, Status

__all__ = ["feasible_potentials", "smallest_smoothness"]

# A cycle counts as positive only beyond the rounding of the inner products that its weights are made of.
CYCLE_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def feasible_potentials(
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    regularity: Regularity,
    *,
    memory: int = MEMORY,
) -> Solution:
    """Values of one potential in F(l, L) that has gradient z_i at every x_i.

    The smallest phi >= 0 with phi_i - phi_j >= W_ij for all i, j (see `potential_gaps`): the weight of the longest path
    that ends in i, found by a max-plus closure. It exists exactly if no cycle has positive weight.

    Args:
        x_i: neighbours, in stem units.
        z_i: their features.
        regularity: the pair l < L.
        memory: bytes for the small problems solved together; the batch is worked on in chunks that keep to it.

    Returns:
        value: phi_i, shape (batch, k), in units of <x, z>, in the dtype of x_i; NaN in infeasible rows. Differentiable
            once in x_i, z_i, and in l and L where they are tensors: along the longest paths, where several are longest
            along one of them.
        status: INFEASIBLE where none exists; lower l, raise L, or use fewer neighbours.
        stats: "cycle", the weight of the heaviest cycle found, relative to the largest weight.

    Raises:
        ValueError: x_i and z_i differ in shape.

    Source: Taylor, Hendrickx, Glineur, Math. Program. 161 (2017), Theorem 4.
    """

    def solve(products: InnerProducts, l: float | Tensor, L: float | Tensor) -> tuple[None, None, tuple[Tensor, ...]]:
        found = potentials(products, l, L - l, x_i.dtype)
        return None, None, (found.value, found.status, found.stats["cycle"])

    value, status, cycle = through_products(
        solve, None, x_i, z_i, (regularity.l, regularity.L), distances=not flat(regularity.l), memory=memory
    )
    return Solution(value, status, {"cycle": cycle})


def potentials(products: InnerProducts, l: float | Tensor, M: float | Tensor, dtype: torch.dtype) -> Solution:
    """`feasible_potentials` from inner products already at hand."""
    gaps = products.gaps(l, M)
    with torch.no_grad():
        paths, cycle = _closure(gaps)
        cycle = _relative_cycle(cycle, gaps)
        feasible = cycle <= CYCLE_TOLERANCE[dtype]
        status = torch.where(feasible, int(Status.CONVERGED), int(Status.INFEASIBLE))
    value: Tensor = _LongestPaths.apply(gaps, paths.amax(2).clamp(min=0))  # type: ignore[assignment]
    value = torch.where(feasible[:, None], value, torch.nan)
    return Solution(value.to(dtype), status, {"cycle": cycle})


class _LongestPaths(torch.autograd.Function):
    """Weights u_i of longest paths; the derivative runs along the paths."""

    @staticmethod
    def forward(ctx: Any, gaps: Tensor, longest: Tensor) -> Tensor:
        ctx.save_for_backward(gaps, longest)
        return longest.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gaps, longest = ctx.saved_tensors
        before, turns = _path_tree(gaps, longest)
        total, of_gaps = grad.clone(), torch.zeros_like(gaps)
        # The last points of the paths first: each hands on what it and those behind it got.
        for turn in range(int(turns.max()), 0, -1):
            passed = torch.where(turns == turn, total, 0)
            of_gaps.scatter_add_(2, before[:, :, None], passed[:, :, None])
            total = total.scatter_add(1, before, passed)
        return of_gaps, None


def _path_tree(
    gaps: Float[Tensor, "batch k k"], longest: Float[Tensor, "batch k"]
) -> tuple[Int[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The point before i on a longest path, and the turn in which i was reached; 0 where paths start (u_i = 0).

    Grown from the starts, so that cycles of weight zero, which equal points make, do no harm.
    """
    k = longest.shape[1]
    tolerance = 1e-14 * gaps.abs().amax((1, 2))[:, None]
    turns = torch.where(longest <= 0, 0, -1)
    before = torch.zeros_like(turns)
    for turn in range(1, k):
        if (turns >= 0).all():
            break
        reached = torch.where(turns >= 0, longest, -torch.inf)
        best, source = (reached[:, None, :] + gaps).max(2)
        short = torch.where(turns >= 0, torch.inf, longest - best)
        fresh = (turns < 0) & (short <= short.amin(1, keepdim=True).clamp(min=0) + tolerance)
        turns, before = torch.where(fresh, turn, turns), torch.where(fresh, source, before)
    return before, turns.clamp(min=0)


def smallest_smoothness(
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    ratio: float = -1.0,
    rtol: float = 1e-8,
    *,
    memory: int = MEMORY,
) -> Float[Tensor, " batch"]:
    """Smallest L for which a potential in F(ratio * L, L) has gradient z_i at every x_i.

    Bisection on the cycle test; the classes F(ratio * L, L) grow with L because ratio <= 0.

    Args:
        x_i: neighbours, in stem units.
        z_i: their features.
        ratio: l / L, at most 0.
        rtol: relative accuracy of the answer, which is feasible itself.
        memory: bytes for the small problems solved together.

    Returns:
        L, shape (batch,), in units of z per x; 0 where all z_i are equal and ratio = 0 allows a flat map, inf where
        no L
        is enough (equal points with different features, or, for ratio = 0, features that are not cyclically monotone).

    Raises:
        ValueError: ratio > 0, or shapes that differ.
    """
    if ratio > 0:
        raise ValueError(f"ratio = l / L must be <= 0, where the classes F(ratio L, L) are nested; got {ratio}")
    with torch.no_grad():
        step = rows_at_once(x_i.shape[1], memory) if x_i.ndim == 3 and x_i.shape[1] else 1
        chunks = zip(x_i.split(step), z_i.split(step), strict=True)
        return torch.cat([smoothness_of(inner_products(None, x, z), ratio, x_i.dtype, rtol) for x, z in chunks])


def smoothness_of(
    products: InnerProducts, ratio: float, dtype: torch.dtype, rtol: float = 1e-8
) -> Float[Tensor, " batch"]:
    """`smallest_smoothness` from inner products already at hand."""
    tolerance = CYCLE_TOLERANCE[dtype]

    def feasible(smoothness: Tensor) -> Tensor:
        gaps = products.gaps(ratio * smoothness, (1 - ratio) * smoothness)
        return _relative_cycle(_closure(gaps)[1], gaps) <= tolerance

    lower, upper = _bracket(products, ratio, feasible, tolerance)
    while (open_rows := (upper - lower > rtol * upper) & upper.isfinite()).any():
        # Far apart the ends close in on a logarithmic scale, near each other on the plain one.
        middle = torch.where(upper > 4 * lower, (lower * upper).sqrt(), (lower + upper) / 2)
        good = feasible(middle)
        upper = torch.where(open_rows & good, middle, upper)
        lower = torch.where(open_rows & ~good, middle, lower)
    return upper.to(dtype)


def _bracket(
    products: InnerProducts, ratio: float, feasible: Callable[[Tensor], Tensor], tolerance: float
) -> tuple[Tensor, Tensor]:
    """A lower end that the pairs alone force (the quotients |dz|/|dx|) and a feasible upper end, 0 or inf."""
    assert products.dd is not None  # asked for by every caller
    moved, apart = squared_distances(products.zz), squared_distances(products.dd)
    together = apart <= tolerance * apart.amax((1, 2), keepdim=True)
    same = moved <= tolerance * moved.amax((1, 2), keepdim=True)
    flat = (moved == 0).all(2).all(1) & (ratio == 0)
    torn = (together & ~same).any(2).any(1)  # one point, two features: no smoothness is enough
    quotient = torch.where(together, 0, moved / apart.clamp(min=1e-300)).amax((1, 2)).sqrt() / max(1.0, -ratio)
    upper = quotient.clamp(min=1e-100)
    found = feasible(upper) | torn
    for _ in range(40):
        if found.all():
            break
        upper = torch.where(found, upper, upper * 4)
        found = found | feasible(upper)
    upper = torch.where(found & ~torn, upper, torch.inf)
    upper = torch.where(flat, 0, upper)
    return (quotient * (1 - 1e-6)).clamp(min=1e-100).minimum(upper), upper


def _closure(gaps: Float[Tensor, "batch k k"]) -> tuple[Float[Tensor, "batch k k"], Float[Tensor, " batch"]]:
    """Longest path weights from j to i (row i), and the heaviest cycle, by Floyd and Warshall's sweep.

    Paths of positive cycles grow at most threefold a step; they are cut at a large number so that nothing overflows.
    """
    paths = gaps
    cut = 1e3 * (gaps.detach().abs().amax((1, 2), keepdim=True) * gaps.shape[1] + 1e-300)
    for k in range(gaps.shape[1]):
        paths = torch.maximum(paths, paths[:, :, k : k + 1] + paths[:, k : k + 1, :]).minimum(cut)
    return paths, paths.diagonal(dim1=1, dim2=2).amax(1)


def _relative_cycle(cycle: Tensor, gaps: Tensor) -> Tensor:
    largest = gaps.abs().amax((1, 2))
    return torch.where(largest > 0, cycle / largest.clamp(min=1e-300), 0)
