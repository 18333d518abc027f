"""What a neighbourhood's inner products decide, with the points read once forward and once backward.

The weights of an interpolant depend on the points through k x k inner products alone. So the adjoint first runs
through the small problem, and then turns the gradients of its inner products into gradients of the points, all
together, by one (2k, 2k + 2) matrix a query.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from otad.cip.gram import InnerProducts, check_points, inner_products, piece_rows

__all__ = ["MEMORY", "rows_at_once", "through_products"]

MEMORY = 2**28  # bytes for the small problems that are solved together
SMALL_ARRAYS = 32  # (k, k) float64 arrays that a small problem holds at its peak, with what the allocator keeps
Parameter = float | Tensor  # a number, or a tensor whose first axis is the batch (or of no axes)
Solve = Callable[..., tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]]


def rows_at_once(k: int, memory: int) -> int:
    """Queries whose small problems fit into `memory` bytes together; at least one."""
    return max(1, memory // (8 * SMALL_ARRAYS * k * k))


def through_products(
    solve: Solve,
    x: Float[Tensor, "batch d"] | None,
    x_i: Float[Tensor, "batch k d"],
    z_i: Float[Tensor, "batch k d"],
    parameters: tuple[Parameter, ...],
    distances: bool,
    memory: int,
) -> tuple[Tensor, ...]:
    """Solve in chunks of rows what depends on the points through inner products, and combine the points.

    Args:
        solve: (InnerProducts, *parameters) -> weights w (rows, k) or None, pull p (rows, k) or None, and further
            results, differentiable where they are floating-point numbers.
        x: the queries; None takes each neighbourhood's first point as origin.
        x_i: neighbours.
        z_i: their features.
        parameters: numbers, or tensors per row.
        distances: whether `solve` needs `InnerProducts.dd`.
        memory: bytes for the chunk's small problems.

    Returns:
        sum_i w_i z_i - p_i x_i, shape (batch, d), in the dtype of the points, if there are weights; then the further
        results. All are differentiable once in x, x_i, z_i and the parameters.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_points(x, x_i, z_i)
    tensors = (part for part in (x, x_i, z_i, *parameters) if isinstance(part, Tensor))
    if torch.is_grad_enabled() and any(part.requires_grad for part in tensors):
        return _ThroughProducts.apply(solve, distances, memory, x, x_i, z_i, *parameters)
    chunks = _row_chunks(x_i, memory)
    parts = [_solved(solve, distances, rows, x, x_i, z_i, parameters)[0] for rows in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class _Small:
    """One chunk's small problem with its graph: what backward runs through."""

    rows: slice
    products: InnerProducts
    parameters: dict[int, Tensor]  # those that want gradients, by position
    weights: Tensor | None
    pull: Tensor | None
    results: tuple[Tensor, ...]

    def gradients(self, grads: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Of the inner products (zz, zd, tilt, dd) and of the parameters, from those of weights, pull and results."""
        outputs = [self.weights, self.pull, *self.results]
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
        points = self.products
        leaves = [leaf for leaf in (points.zz, points.zd, points.tilt, points.dd) if leaf is not None]
        leaves += list(self.parameters.values())
        if not pairs:
            found: list[Tensor | None] = [None] * len(leaves)
        else:
            # The graph stays, so that a caller may run backward twice.
            outs, of_outs = zip(*pairs, strict=True)
            found = list(torch.autograd.grad(outs, leaves, of_outs, retain_graph=True, allow_unused=True))
        own = found[len(leaves) - len(self.parameters) :]
        of_points = found[: len(leaves) - len(self.parameters)]
        return of_points + [None] * (4 - len(of_points)), own


def _row_chunks(x_i: Tensor, memory: int) -> list[slice]:
    step = rows_at_once(x_i.shape[1], memory)
    return [slice(start, start + step) for start in range(0, max(len(x_i), 1), step)]


def _solved(
    solve: Solve,
    distances: bool,
    rows: slice,
    x: Tensor | None,
    x_i: Tensor,
    z_i: Tensor,
    parameters: tuple[Parameter, ...],
    wanted: tuple[bool, ...] | None = None,
) -> tuple[tuple[Tensor, ...], _Small]:
    """Results of one chunk, with the graph of its small problem where `wanted` says whose gradients are."""
    with torch.no_grad():
        products = inner_products(None if x is None else x[rows], x_i[rows], z_i[rows], distances)
    own = [p[rows] if isinstance(p, Tensor) and p.ndim else p for p in parameters]
    leaves: dict[int, Tensor] = {}
    if wanted is not None:
        for part in (products.zz, products.zd, products.tilt, products.dd):
            if part is not None:
                part.requires_grad_()
        leaves = {i: p.detach().requires_grad_() for i, p in enumerate(own) if wanted[i] and isinstance(p, Tensor)}
        own = [leaves.get(i, p) for i, p in enumerate(own)]
    with torch.set_grad_enabled(wanted is not None):
        weights, pull, results = solve(products, *own)
    small = _Small(rows, products, leaves, weights, pull, results)
    values = tuple(result.detach() for result in results)
    if weights is None:
        return values, small
    with torch.no_grad():
        z = _combined(weights, z_i[rows])
        if pull is not None:
            z -= _combined(pull, x_i[rows])
    return (z, *values), small


def _combined(weights: Float[Tensor, "batch k"], points: Float[Tensor, "batch k d"]) -> Float[Tensor, "batch d"]:
    return (weights.to(points.dtype)[:, None] @ points).squeeze(1)


class _ThroughProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        solve: Solve,
        distances: bool,
        memory: int,
        x: Tensor | None,
        x_i: Tensor,
        z_i: Tensor,
        *parameters: Parameter,
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[6:]
        found = [_solved(solve, distances, rows, x, x_i, z_i, parameters, wanted) for rows in _row_chunks(x_i, memory)]
        ctx.smalls = [small for _, small in found]
        ctx.save_for_backward(x, x_i, z_i, *(p if isinstance(p, Tensor) else None for p in parameters))
        values = tuple(torch.cat(column) for column in zip(*(values for values, _ in found), strict=True))
        ctx.mark_non_differentiable(*(value for value in values if not value.is_floating_point()))
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_i, z_i, *parameters = ctx.saved_tensors
        to_x, to_x_i, to_z_i, *to_parameters = (
            None if not want else torch.empty_like(part) if part is x_i or part is z_i else torch.zeros_like(part)
            for part, want in zip((x, x_i, z_i, *parameters), ctx.needs_input_grad[3:], strict=True)
        )
        if x is None and to_x_i is not None:  # the origin is the first point
            to_x = torch.empty_like(x_i[:, 0])
        for small in ctx.smalls:
            rows = small.rows
            own = [None if grad is None else grad[rows] for grad in grads]
            to_w = to_p = grad_z = None
            if small.weights is not None and (grad_z := own.pop(0)) is not None:
                to_w = (z_i[rows] @ grad_z[:, :, None]).squeeze(2).to(small.weights)
                if small.pull is not None:
                    to_p = -(x_i[rows] @ grad_z[:, :, None]).squeeze(2).to(small.pull)
            of_products, of_parameters = small.gradients([to_w, to_p, *own])
            for i, grad in zip(small.parameters, of_parameters, strict=True):
                if grad is not None:
                    target = to_parameters[i]
                    (target[rows] if target.ndim else target).add_(grad)
            origin = x_i[rows, 0] if x is None else x[rows]
            targets = (None if part is None else part[rows] for part in (to_x, to_x_i, to_z_i))
            _to_points(_matrix(small, of_products), grad_z, origin, x_i[rows], z_i[rows], *targets)
        if x is None and to_x_i is not None and to_x is not None:
            to_x_i[:, 0] += to_x
            to_x = None
        return (None, None, None, to_x, to_x_i, to_z_i, *to_parameters)


def _matrix(small: _Small, grads: list[Tensor | None]) -> Float[Tensor, "batch r c"]:
    """Gradients of z_i (k rows), x_i (k rows) and x (one row) as combinations of [z_i - mean, x - x_i, mean, grad_z].

    From zz = zc zc', zd = zc delta', dd = delta delta', tilt = delta mean, with zc_i = z_i - mean, delta_i = x - x_i.
    """
    products = small.products
    zz, zd, tilt, dd = (
        torch.zeros_like(like) if grad is None else grad
        for grad, like in zip(grads, (products.zz, products.zd, products.tilt, products.zz), strict=True)
    )
    batch, k = tilt.shape
    matrix = zz.new_zeros(batch, 2 * k + 1, 2 * k + 2)
    to_z, to_delta = matrix[:, :k], matrix[:, k : 2 * k]
    to_z[:, :, :k] = zz + zz.transpose(1, 2)
    to_z[:, :, k : 2 * k] = zd
    to_z -= to_z.mean(1, keepdim=True)
    to_z[:, :, k : 2 * k] += tilt[:, None, :] / k
    to_delta[:, :, :k] = zd.transpose(1, 2)
    to_delta[:, :, k : 2 * k] = dd + dd.transpose(1, 2)
    to_delta[:, :, 2 * k] = tilt
    matrix[:, 2 * k] = to_delta.sum(1)
    to_delta.neg_()  # delta_i = x - x_i
    if small.pull is not None:
        matrix[:, k : 2 * k, 2 * k + 1] = -small.pull
    if small.weights is None:
        return matrix
    matrix[:, :k, 2 * k + 1] = small.weights
    # A row without a solution has NaN weights; what it returned is NaN and has no derivative.
    return torch.where(small.weights.isnan().any(1)[:, None, None], 0, matrix)


def _to_points(
    matrix: Float[Tensor, "batch r c"],
    grad_z: Tensor | None,
    x: Tensor,
    x_i: Tensor,
    z_i: Tensor,
    to_x: Tensor | None,
    to_x_i: Tensor | None,
    to_z_i: Tensor | None,
) -> None:
    """Fill the gradients of the points, in pieces that stay in the cache."""
    k, d = x_i.shape[1:]
    matrix = matrix.detach().to(x_i.dtype)
    step = piece_rows(x_i)
    basis = x_i.new_zeros(min(step, len(x_i)), 2 * k + 2, d)
    for start in range(0, len(x_i), step):
        rows = slice(start, min(start + step, len(x_i)))
        W, B = matrix[rows], basis[: rows.stop - start]
        torch.mean(z_i[rows], 1, out=B[:, 2 * k])
        torch.sub(z_i[rows], B[:, 2 * k, None], out=B[:, :k])
        torch.sub(x[rows, None], x_i[rows], out=B[:, k : 2 * k])
        if grad_z is not None:
            B[:, 2 * k + 1] = grad_z[rows]
        if to_z_i is not None:
            torch.bmm(W[:, :k], B, out=to_z_i[rows])
        if to_x_i is not None:
            torch.bmm(W[:, k : 2 * k], B, out=to_x_i[rows])
        if to_x is not None:
            torch.bmm(W[:, 2 * k :], B, out=to_x[rows, None])
