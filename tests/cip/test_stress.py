"""A hundred thousand random problems and ten thousand degenerate ones: solved to tolerance, or an honest status."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from otad.cip import Regularity, Status, interpolate_neighborhood
from otad.cip.interpolation import Branch

RESIDUAL = {torch.float64: 1e-8, torch.float32: 1e-4}


def gradient_map(x: Tensor) -> Tensor:
    """The gradient of a convex function with curvature between 0.3 and 1.3."""
    return 0.3 * x + torch.tanh(x)


def random_problems(count: int, k: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_i = torch.randn(count, k, d, generator=generator, dtype=torch.float64)
    reach = 10 ** (3 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 2)
    x = x_i.mean(1) + reach * torch.randn(count, d, generator=generator, dtype=torch.float64)
    return x, x_i, gradient_map(x_i)


def degenerate_problems(count: int) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Name and batch; every batch is feasible for l = -2, L = 2 unless its name says "torn"."""
    yield "one neighbour", random_problems(count, 1, 4, 1)
    yield "more neighbours than dimensions", random_problems(count, 20, 2, 2)
    x, x_i, z_i = random_problems(count, 8, 5, 3)
    x_i[:, 4:], z_i[:, 4:] = x_i[:, :4], z_i[:, :4]
    yield "duplicates", (x, x_i, z_i)
    x, x_i, _ = random_problems(count, 8, 5, 4)
    x_i = x_i[:, :1] + torch.linspace(-1, 1, 8, dtype=torch.float64)[None, :, None] * x_i[:, 1:2]
    yield "collinear", (x, x_i, gradient_map(x_i))
    x, x_i, z_i = random_problems(count, 8, 5, 5)
    yield "equal features", (x, x_i, z_i[:, :1].expand_as(z_i).clone())
    x, x_i, _ = random_problems(count, 8, 3, 6)
    x_i = x_i.round()
    yield "exact ties on a grid", (x.round(), x_i, 0.5 * x_i)
    for scale in (1e-8, 1e8):
        x, x_i, z_i = random_problems(count, 8, 5, 7)
        yield f"scale {scale:g}", (scale * x, scale * x_i, scale * z_i)
    x, x_i, _ = random_problems(count, 8, 5, 8)
    x_i[:, 0] *= 1e6
    yield "one far outlier", (x, x_i, gradient_map(x_i))
    x, x_i, z_i = random_problems(count, 8, 5, 9)
    yield "query on a point", (x_i[:, 3].clone(), x_i, z_i)
    x, x_i, z_i = random_problems(count, 8, 5, 10)
    x_i[:, 1] = x_i[:, 0]
    yield "torn: one point, two features", (x, x_i, z_i)


def check(name: str, problem: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, branch: Branch) -> None:
    x, x_i, z_i = (part.to(dtype) for part in problem)
    found = interpolate_neighborhood(x, x_i, z_i, Regularity(-2.0, 2.0), branch)
    converged = found.status == Status.CONVERGED
    assert found.value[converged].isfinite().all(), name
    assert (found.stats["residual"][converged] <= RESIDUAL[dtype]).all(), name
    if "torn" in name:
        assert (found.status == Status.INFEASIBLE).all(), name
    else:
        assert converged.double().mean() == 1, name
    weights = found.stats["weights"][converged]
    assert (weights >= 0).all(), name
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), atol=1e-9, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "d"), [(10, 30), (10, 3), (5, 8), (16, 6)])
def test_random_problems(k: int, d: int, dtype: torch.dtype) -> None:
    for seed in range(2):
        check(f"k = {k}, d = {d}", random_problems(12_500, k, d, seed), dtype, "lower")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("branch", ["lower", "mean"])
def test_degenerate_problems(branch: Branch, dtype: torch.dtype) -> None:
    for name, problem in degenerate_problems(1_000):
        check(name, problem, dtype, branch)


def test_degenerate_problems_have_finite_gradients() -> None:
    for name, (x, x_i, z_i) in degenerate_problems(200):
        x = x.clone().requires_grad_()
        found = interpolate_neighborhood(x, x_i, z_i, Regularity(-2.0, 2.0), "mean")
        good = found.status == Status.CONVERGED
        if not good.any():
            continue
        direction = torch.nn.functional.normalize(torch.ones_like(x), dim=1)
        (pulled,) = torch.autograd.grad((found.value[good] * direction[good]).sum(), x)
        # The Jacobian is symmetric with eigenvalues in [l, L].
        assert (pulled.norm(dim=1) <= 2.0 * (1 + 1e-5)).all(), name
