"""The largest of affine functions: the potential of an optimal transport onto finitely many slopes, and its cells."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip.simplex_qp import solve_simplex_qp

__all__ = ["PowerDiagram"]

OWN = 32  # pieces of the label that a sample's proof combines
FIRST = 8  # of these in the first bounds, one by one
AT_FIRST, AT_ONCE = 2, 16  # wrong pieces that are looked at more closely at a time, twice as many each time
MOST = 1024  # of them altogether
ROWS = 64  # samples at a time, for memory
SCALINGS = 30
NEWTON = 12
SHORT = 1e-9  # of a distance, for the rounding of Newton's steps
ENOUGH = 1e-7
DOUBLE = 2.0**-52
TINY = 1e-300
MOST_STEP = 1e200
SMALLEST = 2.0**-125  # below it float32 loses digits
SOFTENING = 0.01


class PowerDiagram(nn.Module):
    """Classes as unions of the cells of v(x) = max_i (<a_i, x> + b_i), every piece i of one class.

    v is convex, and its gradient is the optimal transport map onto the slopes a_i that cuts space into Laguerre cells:
    the limit L -> infinity, l = 0, of a lower extreme potential. With a_i = x_i and b_i = -|x_i|^2 / 2 the cells are
    those of the nearest point, and the classifier is 1-NN.

    Args:
        slopes: a_i, shape (n, d).
        intercepts: b_i, shape (n,).
        classes: of the pieces, 0, 1, .., each at least once, shape (n,).

    Raises:
        ValueError: shapes that do not fit, or a class without pieces.

    Source: Aurenhammer, SIAM J. Comput. 16 (1987); docs/method.md, "Cells".
    """

    slopes: Tensor
    intercepts: Tensor
    classes: Tensor

    def __init__(
        self,
        slopes: Float[Tensor, "n d"],
        intercepts: Float[Tensor, " n"],
        classes: Int[Tensor, " n"],
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        if slopes.ndim != 2 or intercepts.shape != slopes.shape[:1] or classes.shape != slopes.shape[:1]:
            shapes = ", ".join(str(tuple(part.shape)) for part in (slopes, intercepts, classes))
            raise ValueError(f"slopes must be (n, d), intercepts and classes (n,); got {shapes}")
        if len(classes) == 0 or bool((torch.bincount(classes) == 0).any()):
            raise ValueError("every class 0, 1, .. needs at least one piece")
        self.temperature = temperature
        self.register_buffer("slopes", slopes.detach().double())
        self.register_buffer("intercepts", intercepts.detach().double())
        self.register_buffer("classes", classes.clone())
        self.n_classes = int(classes.amax()) + 1

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        exact = self.slopes, self.intercepts
        super()._apply(fn, recurse)
        self.slopes, self.intercepts = (part.to(self.slopes.device) for part in exact)
        return self

    def scores(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch n"]:
        """<a_i, x> + b_i, in float64."""
        return torch.addmm(self.intercepts, x.double(), self.slopes.T)

    def forward(
        self, x: Float[Tensor, "batch d"]
    ) -> tuple[Float[Tensor, "batch classes"], Int[Tensor, "batch classes"]]:
        """The best score of every class, in float64, differentiable in x; and the piece that has it."""
        with torch.no_grad():
            scores = self.scores(x)
            best = torch.stack([self._only(scores, c).argmax(1) for c in range(self.n_classes)], 1)
        if self.temperature:
            scores = self.scores(x) / self.temperature
            soft = [self._only(scores, c).logsumexp(1) for c in range(self.n_classes)]
            return self.temperature * torch.stack(soft, 1), best
        value = torch.einsum("bd,bcd->bc", x.double(), self.slopes[best]) + self.intercepts[best]
        return value, best

    def smoothed(self, factor: float) -> "PowerDiagram":
        """The maxima softened to log sums of exponentials, the more the smaller the factor < 1."""
        spread = float((self.slopes - self.slopes.mean(0)).square().sum(1).mean())
        return PowerDiagram(self.slopes, self.intercepts, self.classes, SOFTENING * spread * (1 / factor - 1))

    def _only(self, scores: Tensor, c: int) -> Tensor:
        return scores.masked_fill(self.classes != c, -torch.inf)

    def distance(
        self,
        x: Float[Tensor, "batch d"],
        label: Int[Tensor, " batch"],
        *,
        box: tuple[Float[Tensor, "#d"], Float[Tensor, "#d"]] | None = None,
        rounding: float = 0.0,
        closer: bool = True,
    ) -> Float[Tensor, " batch"]:
        """How far x is at least from every cell of another class; 0 where it is in one.

        To reach a piece k of another class, x must pass the plane where k scores as high as piece i of the label, for
        every i at once: k keeps away by (<w, s_own> - s_k) / |a_k - sum_i w_i a_i| for any convex weights w. The first
        bounds take the best single i, `closer` looks for the best w, which gives the distance itself where it has found
        it and a bound in any case. Within a box the distance to each plane is that to its part inside the box.

        Args:
            x: points.
            label: whose cells x is in.
            box: the least and the largest value of every coordinate; then only points of the box count. A point outside
                of it is treated as if there were none.
            rounding: relative error of the scores as they are shipped, everywhere within the distance.
            closer: combine planes.

        Returns:
            in float64; 0 where a number is not finite; infinite where no point of another class is in reach.
        """
        x = x.double()
        scores = self.scores(x)
        rate = 2 * (rounding + x.shape[1] * DOUBLE)
        longest, highest = float(self.slopes.norm(dim=1).amax()), float(self.intercepts.abs().amax())
        here = rate * (x.norm(dim=1) * longest + highest) + (SMALLEST if rounding else 0)
        error = _Error(here, rate * longest, 4 * x.shape[1] * DOUBLE * longest**2)
        own = self.classes == label[:, None]
        m = min(OWN, int(torch.bincount(self.classes).amax()))
        mine = scores.masked_fill(~own, -torch.inf).topk(m, dim=1).indices
        mine = torch.where(torch.arange(m, device=x.device) < own.sum(1, keepdim=True), mine, mine[:, :1])
        bounds = self._single(scores, mine[:, :FIRST], error).masked_fill(own, torch.inf)
        order = bounds.topk(min(MOST + 1, len(self.slopes)), dim=1, largest=False)
        # Wrong pieces in the order of their first bounds, until the next one is beyond the least that was proven.
        known, rest = torch.full_like(scores[:, 0], torch.inf), order.values[:, 0].clone()
        rows = torch.arange(len(scores), device=scores.device)
        most = min(MOST, order.indices.shape[1])
        after, step = 0, AT_FIRST
        while after < most:
            here = slice(after, min(after + step, most))
            after, step = here.stop, min(2 * step, AT_ONCE)
            for part in rows.split(ROWS):
                lowest, some = order.values[part, here], error._replace(here=error.here[part])
                planes = _Planes.between(self.slopes, scores[part], mine[part], order.indices[part, here])
                proven = planes.proven(lowest.flatten(), some, x[part], box, closer).reshape(lowest.shape)
                known[part] = known[part].minimum(proven.amin(1))
            rest[rows] = order.values[rows, after] if after < order.values.shape[1] else torch.inf
            rows = rows[(rest[rows] < known[rows]) & (known[rows] > 0)]
            if not len(rows):
                break
        return known.minimum(rest).clamp(min=0).nan_to_num(0, posinf=torch.inf)

    def largest(self, x: Float[Tensor, "batch d"], reach: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """A bound on all scores within the distance `reach` of x; finite distances only."""
        far = x.double().norm(dim=1) + reach.nan_to_num(0, posinf=0)
        return far * self.slopes.norm(dim=1).amax() + self.intercepts.abs().amax()

    def _single(self, scores: Tensor, mine: Int[Tensor, "batch few"], error: "_Error") -> Float[Tensor, "batch n"]:
        """The best bound by a single plane."""
        squares, best = self.slopes.square().sum(1), torch.full_like(scores, -torch.inf)
        for i in mine.T:
            apart = torch.addmm(squares, self.slopes[i], self.slopes.T, alpha=-2) + squares[i][:, None]
            best = best.maximum(error.distance(scores.gather(1, i[:, None]) - scores, apart, error.here[:, None]))
        return best


class _Error(NamedTuple):
    """Of differences of scores: at the point, per unit of distance from it; and of squared distances of slopes."""

    here: Tensor
    growth: float
    square: float

    def distance(self, ahead: Tensor, square: Tensor, here: Tensor) -> Tensor:
        """To where the difference of the scores may be 0."""
        return (ahead - here) / ((square.clamp(min=0) + self.square).sqrt() + self.growth + TINY)


class _Planes(NamedTuple):
    """Of pairs (sample, wrong piece k): normals a_k - a_i to the m own pieces, and how far each of these is ahead."""

    own: Float[Tensor, "batch m d"]  # slopes, less the first own one
    other: Float[Tensor, "batch few d"]  # likewise
    ahead: Float[Tensor, "pairs m"]

    @classmethod
    def between(cls, slopes: Tensor, scores: Tensor, mine: Tensor, k: Tensor) -> "_Planes":
        origin = slopes[mine[:, :1]]
        ahead = scores.gather(1, mine)[:, None] - scores.gather(1, k)[:, :, None]
        return cls(slopes[mine] - origin, slopes[k] - origin, ahead.flatten(0, 1))

    def proven(self, lowest: Tensor, error: _Error, x: Tensor, box: Any, closer: bool) -> Float[Tensor, " pairs"]:
        """How far each k is kept away, at least `lowest`.

        Of mu = mass w, <mu, h> - |G' mu|^2 / 2 is concave, and its maximum is half the squared distance. Weights and
        mass are found in turns, and any of them proves its bound.
        """
        few = self.other.shape[1]
        across = torch.bmm(self.other, self.own.transpose(1, 2))
        Q = torch.bmm(self.own, self.own.transpose(1, 2))[:, None] + self.other.square().sum(2)[:, :, None, None]
        Q = (Q - across[:, :, :, None] - across[:, :, None]).flatten(0, 1)
        here, square = error.here.repeat_interleave(few), Q.diagonal(dim1=1, dim2=2)
        single, chosen = error.distance(self.ahead, square, here[:, None]).max(1, keepdim=True)
        best = lowest.maximum(single.squeeze(1))
        weights = torch.zeros_like(self.ahead).scatter(1, chosen, 1.0)
        mass = (self.ahead.gather(1, chosen) / square.gather(1, chosen).clamp(min=TINY)).squeeze(1)
        if box is not None:
            best = best.maximum(self._boxed(weights, error, x, box))
        rows = ((best > 0) & (best < torch.inf) & mass.isfinite() & (mass > 0)).nonzero().squeeze(1)
        for _ in range(SCALINGS if closer else 0):
            if not len(rows):
                break
            w = solve_simplex_qp(Q[rows] * mass[rows, None, None], self.ahead[rows]).weights
            height, length = (w * self.ahead[rows]).sum(1), torch.einsum("bi,bij,bj->b", w, Q[rows], w)
            found, before = error.distance(height, length, here[rows]), single[rows, 0]
            weights[rows], mass[rows] = w, height / length.clamp(min=TINY)
            best[rows], single[rows, 0] = best[rows].maximum(found), before.maximum(found)
            rows = rows[(found > before * (1 + ENOUGH)) & (mass[rows] > 0)]
        if box is not None and closer:
            best = best.maximum(self._boxed(weights, error, x, box))
        return best

    def _boxed(self, weights: Tensor, error: _Error, x: Tensor, box: Any) -> Float[Tensor, " pairs"]:
        """Distance to the planes of these weights within the box, from below.

        The nearest point is that of x + t g, its coordinates cut to the box, for the least t that reaches the plane;
        what is gained is concave in t, so that Newton's steps from below stay below.
        """
        few = self.other.shape[1]
        x = x.repeat_interleave(few, 0)
        combined = torch.bmm(weights.unflatten(0, (-1, few)), self.own)
        g = (self.other - combined).flatten(0, 1)
        corner = torch.maximum(box[0].abs(), box[1].abs()).expand(x.shape[1]).norm()
        # Scores are as wrong as in the farthest corner, at most.
        farthest = error.here.repeat_interleave(few) + error.growth * (corner + x.norm(dim=1))
        height = (weights * self.ahead).sum(1) - farthest
        t = (height / g.square().sum(1).clamp(min=TINY)).clamp(max=MOST_STEP)
        for _ in range(NEWTON):
            moved = x + t[:, None] * g
            gained = ((moved.clamp(box[0], box[1]) - x) * g).sum(1)
            # Also a coordinate on the edge that it leaves is free.
            slope = (g.square() * torch.where(g > 0, moved < box[1], moved > box[0])).sum(1)
            short = (gained < height) & (slope > 0)
            t = torch.where(short, t + (height - gained) / slope.clamp(min=TINY), t)
        distance = ((x + t[:, None] * g).clamp(box[0], box[1]) - x).norm(dim=1)
        inside = ((x >= box[0]) & (x <= box[1])).all(1)
        return torch.where(inside & (height > 0), distance * (1 - SHORT), 0)
