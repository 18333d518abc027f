"""Moreau envelope of a maximum of many affine functions, evaluated exactly by a working set.

    f(x) = min_y max_i [<s_i, y> + a_i] + (M/2) |x - y|^2
         = max over the simplex of  w . (S x + a) - |S' w|^2 / (2M),

a convex function with M-Lipschitz gradient g = S' w, whatever the slopes s_i and the offsets a_i are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from otad.cip.simplex_qp import at_optimum, solve_simplex_qp
from otad.cip.solution import Status

__all__ = ["EnvelopeSolution", "MoreauEnvelope"]

FIRST, MORE = 16, 8  # pieces in the first working set, and added per round
MAX_ROUNDS = 40
SOLVER_GAP = 1e-12  # of the small programmes, relative to their scale
SCORES_AT_ONCE = 2**25  # entries of the (rows, n) score matrix held at a time


@dataclass(frozen=True)
class EnvelopeSolution:
    """Rows are queries; `value` and `gradient` are differentiable in x, slopes and offsets.

    Attributes:
        value: f(x), shape (batch,), float64.
        gradient: g = grad f(x), shape (batch, d).
        indices: pieces that may carry weight, shape (batch, k).
        weights: their weights, shape (batch, k), float64, summing to 1.
        gap: duality gap over all n pieces, shape (batch,): value <= f(x) <= value + gap, and the error of
            the gradient is at most sqrt(2 M gap).
        status: CONVERGED where no piece is violated beyond rounding.
        rounds: products with all n slopes that were needed.
    """

    value: Float[Tensor, " batch"]
    gradient: Float[Tensor, "batch d"]
    indices: Int[Tensor, "batch k"]
    weights: Float[Tensor, "batch k"]
    gap: Float[Tensor, " batch"]
    status: Int[Tensor, " batch"]
    rounds: Int[Tensor, " batch"]


class MoreauEnvelope(nn.Module):
    """The function above as a module with buffers.

    Args:
        slopes: s_i, shape (n, d).
        offsets: a_i, shape (n,), kept in float64.
        M: smoothness.
    """

    slopes: Tensor
    offsets: Tensor
    halves: Tensor

    def __init__(self, slopes: Float[Tensor, "n d"], offsets: Float[Tensor, " n"], M: float) -> None:
        super().__init__()
        self.register_buffer("slopes", slopes.double().contiguous(), persistent=False)
        self.register_buffer("offsets", offsets.double(), persistent=False)
        self.register_buffer("halves", self.slopes.square().sum(1) / 2, persistent=False)
        self.M = float(M)

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        """Moves the module; it stays in float64: in float32 near points make the small programmes indefinite."""
        exact = self.slopes, self.offsets, self.halves
        super()._apply(fn, recurse)
        self.slopes, self.offsets, self.halves = (part.to(self.slopes.device) for part in exact)
        return self

    def forward(self, x: Float[Tensor, "batch d"]) -> EnvelopeSolution:
        """f, its gradient and the proof of exactness at x, in float64."""
        x = x.double()
        rows = max(1, SCORES_AT_ONCE // len(self.slopes))
        found = [self._working_set(chunk) for chunk in x.detach().split(rows)]
        width = max(part[0].shape[1] for part in found)
        indices, weights, active, gap, tolerance, rounds = (
            torch.cat([_widened(part[i], width) for part in found]) for i in range(6)
        )
        S = self.slopes[indices]
        offsets = self.offsets[indices]
        value, gradient, weights = at_working_set(S, offsets, x, self.M, weights, active)
        status = torch.where(gap <= tolerance, int(Status.CONVERGED), int(Status.MAX_STEPS))
        return EnvelopeSolution(value, gradient, indices, weights, gap, status, rounds)

    @torch.no_grad()
    def _working_set(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Indices, weights, active mask (batch, k), gap, tolerance and rounds (batch,)."""
        n = len(self.slopes)
        alone = self.offsets - self.halves / self.M
        start = self._scores(x, alone).topk(min(FIRST, n), dim=1).indices
        rows, indices = torch.arange(len(x), device=x.device), start
        done: list[tuple[Tensor, ...]] = []
        for round_ in range(1, MAX_ROUNDS + 1):
            part = x[rows]
            S, offsets = self.slopes[indices], self.offsets[indices]
            optimum = solve_simplex_qp(*small_programme(S, offsets, part, self.M))
            nearest = part - (optimum.weights[:, None] @ S).squeeze(1) / self.M
            scores = self._scores(nearest, self.offsets)
            inside = scores.gather(1, indices)
            attained = (optimum.weights * inside).sum(1)
            rounding = 64 * torch.finfo(x.dtype).eps * (1 + scores.abs().amax(1))
            tolerance = 2 * rounding + SOLVER_GAP * optimum.scale
            gap = torch.maximum(scores.amax(1), inside.amax(1)) - attained
            scores.scatter_(1, indices, -torch.inf)
            violated = scores.amax(1) > inside.amax(1) + rounding
            last = round_ == MAX_ROUNDS or indices.shape[1] >= n
            stop = torch.ones_like(violated) if last else ~violated
            if stop.any():
                # What rounding may hide counts as gap, so that bounds made of it hold as they stand.
                gap = gap.clamp(min=0) + rounding
                done.append((rows, indices, optimum.weights, gap, tolerance, torch.full_like(rows, round_), stop))
            if stop.all():
                break
            fresh = scores[~stop].topk(min(MORE, n - indices.shape[1]), dim=1).indices
            # The value rises from round to round, so pieces without weight can go and none comes round in a circle.
            weights = optimum.weights[~stop]
            kept = weights.topk(int((weights > 0).sum(1).amax()), dim=1).indices
            rows, indices = rows[~stop], torch.cat([indices[~stop].gather(1, kept), fresh], 1)
        return _gathered(done, len(x), x.device)

    def _scores(self, y: Tensor, offsets: Tensor) -> Tensor:
        return torch.addmm(offsets, y, self.slopes.T)


def small_programme(
    S: Float[Tensor, "batch k d"], offsets: Float[Tensor, "batch k"], x: Float[Tensor, "batch d"], M: float
) -> tuple[Float[Tensor, "batch k k"], Float[Tensor, "batch k"]]:
    """Q and c of the small dual, with the slopes centred: smaller numbers, the same maximiser."""
    mean = S.mean(1, keepdim=True)
    centered = S - mean
    c = (centered @ (x - mean.squeeze(1) / M)[:, :, None]).squeeze(2) + offsets
    return centered @ centered.transpose(1, 2) / M, c


def at_working_set(
    S: Float[Tensor, "batch k d"],
    offsets: Float[Tensor, "batch k"],
    x: Float[Tensor, "batch d"],
    M: float,
    weights: Float[Tensor, "batch k"],
    active: Bool[Tensor, "batch k"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"], Float[Tensor, "batch k"]]:
    """Value, gradient and weights of an envelope whose weights are known: adds the derivatives."""
    steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
    optimum = at_optimum(*small_programme(S, offsets, x, M), weights, active, steps)
    gradient = (optimum.weights[:, None] @ S).squeeze(1)
    center = (x * S.mean(1)).sum(1) - S.mean(1).square().sum(1) / (2 * M)
    return optimum.value + center, gradient, optimum.weights


def _gathered(
    done: list[tuple[Tensor, ...]], batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows that ended in different rounds, as one batch whose working sets hold little more than the active pieces."""
    width = max((int((weights[stop] > 0).sum(1).amax()) for _, _, weights, *_, stop in done), default=1)
    width = max(width, 1)
    indices = torch.zeros(batch, width, dtype=torch.long, device=device)
    weights = torch.zeros(batch, width, dtype=torch.float64, device=device)
    gap, tolerance = (torch.zeros(batch, dtype=torch.float64, device=device) for _ in range(2))
    rounds = torch.zeros(batch, dtype=torch.long, device=device)
    for rows, row_indices, row_weights, row_gap, row_tolerance, row_rounds, stop in done:
        at = rows[stop]
        best = row_weights[stop].topk(min(width, row_weights.shape[1]), dim=1)
        chosen = row_indices[stop].gather(1, best.indices)
        indices[at], weights[at] = _widened(chosen, width), _widened(best.values, width)
        gap[at], tolerance[at], rounds[at] = row_gap[stop], row_tolerance[stop], row_rounds[stop]
    return indices, weights, weights > 0, gap, tolerance, rounds


def _widened(rows: Tensor, width: int) -> Tensor:
    """Repeat the first column: a repeated piece with weight 0 changes nothing."""
    if rows.ndim == 1 or rows.shape[1] == width:
        return rows
    first = rows[:, :1] if rows.dtype == torch.long else torch.zeros_like(rows[:, :1])
    return torch.cat([rows, first.expand(-1, width - rows.shape[1])], 1)
