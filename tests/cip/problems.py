"""Neighbourhoods with known answers: read off potentials whose curvature is known."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from otad.cip import Regularity, Solution, interpolate

Array = np.ndarray
Branch = Literal["lower", "upper", "mean"]
BRANCHES: list[Branch] = ["lower", "upper", "mean"]
EXTREMES: list[Branch] = ["lower", "upper"]
BOUNDS = [(-2.0, 2.0), (-0.5, 1.0), (0.0, 2.0), (0.3, 1.5)]


@dataclass(frozen=True)
class KnownPotential:
    """phi(x) = l/2 |x|^2 + (L - l) sum_m log cosh(s (q_m . x + b_m)) / s^2 + <c, x>, the q_m orthonormal.

    Its Hessian is l I + (L - l) Q^T diag(1 / cosh^2) Q, so phi is in F(l, L).
    """

    l: float
    L: float
    q: Array  # (d, d) orthogonal
    b: Array  # (d,)
    c: Array  # (d,)
    s: float

    @classmethod
    def random(cls, d: int, l: float, L: float, rng: np.random.Generator, s: float = 1.0) -> "KnownPotential":
        q, _ = np.linalg.qr(rng.normal(size=(d, d)))
        return cls(l, L, q, rng.normal(size=d), rng.normal(size=d), s)

    def __call__(self, x: Array) -> Array:
        inner = self.s * (x @ self.q.T + self.b)
        log_cosh = np.logaddexp(inner, -inner) - np.log(2.0)
        return 0.5 * self.l * (x**2).sum(-1) + (self.L - self.l) * log_cosh.sum(-1) / self.s**2 + x @ self.c

    def gradient(self, x: Array) -> Array:
        inner = self.s * (x @ self.q.T + self.b)
        return self.l * x + (self.L - self.l) * np.tanh(inner) @ self.q / self.s + self.c


@dataclass(frozen=True)
class Problem:
    """A batch of neighbourhoods read off known potentials, and one query for each."""

    x: Tensor  # (batch, d)
    x_i: Tensor  # (batch, k, d)
    z_i: Tensor  # (batch, k, d)
    phi_i: Tensor  # (batch, k), values of the known potentials
    phi: Tensor  # (batch,), at x
    l: float
    L: float

    @property
    def regularity(self) -> Regularity:
        return Regularity(l=self.l, L=self.L)

    def to(self, dtype: torch.dtype) -> "Problem":
        return self._map(lambda t: t.to(dtype))

    def rows(self, rows: slice) -> "Problem":
        return self._map(lambda t: t[rows])

    def with_potentials(self, phi_i: Tensor) -> "Problem":
        return replace(self, phi_i=phi_i)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        x, x_i, z_i, phi_i, phi = (change(t) for t in (self.x, self.x_i, self.z_i, self.phi_i, self.phi))
        return Problem(x, x_i, z_i, phi_i, phi, self.l, self.L)

    def row(self, b: int) -> tuple[Array, Array, Array, Array]:
        return tuple(t[b].numpy() for t in (self.x, self.x_i, self.z_i, self.phi_i))  # pyright: ignore[reportReturnType]


def known_problem(
    batch: int,
    k: int,
    d: int,
    l: float = 0.0,
    L: float = 2.0,
    seed: int = 0,
    spread: float = 1.0,
    width: float = 1.0,
) -> Problem:
    """Feasible by construction; spread: of the neighbours, width: how sharply the potential bends."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, d))
    x_i = x[:, None] + spread * rng.normal(size=(batch, k, d))
    potentials = [KnownPotential.random(d, l, L, rng, width) for _ in range(batch)]
    z_i = np.stack([potential.gradient(rows) for potential, rows in zip(potentials, x_i, strict=True)])
    phi_i = np.stack([potential(rows) for potential, rows in zip(potentials, x_i, strict=True)])
    phi = np.stack([potential(row) for potential, row in zip(potentials, x, strict=True)])
    return Problem(*(torch.from_numpy(a) for a in (x, x_i, z_i, phi_i, phi)), l=l, L=L)


def solve(p: Problem, branch: Branch = "lower") -> Solution:
    return interpolate(p.x, p.x_i, p.z_i, p.phi_i, p.regularity, branch=branch)
