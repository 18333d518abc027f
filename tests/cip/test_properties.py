"""What must not depend on coordinates, order or batching, with problems drawn by hypothesis."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from otad.cip import Regularity, Status, feasible_potentials, interpolate, smallest_smoothness

from .oracles import worst_violation
from .problems import Branch, Problem, known_problem, solve

pytestmark = pytest.mark.slow


# No deadline: the first call of a kernel pays for its start.
quick = settings(deadline=None, max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
branches = st.sampled_from(["lower", "upper", "mean"])


@st.composite
def problems(draw: Any) -> Problem:
    """A known potential somewhere in the class, two neighbourhoods of it and a query near each."""
    l, L = draw(st.sampled_from([(-1.0, 1.0), (-2.0, 1.0), (-0.3, 1.0), (0.0, 2.0), (0.3, 1.5)]))
    return known_problem(
        batch=2,
        k=draw(st.integers(1, 9)),
        d=draw(st.integers(1, 7)),
        l=l,
        L=L,
        seed=draw(st.integers(0, 2**20)),
        spread=draw(st.sampled_from([0.1, 1.0, 3.0])),
        width=draw(st.sampled_from([0.5, 1.0, 3.0])),
    )


seeds = st.integers(0, 2**20)


def answer(p: Problem, branch: Branch) -> tuple[Tensor, Tensor]:
    """Feature and value."""
    z = solve(p, branch)
    return z.checked(), z.stats["value"]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(a, b, atol=tolerance * (1.0 + float(b.abs().max())), rtol=0)


@quick
@given(p=problems(), branch=branches, seed=seeds)
def test_order_of_the_neighbors(p: Problem, branch: Branch, seed: int) -> None:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(p.x_i.shape[1]))
    feature, value = answer(p, branch)
    z = interpolate(p.x, p.x_i[:, order], p.z_i[:, order], p.phi_i[:, order], p.regularity, branch=branch)
    close(z.checked(), feature)
    close(z.stats["value"], value)
    u, permuted = (feasible_potentials(p.x_i[:, o], p.z_i[:, o], p.regularity).checked() for o in (slice(None), order))
    close(permuted, u[:, order])


@quick
@given(p=problems(), branch=branches, seed=seeds)
def test_translation_of_points(p: Problem, branch: Branch, seed: int) -> None:
    shift = torch.from_numpy(10.0 * np.random.default_rng(seed).normal(size=p.x.shape))
    feature, value = answer(p, branch)
    z = interpolate(p.x + shift, p.x_i + shift[:, None], p.z_i, p.phi_i, p.regularity, branch=branch)
    close(z.checked(), feature)
    close(z.stats["value"], value)
    moved = feasible_potentials(p.x_i + shift[:, None], p.z_i, p.regularity).checked()
    close(moved, feasible_potentials(p.x_i, p.z_i, p.regularity).checked())


@quick
@given(p=problems(), branch=branches, seed=seeds)
def test_tilt(p: Problem, branch: Branch, seed: int) -> None:
    """phi + <c, .> has the features z_i + c."""
    c = torch.from_numpy(3.0 * np.random.default_rng(seed).normal(size=p.x.shape))
    feature, value = answer(p, branch)
    tilted = p.phi_i + (p.x_i * c[:, None]).sum(2)
    z = interpolate(p.x, p.x_i, p.z_i + c[:, None], tilted, p.regularity, branch=branch)
    close(z.checked(), feature + c)
    close(z.stats["value"], value + (p.x * c).sum(1))
    u = feasible_potentials(p.x_i, p.z_i + c[:, None], p.regularity).checked()
    for b in range(2):
        untilted = u[b] - p.x_i[b] @ c[b]
        violation = worst_violation(p.x_i[b].numpy(), p.z_i[b].numpy(), untilted.numpy(), p.l, p.L)
        assert violation <= 1e-9 * (1 + float(u[b].abs().max()))


@quick
@given(p=problems(), branch=branches, seed=seeds)
def test_bending(p: Problem, branch: Branch, seed: int) -> None:
    """phi + (c/2)|.|^2 is in F(l + c, L + c) and has the features z_i + c x_i."""
    c = float(np.random.default_rng(seed).uniform(-0.5, 0.5))
    feature, value = answer(p, branch)
    bent = p.phi_i + c / 2 * (p.x_i**2).sum(2)
    regularity = Regularity(l=p.l + c, L=p.L + c)
    z = interpolate(p.x, p.x_i, p.z_i + c * p.x_i, bent, regularity, branch=branch)
    close(z.checked(), feature + c * p.x)
    close(z.stats["value"], value + c / 2 * (p.x**2).sum(1))


@quick
@given(p=problems(), branch=branches, s=st.floats(1e-3, 1e3), t=st.floats(1e-3, 1e3), add=st.floats(-10, 10))
def test_scaling_of_points_and_features(p: Problem, branch: Branch, s: float, t: float, add: float) -> None:
    feature, value = answer(p, branch)
    scaled = Regularity(l=p.l * t / s, L=p.L * t / s)
    z = interpolate(s * p.x, s * p.x_i, t * p.z_i, s * t * (p.phi_i + add), scaled, branch=branch)
    close(z.checked() / t, feature)
    close(z.stats["value"] / (s * t), value + add)
    u = feasible_potentials(s * p.x_i, t * p.z_i, scaled).checked()
    close(u / (s * t), feasible_potentials(p.x_i, p.z_i, p.regularity).checked())
    if p.x_i.shape[1] > 1:
        before, after = smallest_smoothness(p.x_i, p.z_i), smallest_smoothness(s * p.x_i, t * p.z_i)
        torch.testing.assert_close(after * s / t, before, rtol=1e-6, atol=0)


@quick
@given(p=problems(), branch=branches, seed=seeds)
def test_rotation(p: Problem, branch: Branch, seed: int) -> None:
    d = p.x.shape[1]
    q = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0])
    feature, value = answer(p, branch)
    z = interpolate(p.x @ q, p.x_i @ q, p.z_i @ q, p.phi_i, p.regularity, branch=branch)
    close(z.checked(), feature @ q)
    close(z.stats["value"], value)


@quick
@given(p=problems(), seed=seeds)
def test_upper_is_the_lower_of_the_opposite(p: Problem, seed: int) -> None:
    # Bending by c makes both pairs admissible: L > 0 is asked of (l, L) and of (-L, -l).
    c = -(p.l + p.L) / 2
    z_i, phi_i = p.z_i + c * p.x_i, p.phi_i + c / 2 * (p.x_i**2).sum(2)
    upper = interpolate(p.x, p.x_i, z_i, phi_i, Regularity(l=p.l + c, L=p.L + c), branch="upper")
    lower = interpolate(p.x, p.x_i, -z_i, -phi_i, Regularity(l=-(p.L + c), L=-(p.l + c)), branch="lower")
    close(upper.checked(), -lower.checked())
    close(upper.stats["value"], -lower.stats["value"])


@quick
@given(p=problems(), branch=branches, seed=seeds)
def test_a_repeated_neighbor_changes_nothing(p: Problem, branch: Branch, seed: int) -> None:
    i = int(np.random.default_rng(seed).integers(p.x_i.shape[1]))
    feature, value = answer(p, branch)
    z = interpolate(
        p.x,
        torch.cat([p.x_i, p.x_i[:, i : i + 1]], 1),
        torch.cat([p.z_i, p.z_i[:, i : i + 1]], 1),
        torch.cat([p.phi_i, p.phi_i[:, i : i + 1]], 1),
        p.regularity,
        branch=branch,
    )
    close(z.checked(), feature)
    close(z.stats["value"], value)


@quick
@given(branch=branches, seed=seeds, batch=st.integers(2, 12), cut=st.floats(0.01, 0.99))
def test_batch_splitting(branch: Branch, seed: int, batch: int, cut: float) -> None:
    """A row's answer does not depend on the rows beside it."""
    p = known_problem(batch, 7, 5, l=-1.0, L=1.0, seed=seed)
    feature, value = answer(p, branch)
    middle = min(max(1, int(cut * batch)), batch - 1)
    parts = [answer(p.rows(rows), branch) for rows in (slice(None, middle), slice(middle, None))]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), feature, atol=1e-11, rtol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), value, atol=1e-11, rtol=0)
    u = feasible_potentials(p.x_i, p.z_i, p.regularity).checked()
    ones = torch.cat(
        [feasible_potentials(p.x_i[b : b + 1], p.z_i[b : b + 1], p.regularity).checked() for b in range(batch)]
    )
    torch.testing.assert_close(ones, u, atol=1e-12, rtol=0)
    L = smallest_smoothness(p.x_i, p.z_i)
    torch.testing.assert_close(smallest_smoothness(p.x_i[middle:], p.z_i[middle:]), L[middle:], rtol=1e-9, atol=0)


@quick
@given(p=problems())
def test_smallest_smoothness_is_feasible_and_within_the_known_bounds(p: Problem) -> None:
    L = smallest_smoothness(p.x_i, p.z_i, ratio=-1.0)
    assert (max(abs(p.l), p.L) * (1 + 1e-6) >= L).all()
    for b in range(2):
        if p.x_i.shape[1] > 1:  # one point fits for every L
            regularity = Regularity(l=-float(L[b]) * (1 + 1e-6), L=float(L[b]) * (1 + 1e-6))
            assert feasible_potentials(p.x_i[b : b + 1], p.z_i[b : b + 1], regularity).status[0] == Status.CONVERGED
