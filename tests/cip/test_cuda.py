"""A GPU gives the same answers as the processor."""

import pytest
import torch
from torch import Tensor

from otad.cip import BrenierPotential, Regularity, feasible_potentials, interpolate_neighborhood, smallest_smoothness
from otad.cip.envelope import MoreauEnvelope

from .problems import BRANCHES, Branch, known_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def same(on_gpu: Tensor, on_cpu: Tensor) -> None:
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.detach().cpu(), on_cpu.detach(), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("k", "d"), [(10, 30), (50, 8)])  # vectorised over the batch, and by the library
def test_neighborhoods_and_their_derivatives(branch: Branch, k: int, d: int) -> None:
    p = known_problem(500, k, d, 0.25, 0.9, seed=50)
    found = []
    for device in ("cuda", "cpu"):
        x, x_i, z_i = (part.to(device).requires_grad_() for part in (p.x, p.x_i, p.z_i))
        L = torch.full((500,), 1.1, dtype=torch.float64, device=device, requires_grad=True)
        solution = interpolate_neighborhood(x, x_i, z_i, Regularity(-1.0, L), branch)
        moved = torch.autograd.grad(solution.checked().square().sum(), (x, x_i, z_i, L))
        found.append((solution.value, solution.stats["value"], solution.stats["potentials"], *moved))
    for on_gpu, on_cpu in zip(*found, strict=True):
        same(on_gpu, on_cpu)


def test_potentials_and_smoothness() -> None:
    p = known_problem(200, 8, 5, -0.5, 1.0, seed=51)
    x_i, z_i = p.x_i.cuda(), p.z_i.cuda()
    same(feasible_potentials(x_i, z_i, p.regularity).checked(), feasible_potentials(p.x_i, p.z_i, p.regularity).value)
    same(smallest_smoothness(x_i, z_i), smallest_smoothness(p.x_i, p.z_i))


def test_one_potential_for_all_points() -> None:
    p = known_problem(1, 400, 6, -0.8, 1.0, seed=52)
    x, z, queries = p.x_i[0], p.z_i[0], p.x_i[0, :100] + 0.3
    on_gpu = BrenierPotential.fit(x.cuda(), z.cuda(), regularity=p.regularity)
    on_cpu = BrenierPotential.fit(x, z, regularity=p.regularity)
    same(on_gpu.potentials, on_cpu.potentials)
    for branch in BRANCHES:
        same(on_gpu.gradient(queries.cuda(), branch).checked(), on_cpu.gradient(queries, branch).checked())
        same(on_gpu(queries.cuda(), branch).value, on_cpu(queries, branch).value)


def test_envelope() -> None:
    generator = torch.Generator().manual_seed(53)
    slopes, offsets, x = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3000, 12), (3000,), (200, 12))
    )
    on_cpu = MoreauEnvelope(slopes, offsets, 2.0)(x)
    on_gpu = MoreauEnvelope(slopes.cuda(), offsets.cuda(), 2.0)(x.cuda())
    same(on_gpu.value, on_cpu.value)
    same(on_gpu.gradient, on_cpu.gradient)
