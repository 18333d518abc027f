"""1-Lipschitz encoder under a potential: a linear layer with orthonormal rows, then MaxMin."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["EncodedStem", "MaxMinEncoder"]


class MaxMinEncoder(nn.Module):
    """x -> MaxMin(Q x + b), Q with orthonormal rows, or columns where width > d, by the Cayley transform.

    Q is orthonormal at every step of a gradient descent, up to rounding; `lipschitz` is exact.

    Args:
        d: dimension of x.
        width: units; even, as MaxMin sorts them in pairs.

    Raises:
        ValueError: width is odd.

    Source: Trockman, Kolter, ICLR 2021, arXiv 2104.07167; Anil, Lucas, Grosse, ICML 2019, arXiv 1811.05381.
    """

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        if width % 2 or width < 2:
            raise ValueError(f"width must be even and at least 2; got {width}")
        tall, narrow = max(d, width), min(d, width)
        self.wide = width > d
        self.free = nn.Parameter(torch.randn(tall, narrow) / tall**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    @property
    def weight(self) -> Float[Tensor, "width d"]:
        """Q: of free = (U, V), A = U - U' + V'V, it is ((I + A)^-1 (I - A), -2 V (I + A)^-1)'."""
        U, V = self.free.split([self.free.shape[1], len(self.free) - self.free.shape[1]])
        A = U - U.T + V.T @ V
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        inverse = torch.linalg.inv(identity + A)
        columns = torch.cat([inverse @ (identity - A), -2 * V @ inverse])
        return columns if self.wide else columns.T

    @property
    def lipschitz(self) -> float:
        """The largest singular value of Q, in float64, with an allowance for its own rounding."""
        weight = self.weight.detach().double()
        return float(torch.linalg.matrix_norm(weight, ord=2)) * (1 + 1e-9)

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch width"]:
        a, b = nn.functional.linear(x, self.weight, self.bias).chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class EncodedStem(nn.Module):
    """A stem and encoders on it: inputs to points, with a Lipschitz constant.

    Args:
        stem: inputs to points, with `stem.lipschitz`.
        encoders: one after the other.
    """

    def __init__(self, stem: nn.Module, *encoders: MaxMinEncoder) -> None:
        super().__init__()
        self.stem, self.encoders = stem, nn.ModuleList(encoders)

    @property
    def lipschitz(self) -> float:
        """At most that of the whole: the product of its parts'."""
        constant = float(self.stem.lipschitz)  # type: ignore[arg-type]
        for encoder in self.encoders:
            constant *= float(encoder.lipschitz)  # type: ignore[arg-type]
        return constant

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch d"]:
        return self.encoded(self.stem(x))

    def encoded(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch width"]:
        """Points of the inner stem to those of this one."""
        for encoder in self.encoders:
            x = encoder(x)
        return x
