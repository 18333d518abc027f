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

from otad.cip.shards import Shards

__all__ = ["Edges", "Points", "Search"]

ROUNDING = 1e-13  # of the terms of a weight, and of the potentials; smaller violations are rounding
EQUAL_POINTS = 1e-26  # squared distance, relative to the squared distances from the centre
EQUAL_FEATURES = 1e-13
CHUNK = 2**17  # entries of a (pairs, d) array held at a time: these stay in the cache
BLOCK_ROWS = 1024
CENTER_SAMPLE = 256
SPARE = 8  # scores kept beyond those asked for, to settle in float64 which are the largest


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
        reverse: the same pairs the other way round.
        rows: rows with a violated pair.
        largest: the largest W_ij - (phi_i - phi_j), an upper bound where nothing is violated.
        rechecked: pairs too close to call in single precision, which were computed again in float64.
    """

    violated: Edges
    reverse: Edges
    rows: int
    largest: float
    rechecked: int


class Points:
    """n points with features, and the weights of their pairs for l = ratio * L.

    Where several processes share the points, each holds its own rows; all of them call every method, and all get
    the same answers, in which i, j and phi count through the rows of all. Which pairs are chosen does not depend on
    the number of processes, up to ties of more than a few pairs.

    Args:
        x, z: points and features of this process, shape (own, d), of any floating dtype; all pair terms are those of
            the given numbers, in float64.
        ratio: l / L < 1.
        memory: bytes for the block of pair scores held at a time. Beside it live two (own, d) arrays in
            single precision.
        shards: who holds which rows; None: this process has them all.
    """

    def __init__(
        self,
        x: Float[Tensor, "own d"],
        z: Float[Tensor, "own d"],
        ratio: float,
        memory: int,
        shards: Shards | None = None,
    ) -> None:
        self.shards = shards or Shards(x)
        self.x, self.z, self.ratio, self.n = x, z, ratio, self.shards.n
        # Medians: one far outlier must not cost the others their digits.
        step = max(1, self.n // CENTER_SAMPLE)
        sample = slice(-self.shards.start % step, None, step)
        self.x_center, self.z_center = (self.shards.gather(t[sample].double()).median(0).values for t in (x, z))
        # Filled in place: small results kept between large temporaries would hold on to the memory of those.
        sums = torch.empty(3, len(x), dtype=torch.float64, device=x.device)
        for part, x_part, z_part in self._parts():
            sums[0, part], sums[1, part] = x_part @ self.z_center, torch.linalg.vecdot(x_part, x_part)
            sums[2, part] = z_part.norm(dim=1)
        self.tilt, self.square, self.z_norm = (self.shards.gather(row) for row in sums)
        # Scores, their largest entries and a copy for sorting.
        self.block_rows = max(1, min(BLOCK_ROWS, memory // (12 * self.n)))

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Centred rows of this process in float64."""
        rows = max(1, CHUNK // self.x.shape[1])
        for start in range(0, len(self.x), rows):
            part = slice(start, start + rows)
            yield part, self.x[part].double() - self.x_center, self.z[part].double() - self.z_center

    def both_ways(self, i: Int[Tensor, " m"], j: Int[Tensor, " m"]) -> tuple[Edges, Edges]:
        """The pairs (i, j) and the pairs (j, i), from differences: no cancellation between near points."""
        rise, along, apart, moved = self._terms(i, j)
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

    def _terms(self, i: Tensor, j: Tensor) -> Float[Tensor, "4 m"]:
        """<z_j, x_i - x_j>, <z_i - z_j, x_i - x_j>, |x_i - x_j|^2, |z_i - z_j|^2; by the process that holds i."""
        rows = max(1, CHUNK // self.x.shape[1])
        terms = torch.zeros(4, len(i), dtype=torch.float64, device=i.device)
        own = self.shards.owns(i)
        for place, (x, z) in self.shards.visits(self.x, self.z) if len(i) else ():
            here = (own & (j >= place.start) & (j < place.stop)).nonzero().squeeze(1)
            for at in here.split(rows):
                mine, theirs = i[at] - self.shards.start, j[at] - place.start
                z_j = z[theirs].double()
                dx, dz = self.x[mine].double().sub_(x[theirs]), self.z[mine].double().sub_(z_j)
                z_j.sub_(self.z_center)
                pairs = ((z_j, dx), (dz, dx), (dx, dx), (dz, dz))
                terms[:, at] = torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs])
        return self.shards.total(terms)

    def nearest(self, k: int) -> Edges:
        """About k nearest pairs of every point, both ways; found in single precision, so some may be missed."""
        k = min(k, self.n - 1)
        x = torch.empty_like(self.x, dtype=torch.float32)
        for part, x_part, _ in self._parts():
            x[part] = x_part
        norms = x.norm(dim=1)
        own = torch.arange(len(x), device=x.device)
        scores, columns = self._largest(own, x, x, -norms.square() / 2, k, self.block_rows)
        # Rounding of a product, with a wide margin.
        doubt = 8 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * norms * self.shards.largest(norms.amax())
        near = _near(scores, doubt, k)
        i, j = self._pairs(own, columns, near)
        crowded = near.sum(1) > k
        unsure = self.shards.gather(crowded)[i]
        apart = self._terms(i[unsure], j[unsure])[2]
        best = _leading(i[unsure], j[unsure], -apart, k)
        i, j = torch.cat([i[~unsure], i[unsure][best]]), torch.cat([j[~unsure], j[unsure][best]])
        pairs = torch.unique(torch.minimum(i, j) * self.n + torch.maximum(i, j))
        low, high = pairs // self.n, pairs % self.n
        # Whoever holds i computes the pair: half of the pairs each way share the work.
        turned = (low + high) % 2 == 1
        return Edges.joined(list(self.both_ways(torch.where(turned, high, low), torch.where(turned, low, high))))

    def search(self, phi: Float[Tensor, " n"], L: float, k: int, bar: "tqdm | None" = None) -> Search:
        """Look at all pairs: the most violated ones of every row, or the proof that there are none.

        Scores are computed in single precision with their rounding error added, so that no violated pair is
        missed; whatever may be violated is computed again in float64. The error of a score is at most
        (d + 8) u (|s_j||y_i| + |q_j| + |p_i|) for any order of summation, u = 2^-24.

        Args:
            phi: potentials, in the gauge where the centre of the features is 0 (phi - tilt).
            L: smoothness.
            k: violated pairs returned a row, at least 1.
            bar: progress, one step a pair.
        """
        exact = torch.get_float32_matmul_precision() != "highest"  # then float32 products are not float32
        i, j, rest = self._suspects(phi, L, k, torch.arange(len(self.x), device=phi.device), exact, bar)
        found, reverse, largest = self._judged(phi, L, i, j, k)
        rechecked = len(i)
        rest[found.i] = -torch.inf
        unsure = (rest > -torch.inf).nonzero().squeeze(1)
        if len(unsure) and not exact:
            # More suspects than were looked at, none of those violated: the whole row in float64.
            own = unsure[self.shards.owns(unsure)] - self.shards.start
            i, j, rest = self._suspects(phi, L, k, own, True, None)
            more, more_reverse, largest_more = self._judged(phi, L, i, j, k)
            rest[more.i] = -torch.inf
            found, reverse = Edges.joined([found, more]), Edges.joined([reverse, more_reverse])
            largest = max(largest, largest_more)
            rechecked += len(unsure) * self.n
        return Search(found, reverse, len(found.i.unique()), max(largest, float(rest.amax())), rechecked)

    def _judged(self, phi: Tensor, L: float, i: Tensor, j: Tensor, k: int) -> tuple[Edges, Edges, float]:
        """Those of the pairs that are violated beyond rounding, both ways, and the largest excess."""
        forth, back = self.both_ways(i, j)
        excess = forth.weights(L) - (phi[i] - phi[j])
        largest = float(excess.amax()) if len(i) else -torch.inf
        # Twice what the sweeps leave as rounding, so that a pair they have settled is not found again.
        violated = (excess > 2 * forth.rounding(L) + 4 * ROUNDING * phi[i].abs()).nonzero().squeeze(1)
        violated = violated[_leading(i[violated], j[violated], excess[violated], k + 1)]
        return forth[violated], back[violated], largest

    def _suspects(
        self, phi: Tensor, L: float, k: int, rows: Tensor, exact: bool, bar: "tqdm | None"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of the rows (counted among those of this process) that may be violated, and what was left out.

        Returns:
            i, j: at least the k + 1 most violated ones of each of the rows.
            rest: shape (n,), a bound on the excess of the pairs left out; -inf where those hold for certain.
        """
        y, p, s, q, scale = self._factors(phi, L, torch.float64 if exact else torch.float32)
        block_rows = max(1, self.block_rows // 2) if exact else self.block_rows
        scores, columns = self._largest(rows, y, s, q, k + 1, block_rows, bar)
        y, p = y[rows, -1], p[rows]
        # By so much a score can differ from the excess that it stands for.
        doubt = y + 8 * torch.finfo(q.dtype).eps * self.shards.largest(q.abs().amax())
        near = _near(scores, doubt, k + 1)
        i, j = self._pairs(rows, columns, near & (scores > p[:, None]))
        beyond = near.sum(1).clamp(max=scores.shape[1] - 1)
        left = scores.gather(1, beyond[:, None]).squeeze(1)
        rest = torch.full((len(self.x),), -torch.inf, dtype=phi.dtype, device=phi.device)
        rest[rows] = torch.where(left > p, (left - p).double() * scale, -torch.inf)
        return i, j, self.shards.gather(rest)

    def _pairs(self, rows: Tensor, columns: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen pairs of all processes, counted through the rows of all."""
        at, column = chosen.nonzero(as_tuple=True)
        return self.shards.gather(rows[at] + self.shards.start), self.shards.gather(columns[at, column])

    def _largest(
        self,
        rows: Tensor,
        left: Tensor,
        right: Tensor,
        offset: Tensor,
        k: int,
        block_rows: int,
        bar: "tqdm | None" = None,
    ) -> tuple[Tensor, Tensor]:
        """The largest <right_j, left_i> + offset_j over all j other than i, for the given i among the own rows.

        Returns:
            scores, columns: shape (rows, k + SPARE) or (rows, n), in falling order; -inf stands for no j.
        """
        width = min(k + SPARE, self.n)
        scores = torch.full((len(rows), width), -torch.inf, dtype=left.dtype, device=left.device)
        columns = torch.zeros(len(rows), width, dtype=torch.long, device=left.device)
        for place, (seen, seen_offset) in self.shards.visits(right, offset):
            for start in range(0, len(rows), block_rows):
                part = slice(start, start + block_rows)
                block = left[rows[part]] @ seen.T
                block.add_(seen_offset)
                own = rows[part] + self.shards.start - place.start
                inside = ((own >= 0) & (own < len(seen))).nonzero().squeeze(1)
                block[inside, own[inside]] = -torch.inf
                top = block.topk(min(width, len(seen)), dim=1)
                both = (
                    torch.cat([scores[part], top.values], 1),
                    torch.cat([columns[part], top.indices + place.start], 1),
                )
                best = both[0].topk(width, dim=1)
                scores[part], columns[part] = best.values, both[1].gather(1, best.indices)
                if bar is not None:
                    bar.update(len(block) * len(seen))
        return scores, columns

    def _factors(self, phi: Tensor, L: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The factors of the scores: (<s_j, y_i> + q_j - p_i) * scale is at least the excess of the pair (i, j).

        Returns:
            y, p, s, q, scale: of the own rows, shapes (own, d + 1), (own,), (own, d + 1), (own,); and a number.
        """
        l, M, d = self.ratio * L, (1 - self.ratio) * L, self.x.shape[1]
        x_scale = float(self.square.amax().sqrt())
        s_scale = float(self.z_norm.amax()) + abs(l) * x_scale or 1.0
        y_scale = x_scale + s_scale / M
        unit = torch.finfo(dtype).eps / 2 * 1.01
        U = (phi - phi.median() - l / 2 * self.square)[self.shards.start : self.shards.stop]
        p, q = torch.empty_like(U), torch.empty_like(U)
        y, s = (torch.empty(len(U), d + 1, dtype=dtype, device=phi.device) for _ in range(2))
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


def _near(scores: Float[Tensor, "rows width"], doubt: Float[Tensor, " rows"], k: int) -> Tensor:
    """Which of the scores, in falling order, may be among the k largest, where each is off by up to `doubt`."""
    last = scores[:, min(k, scores.shape[1]) - 1] if k else scores[:, 0]
    return (scores >= (last - 2 * doubt)[:, None]) & (scores > -torch.inf)


def _leading(i: Int[Tensor, " m"], j: Int[Tensor, " m"], score: Float[Tensor, " m"], k: int) -> Int[Tensor, " kept"]:
    """Places of the k largest scores of each i, sorted by i, score and j: the same whatever the order given."""
    order = j.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[i[order].argsort(stable=True)]
    row = i[order]
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return order[place < k]
