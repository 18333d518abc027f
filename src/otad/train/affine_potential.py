"""A potential whose affine pieces are learned: max(|l|, L)-Lipschitz gradient whatever their values."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import BrenierPotential, Regularity
from otad.cip.simplex_qp import along_face, solve_simplex_qp

__all__ = ["AffinePotential"]

FIRST, MORE = 8, 8  # pieces for a guess of y, and exchanged per round
ROUNDS = 4
RIDGE = 16  # on the diagonal of a small programme, in units of rounding
ROUNDING = 1e-5  # of scores in float32, relative to their size


class AffinePotential(nn.Module):
    """The lower extreme potential of n learned pieces; a fast path of `BrenierPotential` for training.

        phi(x) = l |x|^2 / 2 + min_g max_i [c_i + <s_i, x> + |g - s_i|^2 / (2M)],   M = L - l,   s_i = z_i - l x_i

    The points x_i stay; features z_i and intercepts c_i are parameters. Where the values
    phi_i = c_i + <s_i, x_i> + l |x_i|^2 / 2 satisfy the pair inequalities of F(l, L), the gradient at x_i is z_i;
    where they do not, the function is as smooth all the same.

    The fast path scores the pieces in float32 and solves for `candidates` of them, exchanging those without weight for
    violated ones up to four times. It is exact, up to float32, where the maximiser has no more than `candidates` - 8
    pieces; there is no proof. `fixed()` is evaluated with one.

    Args:
        x: points, shape (n, d).
        z: their features at the start, shape (n, d).
        values: phi(x_i) at the start, shape (n,).
        regularity: numbers l < L.
        candidates: pieces in a small programme; at least 9.

    Raises:
        ValueError: shapes that do not fit, or too few candidates.
    """

    x: Tensor

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        z: Float[Tensor, "n d"],
        values: Float[Tensor, " n"],
        regularity: Regularity,
        candidates: int = 20,
    ) -> None:
        super().__init__()
        if x.ndim != 2 or x.shape != z.shape or len(values) != len(x) or len(x) == 0:
            shapes = ", ".join(str(tuple(part.shape)) for part in (x, z, values))
            raise ValueError(f"x and z must be (n, d) and values (n,), n >= 1; got {shapes}")
        if candidates <= MORE:
            raise ValueError(f"candidates must be more than {MORE}; got {candidates}")
        self.regularity, self.candidates = regularity, candidates
        self.register_buffer("x", x.detach().clone())
        self.features = nn.Parameter(z.detach().to(x).clone())
        self.intercepts = nn.Parameter((values.detach().double() - self._rise()).to(x))

    @classmethod
    def of(cls, potential: BrenierPotential, candidates: int = 20) -> "AffinePotential":
        """Started from a fitted potential, its curvatures divided by max(|l|, L) so that its map is 1-Lipschitz."""
        bounds, factor = potential.regularity, potential.lipschitz
        scaled = Regularity(float(bounds.l) / factor, float(bounds.L) / factor)
        z, values = potential.z / factor, potential.potentials / factor
        return cls(potential.x, z, values, scaled, candidates)

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """Features grad phi(x); differentiable once in x, features and intercepts."""
        l, M = float(self.regularity.l), float(self.regularity.curvature_range)
        slopes = self.features - l * self.x
        offsets = self.intercepts + slopes.square().sum(1) / (2 * M)
        return _Gradient.apply(x, slopes, offsets, M, self.candidates) + l * x  # type: ignore[operator]

    def fixed(self) -> BrenierPotential:
        """The same potential, its lower branch evaluated exactly and with a proof."""
        values = self.intercepts.detach().double() + self._rise()
        return BrenierPotential(self.x.clone(), self.features.detach().clone(), values, self.regularity)

    def _rise(self) -> Float[Tensor, " n"]:
        """phi_i - c_i = <s_i, x_i> + l |x_i|^2 / 2 = <z_i, x_i> - l |x_i|^2 / 2, in float64."""
        x, z = self.x.double(), self.features.detach().double()
        return (z * x).sum(1) - float(self.regularity.l) / 2 * x.square().sum(1)


class _Gradient(torch.autograd.Function):
    """g = S' w, w the maximiser of w . (S x + a) - |S' w|^2 / (2M) over the simplex.

    For a cotangent h of g, the weights move by m, the solution of (S S' / M) m = S h on the face with sum m = 0; then x
    gets S' m, s_i gets w_i (h - S' m / M) + m_i y with y = x - g / M, and a_i gets m_i.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor, offsets: Tensor, M: float, candidates: int) -> Tensor:
        indices, weights, gradient = _working_set(x, slopes, offsets, M, candidates)
        ctx.save_for_backward(x, slopes, indices, weights, gradient)
        ctx.M = M
        return gradient.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, slopes, indices, weights, gradient = ctx.saved_tensors
        centred, _, Q = _products(slopes, indices, ctx.M)
        along = torch.bmm(centred, h[:, :, None]).squeeze(2).double()
        moved = along_face(Q, along, weights > 0).to(x)
        lift = _combined(moved, slopes, indices)
        of_slopes = of_offsets = None
        if ctx.needs_input_grad[1]:
            pull, y = h - lift / ctx.M, x - gradient / ctx.M
            rows = weights[:, :, None] * pull[:, None] + moved[:, :, None] * y[:, None]
            of_slopes = torch.zeros_like(slopes).index_add_(0, indices.flatten(), rows.flatten(0, 1))
        if ctx.needs_input_grad[2]:
            of_offsets = torch.zeros_like(slopes[:, 0]).index_add_(0, indices.flatten(), moved.flatten())
        return lift, of_slopes, of_offsets, None, None


def _working_set(
    x: Float[Tensor, "batch d"], slopes: Float[Tensor, "n d"], offsets: Float[Tensor, " n"], M: float, candidates: int
) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"], Float[Tensor, "batch d"]]:
    """Pieces, their weights and the gradient; as many columns as the row with most active pieces needs."""
    if len(slopes) <= candidates:
        indices = torch.arange(len(slopes), device=x.device).expand(len(x), -1)
        return _trimmed(indices, *_solve(x, slopes, offsets, indices, M))
    alone = torch.addmm(offsets - slopes.square().sum(1) / (2 * M), x, slopes.T)
    _, near = _solve(x, slopes, offsets, alone.topk(FIRST, dim=1).indices, M)
    indices = torch.addmm(offsets, x - near / M, slopes.T).topk(candidates, dim=1).indices
    weights, gradient = _solve(x, slopes, offsets, indices, M)
    rows = torch.arange(len(x), device=x.device)
    for _ in range(ROUNDS):
        scores = torch.addmm(offsets, x[rows] - gradient[rows] / M, slopes.T)
        kept = indices[rows].gather(1, weights[rows].topk(candidates - MORE, dim=1).indices)
        inside = scores.gather(1, kept).amax(1)
        violated = scores.amax(1) > inside + ROUNDING * (1 + inside.abs())
        rows, kept, scores = rows[violated], kept[violated], scores[violated]
        if not len(rows):
            break
        # Those that stay must not come in twice: equal pieces share their weight in no definite way.
        fresh = scores.scatter(1, kept, -torch.inf).topk(MORE, dim=1).indices
        indices[rows] = torch.cat([kept, fresh], 1)
        weights[rows], gradient[rows] = _solve(x[rows], slopes, offsets, indices[rows], M)
    return _trimmed(indices, weights, gradient)


def _solve(
    x: Float[Tensor, "rows d"],
    slopes: Float[Tensor, "n d"],
    offsets: Float[Tensor, " n"],
    indices: Int[Tensor, "rows k"],
    M: float,
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, "rows d"]]:
    """Weights of chosen pieces, and the gradient."""
    centred, mean, Q = _products(slopes, indices, M)
    along = torch.bmm(centred, (x - mean / M)[:, :, None]).squeeze(2)
    weights = solve_simplex_qp(Q, along.double() + offsets[indices].double()).weights.to(x)
    return weights, _combined(weights, slopes, indices)


def _products(slopes: Float[Tensor, "n d"], indices: Int[Tensor, "rows k"], M: float) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen slopes centred, which keeps the maximiser and the digits, their means, and <c_i, c_j> / M in float64."""
    centred = slopes[indices]
    mean = centred.mean(1, keepdim=True)
    centred -= mean
    Q = torch.bmm(centred, centred.transpose(1, 2)).double() / M
    diagonal = Q.diagonal(dim1=1, dim2=2)
    # Rounded products of near slopes may be indefinite, where a step on the face could be of any size.
    diagonal += RIDGE * torch.finfo(slopes.dtype).eps * diagonal.amax(1, keepdim=True)
    return centred, mean.squeeze(1), Q


def _trimmed(indices: Tensor, weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without the columns that no row needs."""
    best = weights.topk(int((weights > 0).sum(1).amax().clamp(min=1)), dim=1)
    return indices.gather(1, best.indices), best.values, gradient


def _combined(
    weights: Float[Tensor, "rows k"], slopes: Float[Tensor, "n d"], indices: Int[Tensor, "rows k"]
) -> Float[Tensor, "rows d"]:
    return nn.functional.embedding_bag(indices, slopes, mode="sum", per_sample_weights=weights)
