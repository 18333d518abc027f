"""Moreau envelope of a maximum of many affine functions, evaluated exactly by a working set.

    f(x) = min_y max_i [<s_i, y> + a_i] + (M/2) |x - y|^2
         = max over the simplex of  w . (S x + a) - |S' w|^2 / (2M),

a convex function with M-Lipschitz gradient g = S' w, whatever the slopes s_i and the offsets a_i are. The maximiser is
found on few pieces and proved on all: at y = x - g / M none may exceed those that carry weight.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip.simplex_qp import along_face, solve_simplex_qp
from otad.cip.sketch import Sketch
from otad.cip.solution import Status

__all__ = ["EnvelopeSolution", "MoreauEnvelope", "Step"]

FIRST = 8  # pieces for a guess of y
FEW, MANY, PER_PIECE = 8, 24, 2500  # then added to them: one in so many, as a look at few pieces costs little
MAX_ROUNDS, MANY_ROUNDS = 40, 12  # from so many rounds on, more pieces are added
DENSE = 16  # where the sketch leaves more than one of so many pieces, all are computed
SCORES = 2**24  # values of all pieces held at a time
SOLVER_GAP = 1e-12  # of the small programmes, relative to their scale
LIKELY = 24  # pieces looked at first for one that exceeds the threshold
CACHE = 2**20  # bytes of slopes worked on at a time: what a core holds near itself


@dataclass(frozen=True)
class EnvelopeSolution:
    """Rows are queries; `value` and `gradient` are differentiable in x, slopes and offsets.

    Attributes:
        value: f(x), shape (batch,), float64.
        gradient: g = grad f(x), shape (batch, d).
        indices: pieces that may carry weight, shape (batch, k).
        weights: their weights, shape (batch, k), float64, summing to 1.
        gap: duality gap over all n pieces, with rounding, shape (batch,): |value - f(x)| <= gap, and the error of the
            gradient is at most sqrt(2 M gap).
        status: CONVERGED where no piece is violated beyond rounding; INFEASIBLE where x is not finite.
        rounds: times that all n pieces were looked at for a proof.
    """

    value: Float[Tensor, " batch"]
    gradient: Float[Tensor, "batch d"]
    indices: Int[Tensor, "batch k"]
    weights: Float[Tensor, "batch k"]
    gap: Float[Tensor, " batch"]
    status: Int[Tensor, " batch"]
    rounds: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Step:
    """Optimum over few pieces, row by row; `inside` are the values of these pieces at y."""

    indices: Int[Tensor, "rows k"]
    weights: Float[Tensor, "rows k"]
    gradient: Float[Tensor, "rows d"]
    y: Float[Tensor, "rows d"]
    inside: Float[Tensor, "rows k"]
    rounding: Float[Tensor, " rows"]
    scale: Float[Tensor, " rows"]

    @property
    def threshold(self) -> Float[Tensor, " rows"]:
        return self.inside.amax(1) + self.rounding


class MoreauEnvelope(nn.Module):
    """The function above as a module with buffers.

    Args:
        slopes: s_i, shape (n, d); best centred.
        offsets: a_i, shape (n,), kept in float64, without `shift`.
        M: smoothness.
        shift: a number near the offsets; their median where it is not given.
    """

    slopes: Tensor
    offsets: Tensor
    rows_at_once = 2048  # queries worked on together

    def __init__(
        self, slopes: Float[Tensor, "n d"], offsets: Float[Tensor, " n"], M: float, shift: float | None = None
    ) -> None:
        super().__init__()
        # What all offsets share costs them digits and moves the value alone.
        self.shift = float(offsets.detach().double().median()) if shift is None else shift
        self.register_buffer("slopes", slopes.double().contiguous(), persistent=False)
        self.register_buffer("offsets", offsets.double() - self.shift, persistent=False)
        self.M = float(M)
        self._sketch: Sketch | None = None
        self._sketched: tuple[int, ...] = ()  # versions of slopes and offsets that the sketch is of

    def _apply(self, fn, recurse=True):  # type: ignore[override]
        """Moves the module; it stays in float64: in float32 near points make the small programmes indefinite."""
        exact = self.slopes, self.offsets
        super()._apply(fn, recurse)
        self.slopes, self.offsets = (part.to(self.slopes.device) for part in exact)
        self._sketch = None
        return self

    @property
    def sketch(self) -> Sketch:
        """Made when first used, and again where slopes or offsets were changed in place since."""
        if self._sketch is None or self._sketched != self._versions():
            self._sketch, self._sketched = Sketch(self.slopes, self.offsets), self._versions()
        return self._sketch

    def _versions(self) -> tuple[int, ...]:
        return tuple(-1 if part.is_inference() else part._version for part in (self.slopes, self.offsets))

    def smoothed(self, factor: float) -> "MoreauEnvelope":
        """The same pieces under the smoothness factor * M."""
        wider = MoreauEnvelope(self.slopes, self.offsets + self.shift, factor * self.M, self.shift)
        wider._sketch, wider._sketched = self.sketch, wider._versions()
        return wider

    def forward(self, x: Float[Tensor, "batch d"]) -> EnvelopeSolution:
        """f, its gradient and the proof of exactness at x, in float64.

        Args:
            x: queries.
        """
        x = x.double()
        with torch.no_grad():
            found = _joined([self._solution(part) for part in x.detach().split(self.rows_at_once)])
        value, gradient = _Differentiable.apply(self, x, self.slopes, self.offsets, found)
        return replace(found, value=value, gradient=gradient)

    def _solution(self, x: Float[Tensor, "batch d"]) -> EnvelopeSolution:
        finite = x.isfinite().all(1)
        unusable = (~finite).nonzero().squeeze(1)
        done = [(unusable, self._nothing(len(unusable)))]
        rows, x = finite.nonzero().squeeze(1), x[finite]
        indices = rows[:, None]
        if len(x):
            # What the first guess rests on stays: the pieces that are largest at its y alone would lead astray.
            guess = self._solve(x, self._likely(x, FIRST, self.M))
            indices = _distinct(torch.cat([_kept(guess), self._likely(guess.y, self._second, torch.inf)], 1))
        round_ = 0
        while len(x):
            round_ += 1
            step = self._solve(x, indices)
            more = max(FEW, self._second // 2) * (1 if round_ < MANY_ROUNDS else 4)
            top, fresh = self._outside(step, more, everything=round_ == MAX_ROUNDS)
            stop = (top == -torch.inf) | (round_ == MAX_ROUNDS)
            done.append((rows[stop], self._ended(step, top, round_, stop)))
            rows, x = rows[~stop], x[~stop]
            # The value rises from round to round, so pieces without weight can go and none comes round in a circle.
            indices = torch.cat([_kept(step, ~stop), fresh[~stop]], 1)
        joined = _joined([part for _, part in done])
        order = torch.cat([places for places, _ in done]).argsort()
        return EnvelopeSolution(*(getattr(joined, field.name)[order] for field in fields(EnvelopeSolution)))

    def _solve(self, x: Float[Tensor, "rows d"], indices: Int[Tensor, "rows k"]) -> Step:
        """The small programme on chosen pieces, -1 for none, and their values at its y."""
        none = indices < 0
        slopes, offsets, places = self._held(torch.where(none, indices[:, :1], indices))
        Q, c, tilt, mean = self._products(x, slopes, places)
        c = c - tilt + offsets[places]
        # A copy of the first piece, so far below it that it carries no weight.
        c = torch.where(none, c - (c.amax(1) - c.amin(1) + Q.diagonal(dim1=1, dim2=2).amax(1) + 1)[:, None], c)
        optimum = solve_simplex_qp(Q, c)
        weights = optimum.weights
        gradient = _combined(weights, slopes, places)
        y = x - gradient / self.M
        inside = c - (Q @ weights[:, :, None]).squeeze(2) + torch.linalg.vecdot(mean, y)[:, None]
        length = torch.linalg.vector_norm(y, dim=1) + torch.linalg.vector_norm(x, dim=1)
        slope_size, offset_size = self._sizes()
        size = (
            1
            + slope_size * length
            + offset_size
            + Q.diagonal(dim1=1, dim2=2).amax(1)
            + gradient.square().sum(1) / self.M
        )
        rounding = 64 * torch.finfo(x.dtype).eps * size
        return Step(indices, weights, gradient, y, inside, rounding, optimum.scale)

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """The largest norm of a slope, and the largest offset beside their median."""
        return self.sketch.slope_scale, self.sketch.offset_scale

    @property
    def _second(self) -> int:
        return min(max(len(self.slopes) // PER_PIECE, FEW), MANY)

    def _likely(self, x: Float[Tensor, "rows d"], k: int, M: float) -> Int[Tensor, "rows k"]:
        return self.sketch.likely(x, min(k, len(self.slopes)), M)

    def _held(self, indices: Int[Tensor, "rows k"]) -> tuple[Tensor, Tensor, Int[Tensor, "rows k"]]:
        """Slopes and offsets that hold these pieces, and their places among them."""
        return self.slopes, self.offsets, indices

    def _products(
        self, x: Tensor, slopes: Tensor, places: Int[Tensor, "rows k"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of chosen slopes, each row's centred (c_i = s_i - mean): smaller numbers, the same maximiser.

        Returns:
            <c_i, c_j> / M (rows, k, k), <c_i, x> and <c_i, mean> / M (rows, k), and mean (rows, d).
        """
        (rows, k), d = places.shape, x.shape[1]
        Q, along = x.new_empty(rows, k, k), x.new_empty(rows, k, 2)
        both = torch.stack([x, x], 2)
        at_once = rows if x.is_cuda else CACHE // (k * d * x.element_size())
        # In portions that are read from memory once.
        for start in range(0, rows, max(1, at_once)):
            part = slice(start, start + max(1, at_once))
            S = slopes[places[part]]
            both[part, :, 1] = S.mean(1)
            S.sub_(both[part, None, :, 1])
            torch.bmm(S, S.transpose(1, 2), out=Q[part])
            torch.bmm(S, both[part], out=along[part])
        return Q.div_(self.M), along[:, :, 0], along[:, :, 1] / self.M, both[:, :, 1]

    def _outside(
        self, step: Step, more: int, everything: bool
    ) -> tuple[Float[Tensor, " rows"], Int[Tensor, "rows more"]]:
        """Of the pieces that exceed the threshold at y: the largest value, -inf for none, and the first few, -1 fills.

        Where none of the likeliest does, or with `everything`, every piece that the sketch cannot rule out is computed.
        """
        found = self.sketch.above(step.y, step.threshold, most=len(step.y) * len(self.slopes) / DENSE)
        if found is None:
            return self._outside_dense(step, more)
        row, piece, bound = found
        row, order, place = _by_row(row, bound)
        piece, likely = piece[order], (place < LIKELY) | everything
        top, fresh = self._violated(step, row[likely], piece[likely], more)
        rest = ~likely & (top == -torch.inf)[row]
        top_rest, fresh_rest = self._violated(step, row[rest], piece[rest], more)
        return torch.maximum(top, top_rest), torch.maximum(fresh, fresh_rest)

    def _outside_dense(self, step: Step, more: int) -> tuple[Tensor, Tensor]:
        """`_outside` by the values of all pieces, where the sketch says little."""
        parts = []
        rows = max(1, SCORES // len(self.slopes))
        for y, threshold in zip(step.y.split(rows), step.threshold.split(rows), strict=True):
            values = torch.addmm(self.offsets, y, self.slopes.T)
            best = values.topk(min(more, values.shape[1]), dim=1)
            violated = best.values > threshold[:, None]
            fresh = nn.functional.pad(
                torch.where(violated, best.indices, -1), (0, more - best.indices.shape[1]), value=-1
            )
            parts.append((torch.where(violated[:, 0], best.values[:, 0], -torch.inf), fresh))
        top, fresh = (torch.cat(column) for column in zip(*parts, strict=True))
        return top, fresh

    def _violated(self, step: Step, row: Tensor, piece: Tensor, more: int) -> tuple[Tensor, Tensor]:
        """`_outside` for the given pairs (row, piece)."""
        value = torch.empty(len(row), dtype=torch.float64, device=row.device)
        for part in torch.arange(len(row), device=row.device).split(max(1, CACHE // (16 * step.y.shape[1]))):
            value[part] = torch.linalg.vecdot(step.y[row[part]], self.slopes[piece[part]])
        value += self.offsets[piece]
        violated = value > step.threshold[row]
        row, piece, value = row[violated], piece[violated], value[violated]
        row, order, place = _by_row(row, value)
        piece, value = piece[order], value[order]
        first, best = place < more, place == 0
        fresh = torch.full((len(step.y), more), -1, dtype=torch.long, device=row.device)
        fresh[row[first], place[first]] = piece[first]
        top = torch.full_like(step.rounding, -torch.inf)
        top[row[best]] = value[best]
        return top, fresh

    def _ended(self, step: Step, top: Tensor, round_: int, stop: Tensor) -> EnvelopeSolution:
        attained = (step.weights * step.inside).sum(1)
        # What rounding may hide counts as gap, so that bounds made of it hold as they stand.
        gap = (torch.maximum(top, step.inside.amax(1)) - attained).clamp(min=0) + step.rounding
        exact = gap <= 2 * step.rounding + SOLVER_GAP * step.scale
        gap = gap + torch.finfo(gap.dtype).eps * abs(self.shift)
        indices = _kept(step, stop)
        indices = torch.where(indices < 0, indices[:, :1], indices)
        return EnvelopeSolution(
            value=(attained + step.gradient.square().sum(1) / (2 * self.M))[stop] + self.shift,
            gradient=step.gradient[stop],
            indices=indices,
            weights=step.weights[stop].topk(indices.shape[1], dim=1).values,
            gap=gap[stop],
            status=torch.where(exact, int(Status.CONVERGED), int(Status.MAX_STEPS))[stop],
            rounds=torch.full_like(step.indices[stop, 0], round_),
        )

    def _nothing(self, rows: int) -> EnvelopeSolution:
        nan = self.slopes.new_full((rows, self.slopes.shape[1]), torch.nan)
        zeros = torch.zeros(rows, 1, dtype=torch.long, device=nan.device)
        status = torch.full_like(zeros[:, 0], int(Status.INFEASIBLE))
        return EnvelopeSolution(nan[:, 0], nan, zeros, nan[:, :1], nan[:, 0], status, zeros[:, 0])


class _Differentiable(torch.autograd.Function):
    """Gives value and gradient, which are known, their derivatives.

    With w the weights, g = S'w and y = x - g / M, the implicit function theorem on the active face gives for
    cotangents (v, h) of (value, gradient): the weights move by m, the solution of (S S' / M) m = S h on the face with
    sum m = 0; then x gets v g + S'm, s_i gets w_i (v y + h - S'm / M) + m_i y, and a_i gets v w_i + m_i.
    """

    @staticmethod
    def forward(
        ctx: Any, envelope: MoreauEnvelope, x: Tensor, slopes: Tensor, offsets: Tensor, found: EnvelopeSolution
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, found.indices, found.weights, found.gradient, slopes)
        ctx.envelope = envelope
        return found.value.clone(), found.gradient.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # `once_differentiable` looks at the cotangents alone, but what was saved depends on x as well: without a mark
        # a second derivative would silently be 0 instead of an error.
        return _Differentiable._backward(ctx, v.detach().requires_grad_(torch.is_grad_enabled()), h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def _backward(ctx: Any, v: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, weights, gradient, slopes = ctx.saved_tensors
        M = ctx.envelope.M
        # Rows without a solution have no derivative.
        none = weights.isnan().any(1, keepdim=True)
        x, weights, gradient, h = (t.masked_fill(none, 0.0) for t in (x, weights, gradient, h))
        v = v.masked_fill(none[:, 0], 0.0)
        held, _, places = ctx.envelope._held(indices)
        Q, along, *_ = ctx.envelope._products(h, held, places)
        moved = along_face(Q, along, weights > 0).masked_fill(none, 0.0)
        lift = _combined(moved, held, places)
        of_slopes = of_offsets = None
        if ctx.needs_input_grad[2]:
            y = x - gradient / M
            rows = weights[:, :, None] * (v[:, None] * y + h - lift / M)[:, None] + moved[:, :, None] * y[:, None]
            of_slopes = torch.zeros_like(slopes).index_put_((indices,), rows, accumulate=True)
        if ctx.needs_input_grad[3]:
            rows = v[:, None] * weights + moved
            of_offsets = torch.zeros_like(slopes[:, 0]).index_put_((indices,), rows, accumulate=True)
        return None, v[:, None] * gradient + lift, of_slopes, of_offsets, None


def _combined(
    weights: Float[Tensor, "rows k"], slopes: Float[Tensor, "n d"], places: Int[Tensor, "rows k"]
) -> Float[Tensor, "rows d"]:
    return nn.functional.embedding_bag(places, slopes, mode="sum", per_sample_weights=weights)


def _by_row(row: Int[Tensor, " m"], value: Float[Tensor, " m"]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in order, the order itself, with values falling within a row, and each one's place within its row."""
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    return row, order, torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)


def _kept(step: Step, rows: Tensor | None = None) -> Int[Tensor, "rows active"]:
    """The pieces with weight, as many columns as the row with most of them needs."""
    weights, indices = (step.weights, step.indices) if rows is None else (step.weights[rows], step.indices[rows])
    width = int((weights > 0).sum(1).amax()) if len(weights) else 1
    return indices.gather(1, weights.topk(max(width, 1), dim=1).indices)


def _distinct(indices: Int[Tensor, "rows k"]) -> Int[Tensor, "rows k"]:
    """Each piece once in a row, -1 in the place of repetitions."""
    ordered = indices.sort(dim=1, descending=True).values  # at least the first is a piece
    again = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:] = torch.where(again, -1, ordered[:, 1:])
    return ordered


def _joined(parts: list[EnvelopeSolution]) -> EnvelopeSolution:
    """One batch; narrower parts repeat their first piece with weight 0, which changes nothing."""
    width = max(part.indices.shape[1] for part in parts)
    columns = {}
    for field in fields(EnvelopeSolution):
        tensors = [getattr(part, field.name) for part in parts]
        if field.name == "indices":
            tensors = [torch.cat([t, t[:, :1].expand(-1, width - t.shape[1])], 1) for t in tensors]
        if field.name == "weights":
            tensors = [nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]
        columns[field.name] = torch.cat(tensors)
    return EnvelopeSolution(**columns)
