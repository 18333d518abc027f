"""The transport map at new points: the gradient of the extreme potentials that fit the neighbours."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from otad.cip.adjoint import MEMORY, through_products
from otad.cip.gram import InnerProducts, flat, per_row
from otad.cip.regularity import Regularity
from otad.cip.simplex_qp import SimplexOptimum, solve_simplex_qp
from otad.cip.solution import Solution, Status

__all__ = ["BRANCHES", "Branch", "interpolate"]

Branch = Literal["lower", "upper", "mean"]
BRANCHES = ("lower", "upper", "mean")
FACTS = ("value", "weights", "gap", "residual", "steps", "feature_error")
Small = tuple[Tensor, Tensor | None, tuple[Tensor, ...]]


def interpolate(
    x: Float[Tensor, "batch d"],
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    u_i: Float[Tensor, "batch k"],
    regularity: Regularity,
    branch: Branch = "lower",
    *,
    memory: int = MEMORY,
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
        memory: bytes for the small problems solved together; the batch is worked on in chunks that keep to it.

    Returns:
        value: features z(x), shape (batch, d), in the dtype of x; differentiable once in every argument, also in l and
            L where they are tensors, with
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

    def solve(products: InnerProducts, u_i: Tensor, l: float | Tensor, L: float | Tensor) -> Small:
        return weights_and_facts(products, u_i, l, L, branch)

    found = through_products(
        solve,
        x,
        x_i,
        z_i,
        (u_i, regularity.l, regularity.L),
        distances=needs_distances(regularity, branch),
        memory=memory,
    )
    return feature(x, found[0], found[1:], regularity, branch)


def needs_distances(regularity: Regularity, branch: Branch) -> bool:
    return branch != "lower" or not flat(regularity.l)


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
    weights, pull, facts = weights_and_facts(products, u_i, regularity.l, regularity.L, branch, smoothing)
    combined = _average(weights, z_i)
    if pull is not None:
        combined = combined - _average(pull, x_i)
    return feature(x, combined, facts, regularity, branch)


def weights_and_facts(
    products: InnerProducts,
    u_i: Float[Tensor, "batch k"],
    l: float | Tensor,
    L: float | Tensor,
    branch: Branch,
    smoothing: float = 1.0,
) -> Small:
    """What an interpolant needs beside the points: weights of z_i, pulls of x_i (None: 0), and facts named in FACTS."""
    if branch not in BRANCHES:
        raise ValueError(f"branch must be one of {', '.join(BRANCHES)}; got {branch!r}")
    u_i = u_i.double()
    parts = [_extreme(products, u_i, l, L, smoothing)] if branch != "upper" else []
    parts += [_extreme(products, u_i, l, L, smoothing, upper=True)] if branch != "lower" else []
    # The feature is sum_i w_i (z_i + c (x - x_i)), with the parts of "mean" merged, so that z_i and x_i are read once.
    weights = torch.stack([part.weights for part in parts]).mean(0)
    pull = None
    if branch != "lower" or not flat(l):
        curvatures = {"lower": [l], "upper": [L], "mean": [l, L]}[branch]
        pull = torch.stack([_times(part.weights, c) for part, c in zip(parts, curvatures, strict=True)]).mean(0)
    signs = {"lower": [1], "upper": [-1], "mean": [1, -1]}[branch]
    phi = torch.stack([s * part.value for s, part in zip(signs, parts, strict=True)]).mean(0)
    gaps = torch.stack([part.gap for part in parts])
    error = (2 * per_row(L - l, gaps[0], 0) * gaps).sqrt().mean(0).detach()
    residual = torch.stack([part.gap / part.scale for part in parts]).amax(0)
    steps = torch.stack([part.steps for part in parts]).amax(0)
    status = torch.stack([part.status for part in parts]).amax(0)
    return weights, pull, (status, phi, weights, gaps.amax(0), residual, steps, error)


def feature(
    x: Float[Tensor, "batch d"],
    combined: Float[Tensor, "batch d"],
    facts: tuple[Tensor, ...],
    regularity: Regularity,
    branch: Branch,
) -> Solution:
    """The features from sum_i w_i z_i - p_i x_i, with what `weights_and_facts` told."""
    l, L = regularity.l, regularity.L
    if needs_distances(regularity, branch):
        curvature = {"lower": l, "upper": L, "mean": (l + L) / 2}[branch]
        combined = combined + per_row(curvature, x, 1) * x
    status = facts[0]
    z = torch.where((status == int(Status.INFEASIBLE))[:, None], torch.nan, combined)
    return Solution(z, status, dict(zip(FACTS, facts[1:], strict=True)))


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
