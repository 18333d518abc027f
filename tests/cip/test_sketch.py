"""The sketch must never lose a function that exceeds the threshold, whatever the numbers look like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from otad.cip.sketch import RANK, TILE, Sketch


def affine_functions(kind: str, n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes, offsets and queries, float64."""
    rng = np.random.default_rng(seed)
    slopes, offsets, queries = rng.normal(size=(n, d)), rng.normal(size=n), rng.normal(size=(5, d))
    if kind == "few directions":
        slopes = rng.normal(size=(n, 2)) @ rng.normal(size=(2, d)) + 1e-6 * slopes
    if kind == "all alike":
        slopes = slopes[:1] + 1e-9 * slopes
        offsets = 1e-9 * offsets
    if kind == "far outlier":
        slopes[0] *= 1e8
    if kind == "large offsets":
        offsets *= 1e9
    if kind == "huge":
        slopes, offsets = slopes * 1e25, offsets * 1e30
    if kind == "tiny":
        slopes, offsets, queries = slopes * 1e-25, offsets * 1e-30, queries * 1e-5
    if kind == "zero":
        slopes[:] = 0.0
        queries[0] = 0.0
    if kind == "parallel":
        slopes = np.outer(rng.uniform(1, 2, size=n), slopes[0])
        queries[0] = 1e3 * slopes[0]
    return torch.from_numpy(slopes), torch.from_numpy(offsets), torch.from_numpy(queries)


KINDS = ["plain", "few directions", "all alike", "far outlier", "large offsets", "huge", "tiny", "zero", "parallel"]


def above(sketch: Sketch, queries: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = sketch.above(queries, threshold)
    assert found is not None
    return found


def check(slopes: Tensor, offsets: Tensor, queries: Tensor, place: float) -> None:
    values = queries @ slopes.T + offsets
    # Thresholds just below a value, so that the ones above them by least are at stake.
    threshold = torch.nextafter(values.quantile(place, dim=1, interpolation="lower"), torch.tensor(-torch.inf))
    row, function, _ = above(Sketch(slopes, offsets), queries, threshold)
    found = torch.zeros_like(values, dtype=torch.bool)
    found[row, function] = True
    assert bool(found[values > threshold[:, None]].all())
    assert len(row) == found.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 3), (40, 7), (500, 300), (TILE + 9, 20)])
def test_nothing_above_is_lost(kind: str, shape: tuple[int, int]) -> None:
    for place in (0.0, 0.5, 0.99, 1.0):
        check(*affine_functions(kind, *shape, seed=0), place)


@given(st.sampled_from(KINDS), st.integers(1, 60), st.integers(1, 30), st.integers(0, 2**31), st.floats(0, 1))
def test_nothing_above_is_lost_anywhere(kind: str, n: int, d: int, seed: int, place: float) -> None:
    check(*affine_functions(kind, n, d, seed), place)


def test_bounds_are_tight_where_the_slopes_fit_into_few_coordinates() -> None:
    slopes, offsets, queries = affine_functions("few directions", 3000, 600, seed=1)
    values = queries @ slopes.T + offsets
    threshold = values.quantile(0.99, dim=1)
    row, _, _ = above(Sketch(slopes, offsets), queries, threshold)
    assert len(row) <= 1.05 * int((values > threshold[:, None]).sum())


def test_a_guess_is_exact_where_few_coordinates_suffice() -> None:
    slopes, offsets, queries = affine_functions("plain", 700, 40, seed=2)
    M = 3.0
    alone = queries @ slopes.T + offsets - slopes.square().sum(1) / (2 * M)
    sketch = Sketch(slopes, offsets)
    assert torch.equal(sketch.likely(queries, 12, M).sort(1).values, alone.topk(12, dim=1).indices.sort(1).values)
    assert sketch.likely(queries, 700).sort(1).values.equal(torch.arange(700).expand(5, -1))


def test_more_dimensions_than_coordinates_are_bounded_by_norms() -> None:
    # Slopes that no basis of RANK directions holds: the bounds are loose, and still nothing is lost.
    slopes = torch.eye(2 * RANK, dtype=torch.float64)
    offsets = torch.zeros(2 * RANK, dtype=torch.float64)
    queries = torch.eye(2 * RANK, dtype=torch.float64)[::37]
    row, function, _ = above(Sketch(slopes, offsets), queries, torch.full((len(queries),), 0.999, dtype=torch.float64))
    for r, wanted in enumerate(range(0, 2 * RANK, 37)):
        assert wanted in function[row == r]


def test_faster_products_of_lower_precision_are_not_used() -> None:
    slopes, offsets, queries = affine_functions("plain", 300, 100, seed=3)
    torch.set_float32_matmul_precision("medium")
    try:
        check(slopes, offsets, queries, 0.9)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_guesses_are_pieces_where_most_of_the_last_tile_is_padding() -> None:
    n = 128 * TILE + 1
    slopes = torch.ones(n, 2, dtype=torch.float64)
    offsets = -torch.arange(n, dtype=torch.float64)
    found = Sketch(slopes, offsets).likely(torch.zeros(2, 2, dtype=torch.float64), 8, M=1.0)
    assert int(found.max()) < n


def test_the_default_dtype_does_not_matter() -> None:
    slopes, offsets, queries = affine_functions("plain", 300, 100, seed=4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        check(slopes, offsets, queries, 0.9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_too_many_candidates_are_reported() -> None:
    slopes, offsets, queries = affine_functions("plain", 300, 300, seed=5)
    lowest = (queries @ slopes.T + offsets).amin(1) - 1
    assert Sketch(slopes, offsets).above(queries, lowest, most=100) is None
