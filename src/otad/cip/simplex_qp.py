"""Many small concave quadratic programmes on the simplex, solved together, with their adjoint.

    maximise  c . w - w' Q w / 2   over w >= 0, sum w = 1,   Q positive semidefinite.

Block principal pivoting finds the face of most programmes in a few exchanges. For the others a feasible primal-dual
interior point (Mehrotra's corrector, weighted) does, a Newton step on that face sharpens the answer, and the better of
the two is kept. All are judged by the duality gap max_i r_i - w . r with r = c - Q w, which
needs no dual variables and bounds the error of any w.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from otad.cip.batched_cholesky import BatchedCholesky
from otad.cip.solution import Status

__all__ = ["SimplexOptimum", "along_face", "at_optimum", "solve_simplex_qp"]

MAX_STEPS = 40
GAP_TOLERANCE = 1e-15  # relative; beyond it rounding rules
EARLY_GAP = 1e-5  # where the face is tried for the first time
FACE_GAP = 4e-15  # an optimum on a face with so small a gap is the optimum
FACE_TRIALS = 4
PIVOTS = 8  # exchanges of whole faces before the interior point
CONVERGED_GAP = 1e-10
RIDGE = 1e-13  # keeps the solve on a face defined where its points are affinely dependent


@dataclass(frozen=True)
class SimplexOptimum:
    """Solutions of a batch; `weights` and `value` are differentiable in Q and c.

    Attributes:
        weights: w, shape (batch, k), float64.
        value: the maximum, shape (batch,).
        gap: duality gap at w: how far `value` can be from the maximum, shape (batch,).
        scale: the size of the programme that gaps are relative to, shape (batch,).
        status: per row, shape (batch,).
        steps: of the interior point, 0 where it was not needed, shape (batch,).
    """

    weights: Float[Tensor, "batch k"]
    value: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    scale: Float[Tensor, " batch"]
    status: Int[Tensor, " batch"]
    steps: Int[Tensor, " batch"]


def solve_simplex_qp(Q: Float[Tensor, "batch k k"], c: Float[Tensor, "batch k"]) -> SimplexOptimum:
    """Maximise c . w - w' Q w / 2 over the simplex, for every row.

    Args:
        Q: positive semidefinite, float64.
        c: scores, float64.

    Returns:
        The optimum; a row that holds NaN or infinity has status INFEASIBLE and NaN weights.

    Source: Judice and Pires, Computers & Operations Research 21 (1994); Mehrotra, SIAM J. Optim. 2 (1992); weighted
    corrector of Colombo and Gondzio, Comput. Optim. Appl. 41 (2008).
    """
    with torch.no_grad():
        weights, active, steps = _maximize(*_scaled(Q, c))
        weights, active = weights.T.contiguous(), active.T.contiguous()
    return at_optimum(Q, c, weights, active, steps)


def at_optimum(
    Q: Float[Tensor, "batch k k"],
    c: Float[Tensor, "batch k"],
    weights: Float[Tensor, "batch k"],
    active: Bool[Tensor, "batch k"],
    steps: Int[Tensor, " batch"],
) -> SimplexOptimum:
    """The optimum of a programme whose maximiser is known: adds the derivatives and the proof (the gap)."""
    weights = _Maximizer.apply(Q, c, weights, active)  # type: ignore[assignment]
    # Danskin: the gradient of the maximum is that of the objective at the maximiser.
    fixed = weights.detach()
    curved = (Q @ fixed[:, :, None]).squeeze(2)
    value = (c * fixed).sum(1) - (fixed * curved).sum(1) / 2
    with torch.no_grad():
        gap = _gap(c - curved, fixed)
        scale = _scale(Q, c)
        status = torch.where(gap <= CONVERGED_GAP * scale, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(gap.isnan(), int(Status.INFEASIBLE), status)
    return SimplexOptimum(weights, value, gap, scale, status, steps)


def along_face(
    Q: Float[Tensor, "batch k k"], right: Float[Tensor, "batch k"], active: Bool[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """How the maximiser moves with c: the m with Q m = right on the active face up to a constant, sum m = 0."""
    scale = Q.diagonal(dim1=1, dim2=2).amax(1)
    scale = torch.where(scale > 0, scale, 1)
    matrix = (Q / scale[:, None, None] + 1).permute(1, 2, 0)
    return _face_step(matrix, (right / scale[:, None]).T, active.T).T


def _gap(slack: Float[Tensor, "batch k"], weights: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    best = slack.amax(1, keepdim=True)
    return (weights * (best - slack)).sum(1)


def _scale(Q: Float[Tensor, "batch k k"], c: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
    scale = c.amax(1) - c.amin(1) + Q.diagonal(dim1=1, dim2=2).amax(1)
    return torch.where(scale > 0, scale, 1)


def _scaled(Q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The same programme with entries of order one and the batch last.

    Adding a constant to Q does not change the maximiser and makes Q regular along (1, .., 1).
    """
    scale = _scale(Q, c)
    scaled_c = ((c - c.amax(1, keepdim=True)) / scale[:, None]).T.contiguous()
    return (Q / scale[:, None, None] + 1).permute(1, 2, 0).contiguous(), scaled_c


class _Maximizer(torch.autograd.Function):
    """w(Q, c), with the derivative by the implicit function theorem on the active face."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, c: Tensor, weights: Tensor, active: Tensor) -> Tensor:
        ctx.save_for_backward(Q, weights, active)
        return weights.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        Q, weights, active = ctx.saved_tensors
        moved = along_face(Q, grad, active)
        outer = moved[:, :, None] * weights[:, None, :]
        return -(outer + outer.transpose(1, 2)) / 2, moved, None, None


def _maximize(Q: Float[Tensor, "k k batch"], c: Float[Tensor, "k batch"]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (k, batch), which of them are active, and steps (batch,); entries of Q and c are of order one."""
    k = len(c)
    if k == 1:
        weights = torch.where(c.isnan(), torch.nan, 1.0).to(c)
        return weights, weights > 0, torch.zeros_like(c[0], dtype=torch.long)
    weights, gap = _pivoted(Q, c)
    active = weights > 0
    steps = torch.zeros_like(c[0], dtype=torch.long)
    rows = (~(gap <= FACE_GAP)).nonzero().squeeze(1)
    if not len(rows):
        return weights, active, steps
    Q, c = Q[:, :, rows], c[:, rows]
    weights[:, rows] = 1 / k
    reduced = _multiply(Q, weights[:, rows]) - c
    slack = torch.ones_like(weights)
    slack[:, rows] = reduced - reduced.amin(0) + 1
    for tolerance in (EARLY_GAP, GAP_TOLERANCE):
        # Mostly the face shows early; only the rows where it has not go on to the end.
        w, s, taken = _interior_point(Q, c, weights[:, rows], slack[:, rows], tolerance)
        sharp, gap = _sharpened(Q, c, w, w > s)
        # Exact zeros are worth a rounding error: they tell the adjoint the face.
        better = gap <= _gap_last(Q, c, w) + GAP_TOLERANCE
        weights[:, rows], active[:, rows] = torch.where(better, sharp, w), torch.where(better, sharp > 0, w > s)
        steps[rows] += taken
        open_ = ~(gap <= FACE_GAP)
        if tolerance == GAP_TOLERANCE or not open_.any():
            break
        rows, Q, c = rows[open_], Q[:, :, open_], c[:, open_]
        weights[:, rows], slack[:, rows] = w[:, open_], s[:, open_]
    return weights, active, steps


def _pivoted(Q: Float[Tensor, "k k batch"], c: Float[Tensor, "k batch"]) -> tuple[Tensor, Tensor]:
    """Weights by block principal pivoting and their gap; the gap tells the rows where the exchanges went on too long.

    From the face of all pieces on: pieces of negative weight leave, pieces that exceed the face come back, all at once.

    Source: Kostreva, Linear Algebra and its Applications 21 (1978); Judice and Pires, Computers & Operations Research
    21 (1994).
    """
    active, weights = torch.ones_like(c, dtype=torch.bool), torch.empty_like(c)
    rows = torch.arange(c.shape[1], device=c.device)
    part, scores, face = Q, c, active.clone()
    for _ in range(PIVOTS):
        w, excess = _on_face(part, scores, face)
        leave, enter = face & (w < 0), ~face & (excess > GAP_TOLERANCE)
        open_ = (leave | enter).any(0)
        active[:, rows], weights[:, rows] = face, w
        if not open_.any():
            break
        face = ((face & ~leave) | enter)[:, open_]
        rows, part, scores = rows[open_], part[:, :, open_], scores[:, open_]
    sharp, gap, _ = _newton(Q, c, weights.clamp(min=0), active)
    return sharp, gap


def _on_face(Q: Tensor, c: Tensor, active: Bool[Tensor, "k batch"]) -> tuple[Tensor, Tensor]:
    """The optimum over sum w = 1 on a face, of either sign, and how far every piece exceeds the face there."""
    start = active / active.sum(0)
    w = start + _face_step(Q, c - _multiply(Q, start), active)
    slack = c - _multiply(Q, w)
    return w, slack - (slack * start).sum(0)


def _sharpened(Q: Tensor, c: Tensor, weights: Tensor, active: Bool[Tensor, "k batch"]) -> tuple[Tensor, Tensor]:
    """The optimum on a face by Newton steps, and its gap over all; meaningless where it is another face.

    A face with too many pieces shows as weights below 0: these leave, and the step is taken again. Near a kink the gap
    alone does not tell, as the gap of a small weight on a piece of small slack is the product of the two.
    """
    sharp, gap, inside = _newton(Q, c, weights, active)
    left = (~inside).nonzero().squeeze(1)
    tried = sharp[:, left]
    for _ in range(FACE_TRIALS):
        if not len(left):
            break
        tried, gap_tried, inside = _newton(Q[:, :, left], c[:, left], tried, tried > 0)
        # Between two faces the gap may rise; what counts is where this ends.
        better = gap_tried <= gap[left] + GAP_TOLERANCE
        sharp[:, left] = torch.where(better, tried, sharp[:, left])
        gap[left] = torch.where(better, gap_tried, gap[left])
        left, tried = left[~inside], tried[:, ~inside]
    return sharp, gap


def _newton(
    Q: Tensor, c: Tensor, weights: Tensor, active: Bool[Tensor, "k batch"]
) -> tuple[Tensor, Tensor, Bool[Tensor, " batch"]]:
    """Weights after one step on the face, their gap over all, and whether none had to be kept from falling below 0."""
    sharp = weights * active
    sharp = sharp / sharp.sum(0)
    sharp = sharp + _face_step(Q, c - _multiply(Q, sharp), active)
    inside = (sharp >= 0).all(0)
    sharp = sharp.clamp(min=0)
    sharp = sharp / sharp.sum(0)
    return sharp, _gap_last(Q, c, sharp), inside


def _interior_point(
    Q: Float[Tensor, "k k batch"],
    c: Float[Tensor, "k batch"],
    weights: Float[Tensor, "k batch"],
    slack: Float[Tensor, "k batch"],
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """From weights w > 0 with sum 1 and slacks s = Q w - c + nu > 0 to such with w . s <= tolerance; steps taken."""
    steps = torch.zeros_like(c[0], dtype=torch.long)
    rows = torch.arange(c.shape[1], device=c.device)
    weights, slack = weights.clone(), slack.clone()
    w, s = weights.clone(), slack.clone()
    for _ in range(MAX_STEPS):
        running = (w * s).sum(0) > tolerance
        if not running.any():
            break
        if running.sum() < 0.7 * len(running):
            # Rows that are done drop out, so that a few hard ones do not cost the whole batch.
            weights[:, rows], slack[:, rows] = w, s
            rows, w, s = rows[running], w[:, running], s[:, running]
            Q, c = Q[:, :, running], c[:, running]
        w, s = _mehrotra_step(Q, w, s)
        steps[rows] += 1
    weights[:, rows], slack[:, rows] = w, s
    return weights, slack, steps


def _mehrotra_step(Q: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    mu = (w * s).mean(0)
    matrix = Q.clone()
    matrix.diagonal(dim1=0, dim2=1).add_((s / w + RIDGE).T)
    factor = BatchedCholesky(matrix)
    predicted = factor.solve(torch.stack([-s, torch.ones_like(s)], 1))
    ones = predicted[:, 1]
    dw, ds = _direction(Q, predicted[:, 0], ones)
    reach = torch.minimum(_reach(w, dw), _reach(s, ds))
    # The second-order term counts as far as the predictor can go: in full it makes the iteration cycle.
    target = (1 - reach) ** 2 * mu - reach * dw * ds
    dw, ds = _direction(Q, factor.solve((target / w - s)[:, None])[:, 0], ones)
    reach = 0.995 * torch.minimum(_reach(w, dw), _reach(s, ds)).clamp(max=1 / 0.995)
    return w + reach * dw, s + reach * ds


def _direction(Q: Tensor, solved: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """A step that keeps sum w = 1 and, by computing ds from dw, dual feasibility to the last bit."""
    shift = solved.sum(0) / ones.sum(0)
    dw = solved - shift * ones
    return dw, _multiply(Q, dw) + shift


def _reach(value: Tensor, step: Tensor) -> Tensor:
    """Largest t with value + t * step >= 0."""
    return torch.where(step < 0, -value / step, torch.inf).amin(0).clamp(max=1.0)


def _face_step(Q: Tensor, right: Tensor, active: Bool[Tensor, "k batch"]) -> Tensor:
    """The d that solves Q d + shift = right on the active face, sum d = 0, zero elsewhere."""
    matrix = Q * active * active[:, None]
    matrix.diagonal(dim1=0, dim2=1).add_(torch.where(active, RIDGE, 1.0).T)
    solved = BatchedCholesky(matrix).solve(torch.stack([right * active, active.to(Q)], 1))
    shift = solved[:, 0].sum(0) / solved[:, 1].sum(0)
    return (solved[:, 0] - shift * solved[:, 1]) * active


def _multiply(Q: Float[Tensor, "k k batch"], w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
    return (Q * w).sum(1)


def _gap_last(Q: Tensor, c: Tensor, w: Tensor) -> Tensor:
    slack = c - _multiply(Q, w)
    return (w * (slack.amax(0) - slack)).sum(0).nan_to_num(torch.inf)
