"""The transport map at new points: the gradient of the extreme potentials that fit the neighbours."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from otad.cip.gram import InnerProducts, flat, inner_products, per_row
from otad.cip.regularity import Regularity
from otad.cip.simplex_qp import SimplexOptimum, solve_simplex_qp
from otad.cip.solution import Solution, Status

__all__ = ["BRANCHES", "Branch", "interpolate"]

Branch = Literal["lower", "upper", "mean"]
BRANCHES = ("lower", "upper", "mean")


def interpolate(
    x: Float[Tensor, "batch d"],
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    u_i: Float[Tensor, "batch k"],
    regularity: Regularity,
    branch: Branch = "lower",
) -> Solution:
    """Gradient at x of the smallest ("lower") or largest ("upper") potential in F(l, L) with values u_i and
    gradients z_i.

    The lower one is the Moreau envelope of a maximum of affine functions, the upper one is minus the lower
    interpolant of -phi with (l, L) -> (-L, -l), and "mean" is half their sum; each interpolates, and its gradient is
    max(|l|, L)-Lipschitz in x.

    Args:
        x: queries, in stem units.
        x_i: neighbours.
        z_i: their features.
        u_i: their potentials, from `feasible_potentials`.
        regularity: the pair l < L that u_i is feasible for.
        branch: "lower", "upper" or "mean".

    Returns:
        value: features z(x), shape (batch, d), in the dtype of x; differentiable in every argument, with
            dz/dx = l I + (L - l) P, P the projector onto the differences of the active p_i = z_i + l (x - x_i) (lower).
        status: CONVERGED, MAX_STEPS, or INFEASIBLE in rows whose u_i are not finite.
        stats: "value" phi(x); "weights" (batch, k) of the neighbours, summing to 1; "gap", the duality gap, and
            "feature_error", the error of z that it allows, at most sqrt(2 (L - l) gap); "residual", the gap relative
            to the programme's scale; "steps".

    Raises:
        ValueError: an unknown branch, or shapes that do not fit.

    Source: Taylor, Hendrickx, Glineur (2017), Theorem 4; Taylor (2017), Section 3.
    """
    if u_i.shape != x_i.shape[:2]:
        raise ValueError(f"u_i must be (batch, k) = {tuple(x_i.shape[:2])}; got {tuple(u_i.shape)}")
    products = inner_products(x, x_i, z_i, distances=branch != "lower" or not flat(regularity.l))
    return interpolant(products, x, x_i, z_i, u_i, regularity, branch)


def interpolant(
    products: InnerProducts,
    x: Float[Tensor, "batch d"],
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    u_i: Float[Tensor, "batch k"],
    regularity: Regularity,
    branch: Branch,
    smoothing: float = 1.0,
) -> Solution:
    """`interpolate` from inner products (with origin x) already at hand.

    A `smoothing` below 1 keeps the affine pieces and widens their Moreau envelope to M = smoothing (L - l): for attacks
    that need a gradient where the true one vanishes; it interpolates nothing.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}; got {branch!r}")
    l, L, u_i = regularity.l, regularity.L, u_i.double()
    parts = [_extreme(products, u_i, l, L, smoothing)] if branch != "upper" else []
    parts += [_extreme(products, u_i, l, L, smoothing, upper=True)] if branch != "lower" else []
    curvatures = {"lower": [l], "upper": [L], "mean": [l, L]}[branch]

    weights = torch.stack([part.weights for part in parts]).mean(0)
    pulls = [_times(part.weights, c) for part, c in zip(parts, curvatures, strict=True)]
    pull = torch.stack(pulls).mean(0)
    curvature = sum(curvatures) / len(curvatures)  # type: ignore[arg-type]
    # sum_i w_i (z_i + c (x - x_i)) with the parts of "mean" merged, so that z_i and x_i are read once.
    z = _average(weights, z_i)
    if not (branch == "lower" and flat(l)):
        z = z + per_row(curvature, x, 1) * x - _average(pull, x_i)
    signs = {"lower": [1], "upper": [-1], "mean": [1, -1]}[branch]
    phi = sum(s * part.value for s, part in zip(signs, parts, strict=True)) / len(parts)

    gaps = torch.stack([part.gap for part in parts])
    error = (2 * per_row(L - l, gaps[0], 0) * gaps).sqrt().mean(0)
    residual = torch.stack([part.gap / part.scale for part in parts]).amax(0)
    steps = torch.stack([part.steps for part in parts]).amax(0)
    status = torch.stack([part.status for part in parts]).amax(0)
    z = torch.where((status == int(Status.INFEASIBLE))[:, None], torch.nan, z)
    stats = {"value": phi, "weights": weights, "gap": gaps.amax(0), "residual": residual, "steps": steps}
    stats["feature_error"] = error
    return Solution(z, status, stats)


def _extreme(
    products: InnerProducts,
    u_i: Tensor,
    l: float | Tensor,
    L: float | Tensor,
    smoothing: float,
    upper: bool = False,
) -> SimplexOptimum:
    """Dual of the lower interpolant; of the upper one by reflection (l, L, phi, z) -> (-L, -l, -phi, -z)."""
    curvature, sign = (L, -1) if upper else (l, 1)
    M = L - l
    gram = products.slopes(curvature)  # the same for p and -p
    half = gram.diagonal(dim1=1, dim2=2) / (2 * per_row(M, gram, 1))
    return solve_simplex_qp(gram / (smoothing * per_row(M, gram, 2)), sign * products.bounds(u_i, curvature) + half)


def _times(weights: Tensor, curvature: float | Tensor) -> Tensor:
    return weights * per_row(curvature, weights, 1)


def _average(weights: Float[Tensor, "batch k"], points: Float[Tensor, "batch k d"]) -> Float[Tensor, "batch d"]:
    return (weights.to(points.dtype)[:, None] @ points).squeeze(1)
