"""The Moreau envelope of `envelope.py`, over affine pieces that several processes share.

Each process scores its own pieces for all queries; then each solves the small programmes of its share of the queries,
with the best pieces of all.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from otad.cip.envelope import (
    FIRST,
    MAX_ROUNDS,
    MORE,
    SCORES_AT_ONCE,
    SOLVER_GAP,
    EnvelopeSolution,
    MoreauEnvelope,
    at_working_set,
    small_programme,
)
from otad.cip.shards import Shards
from otad.cip.simplex_qp import solve_simplex_qp
from otad.cip.solution import Status

__all__ = ["ShardedEnvelope"]

QUERIES = 256  # at a time: their working sets travel between the processes


class ShardedEnvelope(MoreauEnvelope):
    """An envelope of all pieces, each held by one process only.

    Every process passes the same queries and gets the same answer; `indices` count through the pieces of all.
    Differentiable in the queries, on every process alike.

    Args:
        slopes: s_i of this process, shape (own, d).
        offsets: a_i of this process, shape (own,).
        M: smoothness.
        shards: who holds which pieces.
    """

    def __init__(
        self, slopes: Float[Tensor, "own d"], offsets: Float[Tensor, " own"], M: float, shards: Shards
    ) -> None:
        super().__init__(slopes, offsets, M)
        self.shards = shards

    def forward(self, x: Float[Tensor, "batch d"]) -> EnvelopeSolution:
        """As for one process.

        Raises:
            ValueError: the processes pass different queries.
        """
        x = x.double()
        self.shards.check_same(x, "x")
        rows = max(1, min(QUERIES, SCORES_AT_ONCE // max(self.shards.counts)))
        parts = [self._solution(chunk) for chunk in x.split(rows)]
        width = max(part.indices.shape[1] for part in parts)
        return EnvelopeSolution(
            value=torch.cat([part.value for part in parts]),
            gradient=torch.cat([part.gradient for part in parts]),
            indices=torch.cat([_padded(part.indices, width) for part in parts]),
            weights=torch.cat([_padded(part.weights, width) for part in parts]),
            gap=torch.cat([part.gap for part in parts]),
            status=torch.cat([part.status for part in parts]),
            rounds=torch.cat([part.rounds for part in parts]),
        )

    def _solution(self, x: Tensor) -> EnvelopeSolution:
        indices, weights, gap, tolerance, rounds = self._shared_working_set(x.detach())
        S, offsets = self._pieces(indices, torch.ones(len(x), dtype=torch.bool, device=x.device))
        value, gradient, weights = at_working_set(S, offsets, x, self.M, weights, weights > 0)
        status = torch.where(gap <= tolerance, int(Status.CONVERGED), int(Status.MAX_STEPS))
        return EnvelopeSolution(value, gradient, indices, weights, gap, status, rounds)

    @torch.no_grad()
    def _shared_working_set(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Indices, weights (batch, k), gap, tolerance and rounds (batch,).

        All but the small programmes runs in every process alike, on the same numbers: they never part.
        """
        n, rank, world = self.shards.n, self.shards.rank, self.shards.world
        rows = torch.arange(len(x), device=x.device)
        share = (rows >= len(x) * rank // world) & (rows < len(x) * (rank + 1) // world)
        nothing = rows.new_zeros(len(x), 0)
        _, indices, _ = self._best(x, self.offsets - self.halves / self.M, nothing, min(FIRST, n))
        S, offsets = self._pieces(indices, share)
        done: list[tuple[Tensor, ...]] = []
        for round_ in range(1, MAX_ROUNDS + 1):
            own = x[rows[share[rows]]]
            optimum = solve_simplex_qp(*small_programme(S, offsets, own, self.M))
            own = own - (optimum.weights[:, None] @ S).squeeze(1) / self.M
            inside = (S @ own[:, :, None]).squeeze(2) + offsets
            facts = torch.stack([inside.amax(1), (optimum.weights * inside).sum(1), optimum.scale], 1)
            solved = self.shards.gather(torch.cat([optimum.weights, own, facts], 1))
            weights, nearest, facts = solved.split([indices.shape[1], x.shape[1], 3], dim=1)
            best, attained, scale = facts.T
            count = min(MORE, n - indices.shape[1])
            outside, fresh, size = self._best(nearest, self.offsets, indices, max(count, 1))
            rounding = 64 * torch.finfo(x.dtype).eps * (1 + size)
            gap = torch.maximum(outside[:, 0], best) - attained
            last = round_ == MAX_ROUNDS or count == 0
            stop = torch.ones_like(rows, dtype=torch.bool) if last else outside[:, 0] <= best + rounding
            # What rounding may hide counts as gap, so that bounds made of it hold as they stand.
            proof = gap.clamp(min=0) + rounding, 2 * rounding + SOLVER_GAP * scale, torch.full_like(rows, round_)
            # The value rises from round to round, so pieces without weight can go and none comes round in a circle.
            order = weights.topk(_most_active(weights), dim=1)
            kept = indices.gather(1, order.indices)
            done.append(tuple(t[stop] for t in (rows, kept, order.values, *proof)))
            if stop.all():
                break
            going = ~stop[share[rows]]
            stay = order.indices[share[rows]][going]
            rows, kept, fresh = rows[~stop], kept[~stop], fresh[~stop]
            new_S, new_offsets = self._pieces(fresh, share[rows])
            S = torch.cat([S[going].gather(1, stay[:, :, None].expand(-1, -1, x.shape[1])), new_S], 1)
            offsets = torch.cat([offsets[going].gather(1, stay), new_offsets], 1)
            indices = torch.cat([kept, fresh], 1)
        width = max(_most_active(part[2]) for part in done)
        parts = [torch.cat([_padded(part[f], width) for part in done]) for f in range(6)]
        back = parts[0].argsort()
        indices, weights, gap, tolerance, rounds = (part[back] for part in parts[1:])
        return indices, weights, gap, tolerance, rounds

    def _best(
        self, y: Float[Tensor, "rows d"], offsets: Float[Tensor, " own"], known: Int[Tensor, "rows known"], k: int
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"], Float[Tensor, " rows"]]:
        """Scores and indices of the k pieces with the largest <s_i, y> + a_i beside the known ones, and the largest
        |score| of all.
        """
        scores = torch.addmm(offsets, y, self.slopes.T)
        size = self.shards.largest(scores.abs().amax(1))
        row, column = self.shards.owns(known).nonzero(as_tuple=True)
        scores[row, known[row, column] - self.shards.start] = -torch.inf
        own = scores.topk(min(k, scores.shape[1]), dim=1)
        values, indices = (self.shards.gather(t.T) for t in (own.values, own.indices + self.shards.start))
        best = values.topk(k, dim=0)
        return best.values.T, indices.gather(0, best.indices).T, size

    def _pieces(
        self, indices: Int[Tensor, "rows k"], share: Bool[Tensor, " rows"]
    ) -> tuple[Float[Tensor, "share k d"], Float[Tensor, "share k"]]:
        """Slopes and offsets of the pieces in a share of the rows, from whoever holds them; each travels once."""
        wanted, places = indices.unique(return_inverse=True)
        pieces = self.slopes.new_zeros(len(wanted), self.slopes.shape[1] + 1)
        own = self.shards.owns(wanted)
        at = wanted[own] - self.shards.start
        pieces[own, :-1], pieces[own, -1] = self.slopes[at], self.offsets[at]
        pieces = self.shards.total(pieces)
        places = places[share]
        return pieces[:, :-1][places], pieces[:, -1][places]


def _most_active(weights: Tensor) -> int:
    return max(1, int((weights > 0).sum(1).amax())) if len(weights) else 1


def _padded(rows: Tensor, width: int) -> Tensor:
    """Columns up to a width; those added are the first index again, with weight 0, which changes nothing."""
    if rows.ndim == 1:
        return rows
    if rows.shape[1] >= width:
        return rows[:, :width]
    first = rows[:, :1] if rows.dtype == torch.long else torch.zeros_like(rows[:, :1])
    return torch.cat([rows, first.expand(-1, width - rows.shape[1])], 1)
