"""Potentials of a whole data set: longest paths by Bellman and Ford's sweeps over few pairs, proved over all.

The sweeps see a growing set of pairs. A cycle of positive weight among them is one among all pairs, so every
smoothness it rules out is ruled out for good; potentials that satisfy them are a proposal, which a search
through all n^2 pairs confirms, or answers with the pairs it violates.
"""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from otad.cip.pairs import ROUNDING, Edges, Points
from otad.cip.shards import Shards
from otad.errors import InfeasibleError

__all__ = ["PotentialFit", "fit_potentials", "longest_paths"]

logger = logging.getLogger(__name__)

CANDIDATES = 16  # nearest points paired with each point at the start, and violated pairs added a row and search
NEWTON_STEPS = 6  # cycles followed before the search for the smallest L takes longer steps
MAX_STEPS = 200
LARGEST = 1e100  # beyond, weights that fall as 1 / L are no smaller than rounding
SMALLEST = 1e-6  # where all features are equal, any L > 0 fits


@dataclass(frozen=True)
class PotentialFit:
    """Potentials, and what was proved about them.

    Attributes:
        potentials: the smallest phi >= 0 that all pairs allow, shape (n,), float64.
        smoothness: their L.
        infeasible_below: no potential fits for any smaller L (at the same l / L); None where L was given.
        cycle: points i_0, i_1, .. with W(i_0, i_1) + W(i_1, i_2) + .. + W(i_last, i_0) > 0 for every L below
            `infeasible_below`; empty where L was given.
        pairs: ordered pairs whose inequality was verified: n (n - 1).
        largest_violation: no W_ij - (phi_i - phi_j) is larger; rounding.
        searches: times that all pairs were looked at.
        rechecked: pairs of the last search that were too close to call in single precision, decided in float64.
        edges: pairs that the sweeps worked on.
    """

    potentials: Float[Tensor, " n"]
    smoothness: float
    infeasible_below: float | None
    cycle: tuple[int, ...]
    pairs: int
    largest_violation: float
    searches: int
    rechecked: int
    edges: int


def fit_potentials(
    x: Float[Tensor, "own d"],
    z: Float[Tensor, "own d"],
    ratio: float,
    *,
    shards: Shards | None = None,
    L: float | None = None,
    rtol: float = 1e-3,
    memory: int = 2**31,
    candidates: int = CANDIDATES,
    progress: bool = False,
) -> PotentialFit:
    """The smallest potentials of F(ratio * L, L) with gradient z_i at x_i, for a given or the smallest L.

    Processes that share the points look at all pairs together; the sweeps, which see only the chosen pairs, run in
    each of them alike.

    Args:
        x: points; of this process, where several share them.
        z: their features.
        ratio: l / L; at most 0 where L is to be found.
        shards: who holds which rows; None: this process has them all.
        L: smoothness; None finds the smallest.
        rtol: the L found is at most this much above one that is proved infeasible.
        memory: bytes for a block of pair scores; beside it live two arrays of the size of x in single precision and
            about 150 bytes for each pair that the sweeps work on, some 25 pairs a point.
        candidates: nearest points paired with each point at the start, and violated pairs added a row and search, >= 1.
        progress: show a bar for each search.

    Raises:
        InfeasibleError: no potential fits, with the given L or with any.
        ValueError: equal points carry different features.

    Source: docs/method.md, "Potentials".
    """
    points = Points(x, z, ratio, memory, shards)
    edges = points.nearest(candidates)
    proposals = _Smallest(points, rtol) if L is None else _Given(points, L)
    searches = 0
    while True:
        smoothness, phi = proposals.next(edges)
        searches += 1
        share, quiet = points.n * len(x), not progress or points.shards.rank > 0
        title = f"all pairs, search {searches}"
        with tqdm(total=share, desc=title, unit="pair", unit_scale=True, disable=quiet) as bar:
            found = points.search(phi, smoothness, candidates, bar)
        logger.debug(
            "search %d of all pairs: L = %.6g, %d of %d rows violated, largest violation %.3g; %d pairs in the sweeps",
            *(searches, smoothness, found.rows, points.n, found.largest, len(edges.i)),
        )
        if not found.rows:
            break
        edges = Edges.joined([edges, found.violated, found.reverse])
    return PotentialFit(
        potentials=phi + points.tilt,
        smoothness=smoothness,
        infeasible_below=proposals.lower,
        cycle=proposals.cycle,
        pairs=points.n * (points.n - 1),
        largest_violation=max(found.largest, 0.0),
        searches=searches,
        rechecked=found.rechecked,
        edges=len(edges.i),
    )


class _Given:
    """Potentials for one L."""

    lower: float | None = None
    cycle: tuple[int, ...] = ()

    def __init__(self, points: Points, L: float) -> None:
        self.points, self.L = points, L
        self.phi = -points.tilt

    def next(self, edges: Edges) -> tuple[float, Tensor]:
        # With fewer pairs the smallest potentials were smaller still: a place to start from.
        phi, _ = longest_paths(edges, self.L, self.phi)
        if phi is None:
            l = self.points.ratio * self.L
            raise InfeasibleError(
                f"no potential in F({l:g}, {self.L:g}) fits all {self.points.n} points; raise L or lower l"
            )
        self.phi = phi
        return self.L, phi


class _Smallest:
    """The smallest L that a set of pairs allows, to a relative tolerance, and potentials for it.

    The weights fall as L grows (B <= 0 <= C): each cycle of positive weight rules out all L below the root of its
    weight, and the smallest L is the largest of these roots. Steps go from root to root, as in Newton's method.
    """

    def __init__(self, points: Points, rtol: float) -> None:
        self.points, self.rtol = points, rtol
        self.lower = 0.0
        self.cycle: tuple[int, ...] = ()
        self.known: tuple[float, Tensor] | None = None

    def next(self, edges: Edges) -> tuple[float, Tensor]:
        self._raise_by_pairs(edges)
        reach, upper = 1.0, None
        for steps in range(MAX_STEPS):
            if upper is not None and upper <= self.lower * (1 + self.rtol):
                reach = 1.0
            elif upper is not None:
                reach = (upper / self.lower - 1) / 2 / self.rtol
            elif steps > NEWTON_STEPS:
                reach *= 4
            L = self.lower * (1 + self.rtol * reach)
            if L > LARGEST:
                break
            phi, cycles = longest_paths(edges, L, self._start(L))
            if phi is None:
                self._raise_by_cycles(L, [edges[cycle] for cycle in cycles])
                continue
            self.known = (L, phi)
            upper = L
            if reach <= 1.0:
                return L, phi
        raise self._nothing_fits()

    def _start(self, L: float) -> Tensor:
        # A smaller L and more pairs only raise the smallest potentials, so those known are a place to start from.
        if self.known is not None and self.known[0] >= L:
            return self.known[1]
        return -self.points.tilt

    def _raise_by_pairs(self, edges: Edges) -> None:
        """No map of the class is faster than max(|l|, L)."""
        if len(edges.i):
            fastest = int(edges.speed.argmax())
            bound = float(edges.speed[fastest]) / max(1.0, -self.points.ratio)
            if bound == float("inf"):
                raise ValueError("equal points carry different features; merge duplicates first (otad.transport does)")
            if bound > self.lower:
                self.lower, self.cycle = bound, (int(edges.i[fastest]), int(edges.j[fastest]))
        self.lower = self.lower or SMALLEST

    def _raise_by_cycles(self, L: float, cycles: list[Edges]) -> None:
        roots = []
        for cycle in cycles:
            A, B, C, size = (float(t.sum()) for t in (cycle.A, cycle.B, cycle.C, cycle.size))
            if B == 0 and ROUNDING * size < A:
                raise self._nothing_fits()
            roots.append(_root(A, B, C))
        best = max(range(len(roots)), key=lambda c: roots[c])
        # The root is above L, but for rounding.
        self.lower = max(L, roots[best]) if roots[best] < float("inf") else L
        self.cycle = tuple(cycles[best].i.tolist())

    def _nothing_fits(self) -> InfeasibleError:
        return InfeasibleError(
            f"no smoothness admits these {self.points.n} points with l / L = {self.points.ratio}; use a lower ratio"
        )


def _root(A: float, B: float, C: float) -> float:
    """The L > 0 with A + L B + C / L = 0, for B <= 0 <= C."""
    spread = (A * A - 4 * B * C) ** 0.5
    if A < 0:
        return 2 * C / (spread - A)
    return (A + spread) / (-2 * B) if B < 0 else float("inf")


def longest_paths(
    edges: Edges, L: float, start: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"] | None, list[Int[Tensor, " length"]]]:
    """The smallest phi >= start with phi_i - phi_j >= W_ij for all edges, or cycles of positive weight.

    Any start below the smallest potentials that are wanted leads to the same potentials.

    Returns:
        phi: shape (n,), or None where there is none.
        cycles: places in `edges` of (i_0, i_1), (i_1, i_2), .., (i_last, i_0), for each cycle that was found.
    """
    n = len(start)
    # What is rounding is taken off the weights, so that cycles of weight 0 come to rest.
    weights = edges.weights(L).sub_(edges.rounding(L))
    phi, parent = start.clone(), torch.arange(n, device=start.device)
    via = torch.zeros_like(parent)  # the edge from each point to its parent
    for _ in range(n + 1):
        values = phi.index_select(0, edges.j).add_(weights)
        best = phi.scatter_reduce(0, edges.i, values, "amax")
        better = best > phi + 2 * ROUNDING * phi.abs()
        if not better.any():
            return phi, []
        reached = (values == best.index_select(0, edges.i)) & better.index_select(0, edges.i)
        reached = reached.nonzero().squeeze(1)
        # Of equal ones the last: all processes must find the same cycles.
        via.scatter_reduce_(0, edges.i[reached], reached, "amax", include_self=False)
        parent = torch.where(better, edges.j[via], parent)
        phi = torch.where(better, best, phi)
        cycles = _cycles(parent)
        if cycles:
            return None, [via[cycle] for cycle in cycles]
    raise ArithmeticError(f"longest paths over {n} points did not settle; are the data scaled beyond float64?")


def _cycles(parent: Tensor) -> list[Tensor]:
    """Circles in the last improvements; each has positive weight."""
    ancestor = parent
    for _ in range(len(parent).bit_length()):
        ancestor = ancestor[ancestor]
    # Whoever is an ancestor after n steps and is no root lies on a circle.
    left = set(ancestor[parent[ancestor] != ancestor].unique().tolist())
    cycles = []
    while left:
        cycle = [left.pop()]
        while (following := int(parent[cycle[-1]])) != cycle[0]:
            cycle.append(following)
        left.difference_update(cycle)
        cycles.append(torch.tensor(cycle, device=parent.device))
    return cycles
