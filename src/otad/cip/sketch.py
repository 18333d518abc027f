"""Which of many affine functions can exceed a threshold? An exact answer from a few coordinates of each.

With a basis B of r orthonormal columns, <s_i, y> = <B's_i, B'y> + <rest of s_i, rest of y>, and the second term is at
most the product of two norms, of which one is known beforehand. Where the slopes vary mostly along few directions, as
data do, that leaves few candidates, whatever the number n of functions: the product of the queries with r coordinates
costs r / d of the product with all of them. Computed in single precision, with its rounding error added.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Sketch"]

RANK = 256
ROUGH = 64  # coordinates for a first guess
SAMPLE = 1024  # slopes that the basis is taken from
TILE, GROUP = 2048, 16  # functions whose values stay in the cache, and functions known by the largest of their values
ROWS, FEW_ROWS = 512, 128  # queries worked on together, and those of which all values are held
CHUNK = 2**22  # entries of slopes worked on at a time
UNIT = torch.finfo(torch.float32).eps / 2 * 1.01
EXACT_UNIT = torch.finfo(torch.float64).eps
UNDERFLOW = 1e-35  # more than the terms of a product can lose by it


class Sketch:
    """n affine functions <s_i, y> + a_i, as vectors in single precision whose products with a vector made of y bound
    or estimate the values at y.

    Args:
        slopes: s_i, shape (n, d), float64; best centred.
        offsets: a_i, shape (n,), float64.
    """

    @torch.no_grad()
    def __init__(self, slopes: Float[Tensor, "n d"], offsets: Float[Tensor, " n"]) -> None:
        self.n, d = slopes.shape
        tiles = -(-self.n // TILE)
        self.tile = -(-self.n // (tiles * GROUP)) * GROUP
        self.basis = _basis(slopes, min(RANK, d, self.n))
        r = self.basis.shape[1]
        self.rough = min(ROUGH, r)
        # A common shift of the offsets moves all values alike; without it fewer digits are lost.
        self.shift = offsets.median()
        offsets = offsets - self.shift
        squares = slopes.square().sum(1)
        self.slope_scale = _nonzero(squares.amax().sqrt())
        self.offset_scale = _nonzero(offsets.abs().amax())
        self.bounding = torch.zeros(tiles * self.tile, r + 5, dtype=torch.float32, device=slopes.device)
        for start in range(0, self.n, max(1, CHUNK // d)):
            part = slice(start, min(self.n, start + max(1, CHUNK // d)))
            kept = slopes[part] @ self.basis
            size = torch.linalg.vector_norm(kept, dim=1)
            self.bounding[part, :r] = kept / self.slope_scale
            self.bounding[part, r] = _rest(squares[part], size, d) / self.slope_scale
            self.bounding[part, r + 1] = size / self.slope_scale
        self.bounding[: self.n, r + 2] = offsets / self.offset_scale
        self.bounding[: self.n, r + 3] = self.bounding[: self.n, r + 2].abs()
        self.bounding[: self.n, r + 4] = 1
        self.guessing = torch.zeros(tiles * self.tile, self.rough + 2, dtype=torch.float32, device=slopes.device)
        self.guessing[:, : self.rough] = self.bounding[:, : self.rough]
        self.guessing[:, self.rough] = self.bounding[:, r + 2]
        self.guessing[: self.n, self.rough + 1] = squares / self.slope_scale.square() / 2
        places = torch.arange(tiles * self.tile, device=slopes.device).view(tiles, GROUP, -1)
        self.members = places.transpose(1, 2).reshape(-1, GROUP)

    @torch.no_grad()
    def likely(self, x: Float[Tensor, "rows d"], k: int, M: float = torch.inf) -> Int[Tensor, "rows k"]:
        """The k <= n functions of largest <s_i, x> + a_i - |s_i|^2 / (2M), by a guess from few coordinates."""
        query = torch.empty(len(x), self.rough + 2, dtype=torch.float64, device=x.device)
        query[:, : self.rough] = x @ self.basis[:, : self.rough] * self.slope_scale
        query[:, self.rough] = self.offset_scale
        query[:, self.rough + 1] = -self.slope_scale.square() / M
        # Only the order counts, and rows of order one cannot overflow.
        query = self._rounded(query / _nonzero(query.abs().amax(1, keepdim=True)))
        chosen = []
        buffer = query.new_empty(min(len(x), FEW_ROWS), len(self.guessing))
        for part in query.split(FEW_ROWS):
            values = buffer[: len(part)]
            largest = torch.cat([grouped.amax(1) for grouped in self._tiles(part, self.guessing, values)], 1)
            # The k largest lie in the k groups with the largest maxima.
            members = self.members[largest.topk(min(k, largest.shape[1]), dim=1).indices].flatten(1)
            chosen.append(members.gather(1, values.gather(1, members).topk(k, dim=1).indices))
        return torch.cat(chosen)

    @torch.no_grad()
    def above(
        self, y: Float[Tensor, "rows d"], threshold: Float[Tensor, " rows"], most: float = torch.inf
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]] | None:
        """All pairs (row, function) whose value at y may exceed the threshold of the row, and by how much, relative
        to the row; None where there are more than `most`.

        The error of a product of r + 5 terms in single precision, for any order of summation, is at most (r + 5 + c) u
        times the sum of the absolute values of the products.
        """
        r = self.basis.shape[1]
        kept = y @ self.basis
        size = torch.linalg.vector_norm(kept, dim=1)
        limit = threshold - self.shift
        error = (r + 16) * UNIT
        query = torch.empty(len(y), r + 5, dtype=torch.float64, device=y.device)
        query[:, :r] = kept * self.slope_scale
        query[:, r] = _rest(y.square().sum(1), size, y.shape[1]) * self.slope_scale * (1 + error)
        query[:, r + 1] = size * self.slope_scale * error
        query[:, r + 2] = self.offset_scale
        query[:, r + 3] = self.offset_scale * error
        query[:, r + 4] = limit.abs() * error - limit
        query = query / query.abs().amax(1, keepdim=True)
        query[:, r + 4] += UNDERFLOW
        query = self._rounded(query)
        pairs = 0
        nothing = torch.zeros(0, dtype=torch.long, device=y.device)
        found = [(nothing, nothing, query[:0, 0])]
        for start in range(0, len(y), ROWS):
            part = query[start : start + ROWS]
            values = part.new_empty(len(part), self.tile)
            for tile, grouped in enumerate(self._tiles(part, self.bounding, values)):
                # Not "> 0": NaN must count as above.
                row, group = (~(grouped.amax(1) <= 0)).nonzero(as_tuple=True)
                bounds = grouped[row, :, group]
                at, place = (~(bounds <= 0)).nonzero(as_tuple=True)
                function = tile * self.tile + place * grouped.shape[2] + group[at]
                found.append((row[at] + start, function, bounds[at, place]))
                pairs += len(at)
                if pairs > most:
                    return None
        row, function, bound = (torch.cat(parts) for parts in zip(*found, strict=True))
        return row, function, bound

    def _rounded(self, query: Tensor) -> Tensor:
        # The bounds count on single precision, which faster modes of the product do not keep.
        try:
            single = torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # set by the newer switches, of which this one does not know
            single = False
        return query.float() if single else query

    def _tiles(
        self, query: Tensor, factors: Tensor, values: Float[Tensor, "rows columns"]
    ) -> Iterator[Float[Tensor, "rows group groups"]]:
        """Products with one tile of factors after the other, into `values`, over and over where it is one tile wide."""
        for start in range(0, len(factors), self.tile):
            at = start % values.shape[1]
            place = values[:, at : at + self.tile]
            torch.mm(query, factors[start : start + self.tile].to(query.dtype).T, out=place)
            place[:, max(0, self.n - start) :] = -torch.inf  # padding
            yield place.unflatten(1, (GROUP, -1))


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


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))
