"""Which of many affine functions can exceed a threshold? An exact answer from a few coordinates of each.

With a basis B of r orthonormal columns, <s_i, y> = <B's_i, B'y> + <rest of s_i, rest of y>, and the second term is at
most the product of two norms, known beforehand. Where the slopes vary mostly along few directions, as data do, that
leaves few candidates, whatever the number n of functions: the product of the queries with r coordinates costs r / d of
the product with all of them. Computed in single precision, with its rounding error added.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Sketch"]

RANK = 256
ROUGH = 64  # coordinates for a first guess
SAMPLE = 1024  # slopes that the basis is taken from
GROUP = 64  # functions whose largest bound is looked at first
ENTRIES = 2**24  # bounds held at a time
CHUNK = 2**22  # entries of slopes worked on at a time
UNIT = torch.finfo(torch.float32).eps / 2 * 1.01
EXACT_UNIT = torch.finfo(torch.float64).eps


class Sketch:
    """n affine functions <s_i, y> + a_i, as vectors f_i in single precision.

    <f_i, q(y)> / scale is an upper bound of the value at y; with other q it is an estimate.

    Args:
        slopes: s_i, shape (n, d), float64; best centred.
        offsets: a_i, shape (n,), float64.
    """

    def __init__(self, slopes: Float[Tensor, "n d"], offsets: Float[Tensor, " n"]) -> None:
        n, d = slopes.shape
        self.basis = _basis(slopes, min(RANK, d, n))
        r = self.basis.shape[1]
        self.rough = min(ROUGH, r)
        self.n = n
        # A common shift of the offsets moves all values alike; without it fewer digits are lost.
        self.shift = offsets.median()
        offsets = offsets - self.shift
        squares = slopes.square().sum(1)
        self.slope_scale = _nonzero(squares.amax().sqrt())
        self.offset_scale = _nonzero(offsets.abs().amax())
        padded = -(-n // GROUP) * GROUP
        factors = torch.zeros(padded, r + 4, dtype=torch.float32, device=slopes.device)
        for start in range(0, n, max(1, CHUNK // d)):
            part = slice(start, min(n, start + max(1, CHUNK // d)))
            kept = slopes[part] @ self.basis
            size = torch.linalg.vector_norm(kept, dim=1)
            factors[part, :r] = kept / self.slope_scale
            factors[part, r] = _rest(squares[part], size, d) / self.slope_scale
            factors[part, r + 1] = size / self.slope_scale
            factors[part, r + 2] = offsets[part] / self.offset_scale
            factors[part, r + 3] = (offsets[part] / self.offset_scale).abs()
        self.factors = factors
        # Halves of the squared norms as well: the score of a function taken alone.
        alone = torch.zeros(padded, self.rough + 2, dtype=torch.float32, device=slopes.device)
        alone[:, : self.rough] = factors[:, : self.rough]
        alone[:, self.rough] = factors[:, r + 2]
        alone[:n, self.rough + 1] = squares / self.slope_scale.square() / 2
        self.alone = alone

    def likely(
        self, x: Float[Tensor, "rows d"], k: int, M: float = torch.inf, excluded: Tensor | None = None
    ) -> Int[Tensor, "rows k"]:
        """The k functions of largest <s_i, x> + a_i - |s_i|^2 / (2M), by a first guess."""
        found = []
        for part, kept_out in _parts(x, excluded, ENTRIES // self.n):
            query = torch.empty(len(part), self.rough + 2, dtype=torch.float64, device=x.device)
            query[:, : self.rough] = part @ self.basis[:, : self.rough] * self.slope_scale
            query[:, self.rough] = self.offset_scale
            query[:, self.rough + 1] = -self.slope_scale.square() / M
            # Only the order counts, and rows of order one cannot overflow.
            scores = self._product(query / _nonzero(query.abs().amax(1, keepdim=True)), self.alone, kept_out)
            found.append(_largest(scores, k))
        return torch.cat(found)

    def above(
        self, y: Float[Tensor, "rows d"], threshold: Float[Tensor, " rows"], excluded: Int[Tensor, "rows k"]
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """All pairs (row, function) whose value at y may exceed the threshold of the row, but for those excluded.

        The error of a product of r + 4 terms in single precision, for any order of summation, is at most
        (r + 4 + c) u times the sum of the products of absolute values.
        """
        r = self.basis.shape[1]
        all_rows, all_functions = [], []
        start = 0
        for part, kept_out in _parts(y, excluded, ENTRIES // self.n):
            limit = threshold[start : start + len(part)] - self.shift
            kept = part @ self.basis
            size = torch.linalg.vector_norm(kept, dim=1)
            error = (r + 12) * UNIT
            query = torch.empty(len(part), r + 4, dtype=torch.float64, device=y.device)
            query[:, :r] = kept * self.slope_scale
            query[:, r] = _rest(part.square().sum(1), size, y.shape[1]) * self.slope_scale * (1 + error)
            query[:, r + 1] = size * self.slope_scale * error
            query[:, r + 2] = self.offset_scale
            query[:, r + 3] = self.offset_scale * error
            scale = torch.maximum(query.abs().amax(1), limit.abs())
            bounds = self._product(query / scale[:, None], self.factors, kept_out)
            limit = limit / scale
            limit = (limit - 4 * UNIT * limit.abs()).to(bounds.dtype)
            grouped = bounds.view(len(part), -1, GROUP)
            # NaN counts as above.
            row, group = (~(grouped.amax(2) <= limit[:, None])).nonzero(as_tuple=True)
            at, place = (~(grouped[row, group] <= limit[row, None])).nonzero(as_tuple=True)
            all_rows.append(row[at] + start)
            all_functions.append(group[at] * GROUP + place)
            start += len(part)
        return torch.cat(all_rows), torch.cat(all_functions)

    def _product(self, query: Tensor, factors: Tensor, excluded: Tensor | None) -> Float[Tensor, "rows padded"]:
        # The bounds count on single precision, which faster modes of the product do not keep.
        dtype = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
        scores = query.to(dtype) @ factors.to(dtype).T
        scores[:, self.n :] = -torch.inf
        return scores if excluded is None else scores.scatter_(1, excluded, -torch.inf)


def _parts(x: Tensor, excluded: Tensor | None, rows: int) -> list[tuple[Tensor, Tensor | None]]:
    parts = x.split(max(1, rows))
    if excluded is None:
        return [(part, None) for part in parts]
    return list(zip(parts, excluded.split(max(1, rows)), strict=True))


def _rest(square: Tensor, size: Tensor, d: int) -> Tensor:
    """Norm of what the basis leaves, not smaller than it is: rounding is added before the root."""
    return (square - size.square()).clamp(min=0).add(4 * d * EXACT_UNIT * square).sqrt()


def _basis(slopes: Tensor, rank: int) -> Float[Tensor, "d rank"]:
    """Leading directions of a sample of the slopes, orthonormal to rounding."""
    sample = slopes[:: -(-len(slopes) // SAMPLE)]
    sample = sample / _nonzero(torch.linalg.vector_norm(sample, dim=1, keepdim=True).amax())
    if len(sample) <= sample.shape[1]:
        vectors = sample.T @ torch.linalg.eigh(sample @ sample.T).eigenvectors.flip(1)
    else:
        vectors = torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1)
    return torch.linalg.qr(vectors[:, :rank]).Q.contiguous()


def _largest(scores: Float[Tensor, "rows padded"], k: int) -> Int[Tensor, "rows k"]:
    """Places of the k largest of each row; they lie in the k groups of largest maximum."""
    grouped = scores.view(len(scores), -1, GROUP)
    groups = grouped.amax(2).topk(min(k, grouped.shape[1]), dim=1).indices
    inside = grouped.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1).topk(k, dim=1).indices
    return groups.gather(1, inside // GROUP) * GROUP + inside % GROUP


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))
