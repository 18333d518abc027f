"""Cholesky factors of many small matrices at once, with the batch as the last and contiguous axis.

LAPACK is called once per matrix, which costs more than factoring a 10 x 10 matrix does. With the batch last, column
j of all matrices is one vectorised operation. The library's routine serves large matrices and small batches better.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BatchedCholesky"]

SMALL = 40
MANY = 8  # matrices per row from which on the vectorised columns win
PIVOT_FLOOR = 1e-30  # a pivot lost to rounding: keep going, the caller judges the result by its residual


class BatchedCholesky:
    """Factor once, solve many times.

    Args:
        matrix: symmetric positive definite matrices, shape (k, k, batch); overwritten.
    """

    def __init__(self, matrix: Float[Tensor, "k k batch"]) -> None:
        k, _, batch = matrix.shape
        self.small = k <= SMALL and batch >= MANY * k
        if self.small:
            self.inverse_pivots = _factor(matrix)
            self.lower = matrix
        else:
            lower, failed = torch.linalg.cholesky_ex(matrix.permute(2, 0, 1).contiguous())
            if failed.any():
                jitter = 1e-12 * matrix.diagonal(dim1=0, dim2=1).amax(1)[failed > 0]
                identity = torch.eye(k, dtype=matrix.dtype, device=matrix.device)
                again = matrix.permute(2, 0, 1)[failed > 0] + jitter[:, None, None] * identity
                lower[failed > 0] = torch.linalg.cholesky_ex(again).L
            self.lower = lower

    def solve(self, right: Float[Tensor, "k m batch"]) -> Float[Tensor, "k m batch"]:
        """A^-1 right."""
        if not self.small:
            return torch.cholesky_solve(right.permute(2, 0, 1), self.lower).permute(1, 2, 0)
        y = right.clone()
        k = len(y)
        for j in range(k):
            y[j] *= self.inverse_pivots[j]
            if j + 1 < k:
                y[j + 1 :].addcmul_(self.lower[j + 1 :, j, None], y[None, j], value=-1)
        for j in range(k - 1, -1, -1):
            y[j] *= self.inverse_pivots[j]
            if j:
                y[:j].addcmul_(self.lower[j, :j, None], y[None, j], value=-1)
        return y


def _factor(matrix: Float[Tensor, "k k batch"]) -> Float[Tensor, "k batch"]:
    """Lower factor in place (the upper triangle is left as rubbish); returns 1 / its diagonal."""
    k = matrix.shape[0]
    inverse_pivots = torch.empty_like(matrix[0])
    for j in range(k):
        inverse = matrix[j, j].clamp(min=PIVOT_FLOOR).rsqrt()
        inverse_pivots[j] = inverse
        if j + 1 < k:
            column = matrix[j + 1 :, j].mul_(inverse)
            matrix[j + 1 :, j + 1 :].addcmul_(column[:, None], column[None], value=-1)
    return inverse_pivots
