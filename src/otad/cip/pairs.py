"""The n^2 pair inequalities of a potential: exact weights of chosen pairs, and a search through all of them.

phi_i - phi_j >= W_ij = A_ij + L B_ij + C_ij / L for l = ratio * L, with M = L - l and

    A = <z_j, x_i - x_j> - ratio/(1-ratio) <z_i - z_j, x_i - x_j>,
    B = ratio/(2 (1-ratio)) |x_i - x_j|^2,    C = |z_i - z_j|^2 / (2 (1-ratio)).

In shifted form (U = phi - (l/2)|x|^2, s = z - l x) all weights of one L come from a single matrix product:

    W_ij - (phi_i - phi_j) = <s_j, y_i> + q_j - p_i,   y_i = x_i - s_i / M,
    q_j = U_j + |s_j|^2/(2M) - <s_j, x_j>,             p_i = U_i - |s_i|^2/(2M).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Edges", "Points", "Search"]

ROUNDING = 1e-13  # of the terms of a weight, and of the potentials; smaller violations are rounding
EQUAL_POINTS = 1e-26  # squared distance, relative to the squared distances from the centre
EQUAL_FEATURES = 1e-13
CHUNK = 2**17  # entries of a (pairs, d) array held at a time: these stay in the cache
BLOCK_ROWS = 1024
CENTER_SAMPLE = 1000


@dataclass(frozen=True)
class Edges:
    """Pairs (i, j) with the terms of their weights, in float64, shape (m,) each."""

    i: Int[Tensor, " m"]
    j: Int[Tensor, " m"]
    A: Float[Tensor, " m"]
    B: Float[Tensor, " m"]
    C: Float[Tensor, " m"]
    size: Float[Tensor, " m"]  # of the terms that A sums, which bounds its rounding
    speed: Float[Tensor, " m"]  # |z_i - z_j| / |x_i - x_j|; inf where equal points have different features

    def weights(self, L: float) -> Float[Tensor, " m"]:
        return torch.add(self.A, self.B, alpha=L).add_(self.C, alpha=1 / L)

    def rounding(self, L: float) -> Float[Tensor, " m"]:
        return torch.add(self.size, self.B.abs(), alpha=L).add_(self.C, alpha=1 / L).mul_(ROUNDING)

    def __getitem__(self, chosen: Tensor) -> "Edges":
        return Edges(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def joined(parts: list["Edges"]) -> "Edges":
        return Edges(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Edges)))


@dataclass(frozen=True)
class Search:
    """What a look at all pairs found.

    Attributes:
        violated: pairs whose inequality does not hold, at most k + 1 a row; empty proves that all n^2 hold.
        rows: rows with a violated pair.
        largest: the largest W_ij - (phi_i - phi_j), an upper bound where nothing is violated.
        rechecked: pairs too close to call in single precision, which were computed again in float64.
    """

    violated: Edges
    rows: int
    largest: float
    rechecked: int


class Points:
    """n points with features, and the weights of their pairs for l = ratio * L.

    Args:
        x, z: points and features, shape (n, d), of any floating dtype; all pair terms are those of the given
            numbers, in float64.
        ratio: l / L < 1.
        memory: bytes for the block of pair scores held at a time. Beside it live two (n, d) arrays in
            single precision.
    """

    def __init__(self, x: Float[Tensor, "n d"], z: Float[Tensor, "n d"], ratio: float, memory: int) -> None:
        self.x, self.z, self.ratio, self.n = x, z, ratio, len(x)
        # Medians: one far outlier must not cost the others their digits.
        step = max(1, self.n // CENTER_SAMPLE)
        self.x_center, self.z_center = (t[::step].double().median(0).values for t in (x, z))
        # Filled in place: small results kept between large temporaries would hold on to the memory of those.
        sums = torch.empty(3, self.n, dtype=torch.float64, device=x.device)
        for part, x_part, z_part in self._parts():
            sums[0, part], sums[1, part] = x_part @ self.z_center, torch.linalg.vecdot(x_part, x_part)
            sums[2, part] = z_part.norm(dim=1)
        self.tilt, self.square, self.z_norm = sums
        # Scores, their largest entries and a copy for sorting.
        self.block_rows = max(1, min(BLOCK_ROWS, memory // (12 * self.n)))

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Centred rows in float64."""
        rows = max(1, CHUNK // self.x.shape[1])
        for start in range(0, self.n, rows):
            part = slice(start, start + rows)
            yield part, self.x[part].double() - self.x_center, self.z[part].double() - self.z_center

    def both_ways(self, i: Int[Tensor, " m"], j: Int[Tensor, " m"]) -> tuple[Edges, Edges]:
        """The pairs (i, j) and the pairs (j, i), from differences: no cancellation between near points."""
        rows = max(1, CHUNK // self.x.shape[1])
        terms = torch.empty(4, len(i), dtype=torch.float64, device=i.device)
        for start in range(0, len(i), rows):
            part = slice(start, start + rows)
            self._terms(i[part], j[part], terms[:, part])
        rise, along, apart, moved = terms
        equal = apart <= EQUAL_POINTS * (self.square[i] + self.square[j])
        torn = equal & (moved > EQUAL_FEATURES * (self.z_norm[i].square() + self.z_norm[j].square()))
        # Equal points with equal features are one point: their potentials are equal, to the last digit.
        rise, along, apart, moved = (t.masked_fill_(equal & ~torn, 0.0) for t in (rise, along, apart, moved))
        speed = torch.where(apart > 0, moved / apart, 0.0).sqrt_().masked_fill_(torn, torch.inf)
        r = self.ratio
        bend, B, C = r / (1 - r), r / (2 * (1 - r)) * apart, moved / (2 * (1 - r))
        spread = apart.sqrt()
        slant = abs(bend) * (moved * apart).sqrt()
        forth = Edges(i, j, rise - bend * along, B, C, self.z_norm[j] * spread + slant, speed)
        back = Edges(j, i, -rise - along - bend * along, B, C, self.z_norm[i] * spread + slant, speed)
        return forth, back

    def _terms(self, i: Tensor, j: Tensor, terms: Tensor) -> None:
        """<z_j, x_i - x_j>, <z_i - z_j, x_i - x_j>, |x_i - x_j|^2, |z_i - z_j|^2 into the rows of (4, m)."""
        z_j = self.z[j].double()
        dx, dz = self.x[i].double().sub_(self.x[j]), self.z[i].double().sub_(z_j)
        z_j.sub_(self.z_center)
        for row, (a, b) in zip(terms, ((z_j, dx), (dz, dx), (dx, dx), (dz, dz)), strict=True):
            row.copy_(torch.linalg.vecdot(a, b))

    def nearest(self, k: int) -> Edges:
        """About k nearest pairs of every point, both ways; found in single precision, so some may be missed."""
        k = min(k, self.n - 1)
        x = torch.empty_like(self.x, dtype=torch.float32)
        for part, x_part, _ in self._parts():
            x[part] = x_part
        halves = x.square().sum(1) / 2
        j = torch.empty(self.n, k, dtype=torch.long, device=x.device)
        for start in range(0, self.n, self.block_rows):
            scores = x[start : start + self.block_rows] @ x.T
            scores.sub_(halves)
            scores.diagonal(start).fill_(-torch.inf)
            j[start : start + self.block_rows] = scores.topk(k, dim=1).indices
        j = j.flatten()
        i = torch.arange(self.n, device=j.device).repeat_interleave(k)
        pairs = torch.unique(torch.minimum(i, j) * self.n + torch.maximum(i, j))
        return Edges.joined(list(self.both_ways(pairs // self.n, pairs % self.n)))

    def search(self, phi: Float[Tensor, " n"], L: float, k: int, bar: "tqdm | None" = None) -> Search:
        """Look at all pairs: the most violated ones of every row, or the proof that there are none.

        Scores are computed in single precision with their rounding error added, so that no violated pair is
        missed; whatever may be violated is computed again in float64. The error of a score is at most
        (d + 8) u (|s_j||y_i| + |q_j| + |p_i|) for any order of summation, u = 2^-24.

        Args:
            phi: potentials, in the gauge where the centre of the features is 0 (phi - tilt).
            L: smoothness.
            k: violated pairs returned a row, at least 1.
            bar: progress, one step a row.
        """
        exact = torch.get_float32_matmul_precision() != "highest"  # then float32 products are not float32
        i, j, rest = self._suspects(phi, L, k, torch.arange(self.n, device=phi.device), exact, bar)
        found, largest = self._judged(phi, L, i, j)
        rechecked = len(i)
        rest[found.i] = -torch.inf
        unsure = (rest > -torch.inf).nonzero().squeeze(1)
        if len(unsure) and not exact:
            # More suspects than were looked at, none of those violated: the whole row in float64.
            i, j, rest = self._suspects(phi, L, k, unsure, True, None)
            more, largest_more = self._judged(phi, L, i, j)
            rest[more.i] = -torch.inf
            found, largest = Edges.joined([found, more]), max(largest, largest_more)
            rechecked += len(unsure) * self.n
        return Search(found, len(found.i.unique()), max(largest, float(rest.amax())), rechecked)

    def _judged(self, phi: Tensor, L: float, i: Tensor, j: Tensor) -> tuple[Edges, float]:
        """Those of the pairs that are violated beyond rounding, and the largest excess."""
        edges, _ = self.both_ways(i, j)
        excess = edges.weights(L) - (phi[i] - phi[j])
        # Twice what the sweeps leave as rounding, so that a pair they have settled is not found again.
        violated = excess > 2 * edges.rounding(L) + 4 * ROUNDING * phi[i].abs()
        return edges[violated], float(excess.amax()) if len(i) else -torch.inf

    def _suspects(
        self, phi: Tensor, L: float, k: int, rows: Tensor, exact: bool, bar: "tqdm | None"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs that may be violated, and what was left out.

        Returns:
            i, j: at most k + 1 pairs of each of the rows.
            rest: shape (n,), a bound on the excess of the pairs left out; -inf where those hold for certain.
        """
        y, p, s, q, scale = self._factors(phi, L, torch.float64 if exact else torch.float32)
        rest = torch.full_like(phi, -torch.inf)
        pairs_i, pairs_j = [rows[:0]], [rows[:0]]
        for block in rows.split(max(1, self.block_rows // 2) if exact else self.block_rows):
            scores = y[block] @ s.T
            scores.add_(q)
            scores[torch.arange(len(block), device=block.device), block] = -torch.inf
            top = scores.topk(min(k + 1, self.n), dim=1)
            suspect = top.values > p[block, None]
            at, column = suspect.nonzero(as_tuple=True)
            pairs_i.append(block[at])
            pairs_j.append(top.indices[at, column])
            last = (top.values[:, -1] - p[block]).double() * scale
            rest[block] = torch.where(suspect.all(1), last, -torch.inf)
            if bar is not None:
                bar.update(len(block))
        return torch.cat(pairs_i), torch.cat(pairs_j), rest

    def _factors(self, phi: Tensor, L: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The factors of the scores: (<s_j, y_i> + q_j - p_i) * scale is at least the excess of the pair (i, j).

        Returns:
            y, p, s, q, scale: shapes (n, d + 1), (n,), (n, d + 1), (n,) and a number.
        """
        l, M, d = self.ratio * L, (1 - self.ratio) * L, self.x.shape[1]
        x_scale = float(self.square.amax().sqrt())
        s_scale = float(self.z_norm.amax()) + abs(l) * x_scale or 1.0
        y_scale = x_scale + s_scale / M
        unit = torch.finfo(dtype).eps / 2 * 1.01
        U = phi - phi.median() - l / 2 * self.square
        p, q = torch.empty_like(U), torch.empty_like(U)
        y, s = (torch.empty(self.n, d + 1, dtype=dtype, device=phi.device) for _ in range(2))
        for part, x, z in self._parts():
            s_part = z - l * x
            half = s_part.square().sum(1) / (2 * M)
            p[part], q[part] = U[part] - half, U[part] + half - (s_part * x).sum(1)
            y_part = (x - s_part / M) / y_scale
            s_part /= s_scale
            y[part, :d], s[part, :d] = y_part, s_part
            # One more column adds to each product its rounding error.
            y[part, d], s[part, d] = (d + 8) * unit * y_part.norm(dim=1), s_part.norm(dim=1)
        scale = y_scale * s_scale
        p, q = p / scale, q / scale
        return y, (p - 4 * unit * p.abs()).to(dtype), s, (q + 4 * unit * q.abs()).to(dtype), scale
