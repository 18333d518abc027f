"""Independent answers to the convex integration problem, slow and plain.

Everything here is written in the (l, L) form of the interpolation theorem (Taylor, Hendrickx, Glineur 2017,
Theorem 4; Rotaru, Glineur, Patrinos 2022 for l < 0), never in the shifted form that the kernels use, so that
a mistake in the shift cannot hide. Linear programmes go to HiGHS, quadratic ones to Clarabel through CVXPY.
"""

import contextlib
import itertools
import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import ot.mapping
from scipy.optimize import linprog

Array = np.ndarray

# Status codes of scipy.optimize.linprog.
_LP_OPTIMAL, _LP_INFEASIBLE = 0, 2


def theorem_right_side(dx: Array, dz: Array, l: float, L: float) -> Array:
    """Right side of the theorem for dx = x_i - x_j and dz = z_i - z_j, last axis d."""
    squares = (dz**2).sum(-1) / L + l * (dx**2).sum(-1) - 2.0 * (l / L) * (dz * dx).sum(-1)
    return squares / (2.0 * (1.0 - l / L))


def least_gaps(x: Array, z: Array, l: float, L: float) -> Array:
    """(k, k): the least phi_i - phi_j that the theorem allows."""
    dx = x[:, None, :] - x[None, :, :]
    dz = z[:, None, :] - z[None, :, :]
    return np.einsum("jd,ijd->ij", z, dx) + theorem_right_side(dx, dz, l, L)


def worst_violation(x: Array, z: Array, phi: Array, l: float, L: float) -> float:
    """Largest violation over all ordered pairs; at most rounding where phi is feasible."""
    return float((least_gaps(x, z, l, L) - (phi[:, None] - phi[None, :])).max())


def lp_potentials(x: Array, z: Array, l: float, L: float) -> Array | None:
    """Smallest phi >= 0 by HiGHS, None where there is no feasible phi."""
    k = len(x)
    rows, bounds = _difference_rows(least_gaps(x, z, l, L))
    if not len(rows):
        return np.zeros(k)
    scale = max(1.0, float(np.abs(bounds).max()))
    solved = linprog(
        np.ones(k),
        A_ub=rows,
        b_ub=bounds / scale,
        bounds=(0, None),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solved.status == _LP_INFEASIBLE:
        return None
    if solved.status != _LP_OPTIMAL:
        raise AssertionError(f"HiGHS stopped without an answer: {solved.message}")
    return solved.x * scale


def lp_smallest_smoothness(x: Array, z: Array, ratio: float, tolerance: float = 1e-9) -> float:
    """Smallest L for which F(ratio L, L) fits, by bisection on a linear programme; inf if there is none."""
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    quotients = np.linalg.norm(z[:, None] - z[None], axis=-1)[distances > 0] / distances[distances > 0]
    low = float(quotients.max(initial=0.0)) * (1.0 - 1e-9)  # no map of the class moves faster than max(|l|, L)
    if low == 0.0:
        return 0.0
    low = low / max(1.0, abs(ratio))
    high = low
    while _lp_margin(x, z, ratio * high, high) < 0.0:
        low, high = high, 2.0 * high
        if high > 1e7 * float(quotients.max()):
            return float("inf")
    while high - low > tolerance * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _lp_margin(x, z, ratio * middle, middle) >= 0.0 else (middle, high)
    return high


def _lp_margin(x: Array, z: Array, l: float, L: float) -> float:
    """Largest s with phi_i - phi_j >= w_ij + s for all pairs: feasible exactly if s >= 0."""
    k = len(x)
    rows, bounds = _difference_rows(least_gaps(x, z, l, L))
    scale = float(np.abs(bounds).max())
    solved = linprog(
        np.concatenate([np.zeros(k), [-1.0]]),
        A_ub=np.hstack([rows, np.ones((len(rows), 1))]),
        b_ub=bounds / scale,
        bounds=[(0.0, 0.0)] + [(None, None)] * k,
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solved.status != _LP_OPTIMAL:
        raise AssertionError(f"HiGHS stopped without an answer: {solved.message}")
    return float(-solved.fun)


def _difference_rows(gaps: Array) -> tuple[Array, Array]:
    """phi_i - phi_j >= gaps_ij for i != j, as rows @ phi <= bounds."""
    k = len(gaps)
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    rows = np.zeros((len(pairs), k))
    for row, (i, j) in zip(rows, pairs, strict=True):
        row[i], row[j] = -1.0, 1.0
    return rows, np.array([-gaps[i, j] for i, j in pairs])


def qcqp(x: Array, x_i: Array, z_i: Array, phi_i: Array, l: float, L: float, branch: str) -> tuple[float, Array]:
    """Value and feature of the lower or upper interpolant at one point x, from the theorem, by Clarabel."""
    if branch == "mean":
        parts = [qcqp(x, x_i, z_i, phi_i, l, L, part) for part in ("lower", "upper")]
        return 0.5 * (parts[0][0] + parts[1][0]), 0.5 * (parts[0][1] + parts[1][1])
    # The feature is moved to the origin of the z_i: Clarabel then resolves it to more digits.
    d, centre = len(x), z_i.mean(0)
    v, moved = cp.Variable(), cp.Variable(d)
    constraints = []
    for point, feature, phi in zip(x_i, z_i, phi_i, strict=True):
        dx, dz = x - point, moved - (feature - centre)
        right = (cp.sum_squares(dz) / L + l * float(dx @ dx) - 2.0 * (l / L) * (dx @ dz)) / (2.0 * (1.0 - l / L))
        if branch == "lower":  # the new point is i, the data point is j
            constraints.append(v - phi - float(feature @ dx) >= right)
        else:  # the new point is j, the data point is i
            constraints.append(phi - v + (moved + centre) @ dx >= right)
    problem = cp.Problem(cp.Minimize(v) if branch == "lower" else cp.Maximize(v), constraints)
    with warnings.catch_warnings():
        # The tolerances are set below what Clarabel always reaches; CVXPY then warns, and the tests compare.
        warnings.simplefilter("ignore")
        # On some processors the last digits end in a numerical error instead: then with fewer of them.
        for digits in (1e-13, 1e-12, 1e-11):
            with contextlib.suppress(cp.SolverError):
                problem.solve(solver="CLARABEL", tol_gap_abs=digits, tol_gap_rel=digits, tol_feas=digits)
                break
    if problem.status not in ("optimal", "optimal_inaccurate") or moved.value is None:
        raise AssertionError(f"Clarabel stopped without an answer: {problem.status}")
    return float(problem.value), np.asarray(moved.value) + centre  # pyright: ignore[reportArgumentType]


def enumerated(x: Array, x_i: Array, z_i: Array, phi_i: Array, l: float, L: float, branch: str) -> tuple[float, Array]:
    """As `qcqp`, to rounding, by trying every active set; few points only.

    Written as v >= h_i(g) = h_i(0) + <slope_i, g> + |g|^2 / (2 (L - l)): on the right active set A the
    optimum is g = -(L - l) sum_A lambda_i slope_i with all h_i equal, lambda >= 0 and no h_i above them.
    """
    if branch == "mean":
        parts = [enumerated(x, x_i, z_i, phi_i, l, L, part) for part in ("lower", "upper")]
        return 0.5 * (parts[0][0] + parts[1][0]), 0.5 * (parts[0][1] + parts[1][1])
    k, centre, M, dx = len(x_i), z_i.mean(0), L - l, x - x_i
    offset = theorem_right_side(dx, centre - z_i, l, L)
    bend = ((centre - z_i) / L - (l / L) * dx) / (1.0 - l / L)
    if branch == "lower":
        height, slope = phi_i + (z_i * dx).sum(1) + offset, bend
    else:
        height, slope = -phi_i - dx @ centre + offset, bend - dx
    best: tuple[float, float, Array] | None = None
    for size in range(1, min(k, len(x) + 1) + 1):
        for active in map(list, itertools.combinations(range(k), size)):
            edges = slope[active[1:]] - slope[active[0]]
            weights = np.zeros(k)
            weights[active[0]] = 1.0
            if size > 1:  # equal heights on A, with the weight of the first point eliminated
                fall = height[active[1:]] - height[active[0]] - M * edges @ slope[active[0]]
                if np.linalg.cond(edges @ edges.T) > 1e12:
                    continue
                rest = np.linalg.solve(M * edges @ edges.T, fall)
                weights[active[1:]], weights[active[0]] = rest, 1.0 - rest.sum()
            g = -M * weights @ slope
            heights = height + slope @ g + g @ g / (2 * M)
            error = max(heights.max() - heights[active].min(), -weights.min())
            if best is None or error < best[0]:
                best = error, heights.max(), g + centre
    assert best is not None
    assert best[0] < 1e-9, "no active set satisfies the optimality conditions"
    return (best[1] if branch == "lower" else -best[1]), best[2]


def pot_bounds(x: Array, x_i: Array, z_i: Array, phi_i: Array, l: float, L: float) -> dict[str, tuple[float, Array]]:
    """Lower and upper interpolant at one point x, by Python Optimal Transport; needs l > 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounds: Any = ot.mapping.nearest_brenier_potential_predict_bounds(
            x_i,
            phi_i,
            z_i,
            x[None],
            strongly_convex_constant=l,
            gradient_lipschitz_constant=L,
            solver="CLARABEL",
        )
    values, features = bounds
    return {"lower": (values[0, 0], features[0, 0]), "upper": (values[1, 0], features[1, 0])}
