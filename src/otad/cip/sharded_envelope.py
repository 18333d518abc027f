"""The Moreau envelope of `envelope.py`, over affine pieces that several processes share.

Each process looks through its own pieces for those that may carry weight; these travel, and all processes solve the
same small programmes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.cip.envelope import EnvelopeSolution, MoreauEnvelope, Step
from otad.cip.shards import Shards

__all__ = ["ShardedEnvelope"]


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

    rows_at_once = 256  # their working sets travel between the processes

    def __init__(
        self, slopes: Float[Tensor, "own d"], offsets: Float[Tensor, " own"], M: float, shards: Shards
    ) -> None:
        shift = float(shards.first(offsets.detach().double().median()))
        super().__init__(slopes, offsets, M, shift)
        self.shards = shards

    def smoothed(self, factor: float) -> "ShardedEnvelope":
        wider = ShardedEnvelope(self.slopes, self.offsets + self.shift, factor * self.M, self.shards)
        wider._sketch, wider._sketched = self.sketch, wider._versions()
        return wider

    def forward(self, x: Float[Tensor, "batch d"]) -> EnvelopeSolution:
        """As for one process.

        Raises:
            ValueError: the processes pass different queries.
        """
        self.shards.check_same(x, "x")
        return super().forward(x)

    def _sizes(self) -> tuple[Tensor, Tensor]:
        slope_size, offset_size = self.shards.largest(torch.stack(super()._sizes()))
        return slope_size, offset_size

    def _likely(self, x: Float[Tensor, "rows d"], k: int, M: float) -> Int[Tensor, "rows k"]:
        own = super()._likely(x, -(-k // self.shards.world), M) + self.shards.start
        return self.shards.gather(own.T).T

    def _held(self, indices: Int[Tensor, "rows k"]) -> tuple[Tensor, Tensor, Int[Tensor, "rows k"]]:
        wanted, places = indices.unique(return_inverse=True)
        pieces = self.slopes.new_zeros(len(wanted), self.slopes.shape[1] + 1)
        own = self.shards.owns(wanted)
        at = wanted[own] - self.shards.start
        pieces[own, :-1], pieces[own, -1] = self.slopes[at], self.offsets[at]
        pieces = self.shards.total(pieces)
        return pieces[:, :-1].contiguous(), pieces[:, -1], places

    def _outside(
        self, step: Step, more: int, everything: bool
    ) -> tuple[Float[Tensor, " rows"], Int[Tensor, "rows more"]]:
        top, fresh = super()._outside(step, more, everything)
        fresh = torch.where(fresh < 0, fresh, fresh + self.shards.start)
        return self.shards.largest(top), self.shards.gather(fresh.T).T
