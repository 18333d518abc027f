"""Potentials of a data set from few pairs: against the dense method and HiGHS, and what the proof says."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otad.cip import BrenierPotential, Regularity
from otad.cip.longest_paths import PotentialFit, fit_potentials
from otad.cip.pairs import Points
from otad.errors import InfeasibleError

from .oracles import least_gaps, lp_potentials, lp_smallest_smoothness, worst_violation

MEMORY = 2**24


def points(n: int, d: int, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return torch.from_numpy(x), torch.from_numpy(x + noise * rng.normal(size=(n, d)))


def dense_potentials(x: Tensor, z: Tensor, l: float, L: float) -> np.ndarray | None:
    """Bellman and Ford's sweeps over all pairs, from the theorem's own form."""
    gaps = least_gaps(x.double().numpy(), z.double().numpy(), l, L)
    phi = np.zeros(len(x))
    for _ in range(len(x) + 1):
        raised = np.maximum(phi, (phi[None, :] + gaps).max(1))
        if (raised <= phi + 1e-12 * (1 + np.abs(phi))).all():
            return phi
        phi = raised
    return None


def cycle_weight(x: Tensor, z: Tensor, cycle: tuple[int, ...], ratio: float, L: float) -> float:
    i, j = list(cycle), [*cycle[1:], cycle[0]]
    return float(least_gaps(x.double().numpy(), z.double().numpy(), ratio * L, L)[i, j].sum())


def check(x: Tensor, z: Tensor, ratio: float, fit: PotentialFit, rtol: float) -> None:
    """All that `fit` claims, by other means."""
    n, l, L = len(x), ratio * fit.smoothness, fit.smoothness
    dense = dense_potentials(x, z, l, L)
    assert dense is not None
    scale = 1 + np.abs(dense).max()
    np.testing.assert_allclose(fit.potentials.numpy(), dense, atol=1e-9 * scale, rtol=0)
    assert float(fit.potentials.min()) == 0
    violation = worst_violation(x.double().numpy(), z.double().numpy(), fit.potentials.numpy(), l, L)
    assert violation <= fit.largest_violation + 1e-12 * scale <= 1e-10 * scale
    assert fit.pairs == n * (n - 1)
    assert fit.infeasible_below is not None
    assert fit.infeasible_below < L <= fit.infeasible_below * (1 + rtol) * (1 + 1e-12)
    below = fit.infeasible_below * (1 - 1e-6)
    assert dense_potentials(x, z, ratio * below, below) is None
    assert cycle_weight(x, z, fit.cycle, ratio, below) > 0


@pytest.mark.parametrize("ratio", [-2.0, -1.0, -0.3, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_smallest_smoothness_equals_highs(ratio: float, seed: int) -> None:
    x, z = points(24, 3, seed, noise=0.05)
    oracle = lp_smallest_smoothness(x.numpy(), z.numpy(), ratio)
    if np.isinf(oracle):
        with pytest.raises(InfeasibleError, match="no smoothness"):
            fit_potentials(x, z, ratio)
        return
    fit = fit_potentials(x, z, ratio)
    assert oracle * (1 - 1e-6) <= fit.smoothness <= oracle * (1 + 1e-3) * (1 + 1e-6)
    check(x, z, ratio, fit, 1e-3)
    highs = lp_potentials(x.numpy(), z.numpy(), ratio * fit.smoothness, fit.smoothness)
    assert highs is not None
    np.testing.assert_allclose(fit.potentials.numpy(), highs, atol=1e-8)


@pytest.mark.parametrize("candidates", [1, 2])
@pytest.mark.parametrize("ratio", [-1.0, -0.5])
@pytest.mark.parametrize("seed", range(4))
def test_few_candidates_still_give_the_answer_of_all_pairs(candidates: int, ratio: float, seed: int) -> None:
    x, z = points(150, 5, seed)
    few = fit_potentials(x, z, ratio, candidates=candidates, rtol=1e-4)
    assert few.searches > 1
    check(x, z, ratio, few, 1e-4)
    many = fit_potentials(x, z, ratio, candidates=149, rtol=1e-4)
    assert many.searches == 1
    assert few.smoothness == pytest.approx(many.smoothness, rel=1.01e-4)


def test_the_pairs_that_decide_may_be_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start may be as wrong as can be: only the farthest pairs, then none at all."""
    x, z = points(60, 3, seed=5)
    expected = fit_potentials(x, z, -1.0)

    def farthest(self: Points, k: int) -> Any:
        j = torch.cdist(x, x).topk(k, dim=1).indices.flatten()
        return self.both_ways(torch.arange(60).repeat_interleave(k), j)[0]

    def none(self: Points, k: int) -> Any:
        return self.both_ways(torch.arange(0), torch.arange(0))[0]

    for start in (farthest, none):
        monkeypatch.setattr(Points, "nearest", start)
        fit = fit_potentials(x, z, -1.0, candidates=2)
        check(x, z, -1.0, fit, 1e-3)
        assert fit.smoothness == pytest.approx(expected.smoothness, rel=1.01e-3)


@pytest.mark.parametrize("n", [5, 12, 40])
def test_one_long_cycle_decides(n: int) -> None:
    """A quarter turn on a circle: going round gains at every step, and nearby pairs are harmless."""
    angle = torch.arange(n, dtype=torch.float64) * 2 * torch.pi / n
    x = torch.stack([angle.cos(), angle.sin()], 1)
    z = torch.stack([-angle.sin(), angle.cos()], 1)
    for candidates in (1, 4):
        fit = fit_potentials(x, z, -1.0, candidates=candidates)
        oracle = lp_smallest_smoothness(x.numpy(), z.numpy(), -1.0)
        assert oracle * (1 - 1e-6) <= fit.smoothness <= oracle * (1 + 1e-3) * (1 + 1e-6)
        assert len(fit.cycle) > 2
        check(x, z, -1.0, fit, 1e-3)
    with pytest.raises(InfeasibleError, match="no smoothness"):
        fit_potentials(x, z, 0.0)  # a turn is not the gradient of a convex function


@pytest.mark.parametrize("candidates", [1, 16])
@pytest.mark.parametrize(("l", "L"), [(-2.0, 2.0), (-0.5, 2.5), (0.0, 3.0), (0.2, 1.8)])
def test_given_bounds(l: float, L: float, candidates: int) -> None:
    rng = np.random.default_rng(6)
    x = torch.from_numpy(rng.normal(size=(80, 4)))
    z = x + 0.7 * x.tanh()  # a gradient with curvature in [1, 1.7]
    fit = fit_potentials(x, z, l / L, L=L, candidates=candidates)
    dense = dense_potentials(x, z, l, L)
    assert dense is not None
    np.testing.assert_allclose(fit.potentials.numpy(), dense, atol=1e-9)
    assert (fit.smoothness, fit.infeasible_below, fit.cycle) == (L, None, ())
    with pytest.raises(InfeasibleError, match=r"raise L or lower l"):
        fit_potentials(x, z, 0.0, L=1.2, candidates=candidates)


def test_a_looser_tolerance_is_kept() -> None:
    x, z = points(100, 4, seed=7)
    for rtol in (1e-1, 1e-2, 1e-6):
        check(x, z, -1.0, fit_potentials(x, z, -1.0, rtol=rtol, candidates=2), rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [1, MEMORY])
def test_dtype_and_memory(dtype: torch.dtype, memory: int) -> None:
    """The answer is that of the numbers as given, in float64, whatever the blocks are."""
    x, z = (t.to(dtype) for t in points(90, 6, seed=8))
    fit = fit_potentials(x, z, -1.0, memory=memory, candidates=3)
    assert fit.potentials.dtype == torch.float64
    check(x, z, -1.0, fit, 1e-3)
    whole = fit_potentials(x.double(), z.double(), -1.0, candidates=3)
    torch.testing.assert_close(fit.potentials, whole.potentials, atol=1e-9, rtol=0)


def test_without_single_precision_products() -> None:
    """Where float32 products are not float32 (TF32, bfloat16), all scores are computed in float64."""
    x, z = points(90, 6, seed=8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check(x, z, -1.0, fit_potentials(x, z, -1.0, candidates=2), 1e-3)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("c", [1.3, -1.3])
def test_every_pair_is_tight(c: float) -> None:
    """z = c x at L = |c|: all pairs hold with equality on one side, too close to call in single precision."""
    x, _ = points(200, 4, seed=9)
    fit = fit_potentials(x, c * x, -1.0, L=1.3, candidates=2)
    exact = c / 2 * x.square().sum(1)
    torch.testing.assert_close(fit.potentials, exact - exact.min(), atol=1e-11, rtol=0)
    assert fit.largest_violation <= 1e-11
    assert fit.rechecked > 200 * 100
    smallest = fit_potentials(x, c * x, -1.0, candidates=2)
    assert smallest.smoothness == pytest.approx(1.3, rel=1.01e-3)


def test_one_point_and_two() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    one = fit_potentials(x[:1], x[:1], -1.0)
    assert one.potentials.tolist() == [0.0]
    assert (one.pairs, one.largest_violation) == (0, 0.0)
    assert fit_potentials(x[:1], x[:1], 0.5, L=1.0).potentials.tolist() == [0.0]
    two = fit_potentials(x, 3 * x.flip(1), -1.0)  # |dz| / |dx| = 3
    assert two.infeasible_below == pytest.approx(3.0)
    check(x, 3 * x.flip(1), -1.0, two, 1e-3)


def test_equal_features_fit_any_smoothness() -> None:
    x, _ = points(30, 3)
    phi = BrenierPotential.fit(x, torch.ones_like(x))
    # Any L > 0 fits; so small a one that the map is flat, and large enough to divide by.
    assert 0 < float(phi.regularity.L) < 1e-5
    exact = x.sum(1)
    torch.testing.assert_close(phi.potentials, exact - exact.min(), atol=1e-4, rtol=0)
    torch.testing.assert_close(phi.gradient(3 * x).value, torch.ones_like(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", [-1.0, -0.5])
def test_collinear(ratio: float) -> None:
    rng = np.random.default_rng(10)
    t = torch.from_numpy(np.sort(rng.normal(size=50)))[:, None]
    direction = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
    x, z = t * direction, (t.tanh() - 0.2 * t) * direction
    fit = fit_potentials(x, z, ratio, candidates=1)
    check(x, z, ratio, fit, 1e-3)


@pytest.mark.parametrize("far", [1e4, 1e8])
def test_far_outlier(far: float) -> None:
    """It does not cost the others their digits."""
    x, z = points(100, 4, seed=11)
    alone = fit_potentials(x, z, -1.0)
    out = torch.full((1, 4), far, dtype=torch.float64)
    fit = fit_potentials(torch.cat([x, out]), torch.cat([z, out]), -1.0, candidates=2)
    assert fit.smoothness == pytest.approx(alone.smoothness, rel=1.01e-3)
    gaps = least_gaps(x.numpy(), z.numpy(), -fit.smoothness, fit.smoothness)
    phi = fit.potentials[:-1].numpy()
    lost = 1e-12 * np.abs(phi).max()  # what float64 leaves of numbers of this size
    assert (gaps - (phi[:, None] - phi)).max() <= 1e-9 + lost


def test_scales() -> None:
    x, z = points(60, 3, seed=12)
    fit = fit_potentials(x, z, -1.0)
    for a, b in ((1e-8, 1.0), (1e8, 1e-8), (1e-12, 1e12)):
        scaled = fit_potentials(a * x, b * z, -1.0, candidates=2)
        assert scaled.smoothness == pytest.approx(fit.smoothness * b / a, rel=1.01e-3)
        given = fit_potentials(a * x, b * z, -1.0, L=fit.smoothness * b / a, candidates=2)
        torch.testing.assert_close(given.potentials / (a * b), fit.potentials, atol=1e-9, rtol=1e-9)


def test_equal_points() -> None:
    x, z = points(40, 3, seed=13)
    once = fit_potentials(x, z, -1.0)
    twice = fit_potentials(torch.cat([x, x[:7]]), torch.cat([z, z[:7]]), -1.0, candidates=2)
    assert twice.smoothness == pytest.approx(once.smoothness, rel=1.01e-3)
    torch.testing.assert_close(twice.potentials[:7], twice.potentials[40:], atol=1e-12, rtol=0)
    torn = torch.cat([z, z[:1] + 0.5])
    for candidates in (1, 40):
        with pytest.raises(ValueError, match=r"equal points carry different features; merge duplicates first"):
            fit_potentials(torch.cat([x, x[:1]]), torn, -1.0, candidates=candidates)
        with pytest.raises(InfeasibleError):
            fit_potentials(torch.cat([x, x[:1]]), torn, -1.0, L=2.0, candidates=candidates)


def test_fit_reports(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    x, z = points(50, 3, seed=14)
    with caplog.at_level(logging.DEBUG, logger="otad.cip.longest_paths"):
        phi = BrenierPotential.fit(x, z, progress=True)
    assert phi.proof is not None
    searches = [record for record in caplog.records if "of all pairs" in record.message]
    assert len(searches) == phi.proof.searches
    assert "0 of 50 rows violated" in searches[-1].message
    assert "all pairs, search 1" in capsys.readouterr().err
    assert phi.proof.pairs == 50 * 49
    assert torch.equal(phi.proof.potentials, phi.potentials)
    assert phi.proof.smoothness == phi.lipschitz
    assert BrenierPotential(x, z, phi.potentials, Regularity(-1.0, 1.0)).proof is None


def test_chosen_pairs_are_those_of_exact_numbers() -> None:
    """The nearest and the most violated pairs: single precision does not decide which they are."""
    rng = np.random.default_rng(15)
    # Distances that differ by less than single precision resolves.
    x = torch.from_numpy(np.round(rng.normal(size=(120, 3)), 1) + 1e-8 * rng.normal(size=(120, 3)))
    z = x + torch.from_numpy(0.3 * rng.normal(size=x.shape))
    cloud, k, L = Points(x, z, -1.0, MEMORY), 5, 1.5
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    columns = distances.topk(k, dim=1, largest=False).indices
    nearest = cloud.nearest(k)
    chosen = {(i, int(j)) for i in range(120) for j in columns[i]}
    assert set(zip(nearest.i.tolist(), nearest.j.tolist(), strict=True)) == chosen | {(j, i) for i, j in chosen}

    # phi = 0, in the gauge of the search.
    found = cloud.search(-cloud.tilt, L, k)
    excess = torch.from_numpy(least_gaps(x.numpy(), z.numpy(), -L, L)).fill_diagonal_(-torch.inf)
    most = excess.topk(k + 1, dim=1)
    expected = {(i, int(j)) for i in range(120) for v, j in zip(most.values[i], most.indices[i], strict=True) if v > 0}
    assert set(zip(found.violated.i.tolist(), found.violated.j.tolist(), strict=True)) == expected
    assert found.largest == pytest.approx(float(excess.max()), rel=1e-6)
    assert torch.equal(found.reverse.i, found.violated.j)
