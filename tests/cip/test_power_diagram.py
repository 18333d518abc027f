"""Power diagrams: distances against a conic solver, 1-NN as a special case, invariances, perturbations."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otad.baselines import NearestNeighbor
from otad.cip import PowerDiagram, power_diagram


def diagram(n: int = 30, d: int = 4, classes: int = 3, seed: int = 0) -> tuple[PowerDiagram, Tensor]:
    """Random pieces, and points to ask about."""
    draws = torch.Generator().manual_seed(seed)
    slopes, intercepts = torch.randn(n, d, generator=draws), torch.randn(n, generator=draws)
    return PowerDiagram(slopes, intercepts, torch.arange(n) % classes), torch.randn(8, d, generator=draws)


def label(power: PowerDiagram, x: Tensor) -> Tensor:
    return power(x)[0].argmax(1)


def conic_distance(power: PowerDiagram, x: np.ndarray, own: int, box: float = np.inf) -> float:
    """To the nearest point, of coordinates up to `box`, where another class scores as high as all pieces of `own`.

    One cone programme for each piece of the others.
    """
    slopes, intercepts, classes = (part.numpy() for part in (power.slopes, power.intercepts, power.classes))
    mine, nearest = classes == own, np.inf
    for k in np.flatnonzero(~mine):
        point = cp.Variable(len(x))
        ahead = (slopes[k] - slopes[mine]) @ point + intercepts[k] - intercepts[mine]
        inside = [] if box == np.inf else [cp.abs(point) <= box]
        problem = cp.Problem(cp.Minimize(cp.norm(point - x)), [ahead >= 0, *inside])
        problem.solve(solver=cp.CLARABEL)
        if problem.status in ("optimal", "optimal_inaccurate"):
            nearest = min(nearest, float(np.linalg.norm(point.value - x)))
    return nearest


@pytest.mark.parametrize("seed", range(3))
def test_distance_is_that_of_a_conic_solver(seed: int) -> None:
    power, x = diagram(seed=seed)
    own = label(power, x)
    expected = [conic_distance(power, row.double().numpy(), int(c)) for row, c in zip(x, own, strict=True)]
    assert power.distance(x, own).numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("most", [1, 3])
def test_pieces_that_are_not_looked_at_closely_still_count(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left out counts by its first bound: never beyond what a look at all of them proves."""
    power, _ = diagram(n=200, d=3, classes=2)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    own = label(power, x)
    exact = power.distance(x, own)
    monkeypatch.setattr(power_diagram, "MOST", most)
    least = power.distance(x, own)
    assert (least <= exact + 1e-12).all()
    assert (least >= power.distance(x, own, closer=False)).all()


def box_of(size: float, d: int) -> tuple[Tensor, Tensor]:
    return torch.full((d,), -size, dtype=torch.float64), torch.full((d,), size, dtype=torch.float64)


def test_distance_within_a_box_is_that_of_a_conic_solver_where_each_class_has_one_piece() -> None:
    draws = torch.Generator().manual_seed(3)
    power = PowerDiagram(torch.randn(4, 6, generator=draws), torch.zeros(4), torch.arange(4))
    x = 0.95 * (2 * torch.rand(12, 6, generator=draws) - 1).sign()
    own = label(power, x)
    distance, free = power.distance(x, own, box=box_of(1.0, 6)), power.distance(x, own)
    expected = np.array([conic_distance(power, p.double().numpy(), int(c), 1.0) for p, c in zip(x, own, strict=True)])
    # Out of reach within the box: some lower bound is all that is promised.
    reached = np.isfinite(expected)
    assert distance.numpy()[reached] == pytest.approx(expected[reached], rel=1e-5, abs=1e-6)
    assert (distance > 1.01 * free).any()


def test_within_a_box_nothing_is_claimed_beyond_a_conic_solver() -> None:
    power, x = diagram(d=6, seed=4)
    x = x.clamp(-1, 1)
    own = label(power, x)
    distance = power.distance(x, own, box=box_of(1.0, 6)).numpy()
    expected = np.array([conic_distance(power, p.double().numpy(), int(c), 1.0) for p, c in zip(x, own, strict=True)])
    assert (distance <= expected + 1e-6).all()
    assert (distance >= power.distance(x, own).numpy() - 1e-9).all()


def test_a_point_outside_of_the_box_gets_what_it_gets_without() -> None:
    power, x = diagram(seed=6)
    x[:, 0] = 2.0
    own = label(power, x)
    assert torch.equal(power.distance(x, own, box=box_of(1.0, 4)), power.distance(x, own))


def test_single_planes_prove_less_and_never_more() -> None:
    power, x = diagram(n=200, seed=5)
    own = label(power, x)
    single, combined = power.distance(x, own, closer=False), power.distance(x, own)
    assert (single <= combined).all()
    assert (single < 0.99 * combined).any()


def test_pieces_of_nearest_points_are_the_nearest_neighbour_classifier() -> None:
    draws = torch.Generator().manual_seed(1)
    points, y = torch.randn(120, 5, generator=draws), torch.arange(120) % 4
    x = torch.randn(40, 5, generator=draws)
    power, nearest = PowerDiagram(points, -points.double().square().sum(1) / 2, y), NearestNeighbor(points, y)
    assert torch.equal(label(power, x), nearest(x).argmax(1))
    proven = torch.from_numpy(nearest.certify(x).radius)
    assert (power.distance(x, label(power, x)) >= proven - 1e-4).all()
    assert power.distance(x, label(power, x), closer=False).numpy() == pytest.approx(proven.numpy(), abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 5), d=st.integers(1, 8))
def test_no_point_within_the_distance_has_another_label(seed: int, classes: int, d: int) -> None:
    power, x = diagram(25, d, classes, seed)
    own = label(power, x)
    distance = power.distance(x, own)
    assert (distance >= 0).all()
    draws = torch.Generator().manual_seed(seed)
    for _ in range(20):
        step = torch.nn.functional.normalize(torch.randn(x.shape, generator=draws, dtype=torch.float64), dim=1)
        assert torch.equal(label(power, x + 0.999999 * distance.clamp(max=1e6)[:, None] * step), own)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_distance_ignores_a_common_affine_function_and_scales_with_space(seed: int, scale: float) -> None:
    power, x = diagram(seed=seed)
    own, distance = label(power, x), power.distance(x, label(power, x))
    draws = torch.Generator().manual_seed(seed)
    common = torch.randn(x.shape[1], generator=draws).double()
    moved = PowerDiagram(power.slopes + common, power.intercepts - 3, power.classes)
    assert moved.distance(x, own).numpy() == pytest.approx(distance.numpy(), rel=1e-6, abs=1e-9)
    scaled = PowerDiagram(power.slopes / scale, power.intercepts, power.classes)
    assert scaled.distance(scale * x.double(), own).numpy() == pytest.approx(scale * distance.numpy(), rel=1e-6)


def test_gradient_is_the_slope_of_the_best_piece() -> None:
    power, x = diagram()
    x = x.double().requires_grad_()
    value, best = power(x)
    (gradient,) = torch.autograd.grad(value[:, 1].sum(), x)
    assert torch.equal(gradient, power.slopes[best[:, 1]])
    assert (power.classes[best] == torch.arange(3)).all()


def test_smoothed_scores_lie_above_and_come_near() -> None:
    power, x = diagram()
    x = x.double()
    hard = power(x)[0]
    errors = [(power.smoothed(factor)(x)[0] - hard) for factor in (0.1, 0.5, 0.99)]
    assert all((error >= -1e-12).all() for error in errors)
    assert errors[0].amax() > errors[1].amax() > errors[2].amax()
    torch.autograd.gradcheck(lambda point: power.smoothed(0.1)(point)[0], x.requires_grad_())


def test_allowance_for_rounding_lowers_every_distance() -> None:
    power, x = diagram()
    own = label(power, x)
    assert (power.distance(x, own, rounding=1e-3) < power.distance(x, own)).all()


def test_equal_pieces_of_two_classes_leave_no_distance() -> None:
    slopes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    power = PowerDiagram(slopes, torch.zeros(3), torch.tensor([0, 1, 2]))
    assert float(power.distance(torch.tensor([[1.0, 1.0]]), torch.tensor([0]))) == 0


def test_one_class_is_never_left() -> None:
    power = PowerDiagram(torch.randn(5, 3), torch.zeros(5), torch.zeros(5, dtype=torch.long))
    assert torch.isinf(power.distance(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))).all()


def test_answers_do_not_depend_on_the_batch() -> None:
    power, _ = diagram(n=300, d=6, seed=2)
    x = torch.randn(100, 6)
    own = label(power, x)
    alone = torch.cat([power.distance(row[None], c[None]) for row, c in zip(x[:10], own, strict=False)])
    assert alone.numpy() == pytest.approx(power.distance(x, own)[:10].numpy(), rel=1e-9)


@pytest.mark.parametrize(
    "parts",
    [
        (torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(3), torch.tensor([0, 2, 2])),
    ],
)
def test_pieces_that_do_not_fit_are_refused(parts: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="every class"):
        PowerDiagram(*parts)


def test_a_coordinate_on_the_edge_it_leaves_is_free() -> None:
    """Where x + t g rounds back to the edge, Newton's step must not take the coordinate for one that has arrived."""
    slopes = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1e9, 0.1]]).double()
    x = torch.tensor([[-0.5, 0.5, 0.0]]).double()
    intercept = -(slopes[1] @ x[0]) - 0.05
    power = PowerDiagram(slopes, torch.stack([torch.zeros(()).double(), intercept]), torch.tensor([0, 1]))
    moved = x + torch.tensor([0.0502, 0.0, 0.0]).double()
    assert label(power, x).item() == 0
    assert label(power, moved).item() == 1
    assert float(power.distance(x, torch.tensor([0]), box=box_of(0.5, 3))) <= 0.0502


def test_a_class_of_one_piece_takes_nothing_from_other_rows() -> None:
    draws = torch.Generator().manual_seed(1)
    power = PowerDiagram(
        torch.randn(41, 3, generator=draws), torch.randn(41, generator=draws), torch.arange(41) % 40 % 3
    )
    lonely = PowerDiagram(
        torch.cat([power.slopes, power.slopes[:1] * 9]),
        torch.cat([power.intercepts, power.intercepts[:1]]),
        torch.cat([power.classes, torch.tensor([3])]),
    )
    x = torch.randn(200, 3, generator=draws)
    own = label(lonely, x)
    assert (own == 3).any()
    alone = torch.cat([lonely.distance(p[None], c[None]) for p, c in zip(x, own, strict=True)])
    assert lonely.distance(x, own).numpy() == pytest.approx(alone.numpy(), rel=1e-9)


def test_no_points_and_no_numbers() -> None:
    power, x = diagram()
    assert power.distance(x[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)
    x[0] = torch.nan
    x[1] = torch.inf
    distance = power.distance(x, label(power, x))
    assert (distance[:2] == 0).all()
    assert (distance[2:] > 0).any()
