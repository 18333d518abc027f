"""Potentials of a whole data set: longest paths over all pairs, by Bellman and Ford's sweeps in blocks."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["PairTerms", "longest_paths"]

IMPROVEMENT = 1e-13  # relative to the largest weight; smaller gains are rounding
MAX_SWEEPS = 1000


class PairTerms:
    """Pair weights W_ij(l, M) of n points from four (n, n) products in float64.

    They are kept where they fit into `memory` bytes (all L of a bisection share them), else recomputed block by block.

    Args:
        x, z: points and features, shape (n, d); centred here, so that a common shift costs no digits.
        memory: bytes that the kept products may take.
    """

    def __init__(self, x: Float[Tensor, "n d"], z: Float[Tensor, "n d"], memory: int) -> None:
        self.x, self.z = (x - x.mean(0)).double(), (z - z.mean(0)).double()
        self.inner = (self.x * self.z).sum(1)
        self.tilt = self.x @ z.mean(0).double()
        self.n = len(x)
        self.kept: dict[int, tuple[Tensor, ...]] | None = None
        rows = max(1, min(self.n, 2**24 // self.n))
        self.starts = range(0, self.n, rows)
        self.rows = rows
        if 32 * self.n**2 <= memory:
            self.kept = {start: self._products(start) for start in self.starts}

    def _products(self, start: int) -> tuple[Tensor, ...]:
        """Blocks of <z_j, x_i - x_j>, <z_i - z_j, x_i - x_j>, |x_i - x_j|^2 and |z_i - z_j|^2."""
        block = slice(start, start + self.rows)
        x, z = self.x[block], self.z[block]
        rise = x @ self.z.T - self.inner
        along = self.inner[block, None] - z @ self.x.T - rise
        rise += self.tilt[block, None] - self.tilt
        return rise, along, _squared_distances(x, self.x), _squared_distances(z, self.z)

    def products(self, start: int) -> tuple[Tensor, ...]:
        return self.kept[start] if self.kept is not None else self._products(start)

    def weights(self, l: float, M: float) -> Iterator[tuple[slice, Float[Tensor, "rows n"]]]:
        """Blocks (rows i, W_ij for all j)."""
        for start in self.starts:
            block = slice(start, min(start + self.rows, self.n))
            rise, along, apart, moved = self.products(start)
            W = torch.add(rise, moved, alpha=1 / (2 * M))
            if l:
                W.add_(apart, alpha=l / 2 * (1 + l / M)).add_(along, alpha=-l / M)
            yield block, W

    def quotient(self) -> float:
        """Largest |z_i - z_j| / |x_i - x_j|; inf where equal points have different features."""
        largest = 0.0
        for start in self.starts:
            _, _, apart, moved = self.products(start)
            floor_x, floor_z = 1e-13 * apart.amax(), 1e-13 * moved.amax()
            if ((apart <= floor_x) & (moved > floor_z)).any():
                return float("inf")
            largest = max(largest, float(torch.where(apart > floor_x, moved / apart, 0).amax()))
        return largest**0.5


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)


def longest_paths(terms: PairTerms, l: float, M: float) -> Float[Tensor, " n"] | None:
    """The smallest phi >= 0 with phi_i - phi_j >= W_ij for all pairs, or None where a cycle has positive weight."""
    keep = terms.kept is not None
    blocks = list(terms.weights(l, M)) if keep else None
    u = torch.zeros(terms.n, dtype=torch.float64, device=terms.x.device)
    parent = torch.arange(terms.n, device=u.device)
    for _ in range(MAX_SWEEPS):
        best, new_parent, largest = u.clone(), parent.clone(), 0.0
        for block, W in blocks if blocks is not None else terms.weights(l, M):
            value, index = (W + u).max(1)
            largest = max(largest, float(W.abs().amax()))
            better = value > u[block] + IMPROVEMENT * (largest + float(u.amax()))
            best[block] = torch.where(better, value, u[block])
            new_parent[block] = torch.where(better, index, parent[block])
        if torch.equal(best, u):
            return u
        u, parent = best, new_parent
        if _has_cycle(parent):
            return None
    return None


def _has_cycle(parent: Tensor) -> bool:
    """Whether following the last improvements leads round in a circle: then that circle's weight is positive."""
    roots = parent == torch.arange(len(parent), device=parent.device)
    ancestor = parent
    for _ in range(len(parent).bit_length()):
        ancestor = ancestor[ancestor]
    return not bool(roots[ancestor].all())
