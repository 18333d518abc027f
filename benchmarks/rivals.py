"""The two programmes of a neighbourhood solved by conic solvers, one query at a time; l = 0 throughout.

potentials: least gaps (k, k) -> phi          minimise sum phi over phi >= 0, phi_i - phi_j >= gaps_ij
features:   x, x_i, z_i, phi -> value, g      minimise v over v >= b_i(x) + |g - z_i|^2 / (2 L)
"""

import warnings
from collections.abc import Callable
from typing import Any

import clarabel
import cvxpy as cp
import numpy as np
import ot.mapping
from scipy import sparse

__all__ = [
    "Features",
    "Potentials",
    "clarabel_dual",
    "clarabel_one_quadratic",
    "clarabel_potentials",
    "cvxpy_one_quadratic",
    "cvxpy_potentials",
    "cvxpy_theorem",
    "least_gaps",
    "pot_bounds",
]

Array = np.ndarray
Potentials = Callable[[Array], Array]
Features = Callable[[Array, Array, Array, Array], tuple[float, Array]]

# Compiling with K d parameters in d variables takes memory of the order K d^2: 46 GiB at d = 24,960.
LARGEST_COMPILED = 2000


def least_gaps(x_i: Array, z_i: Array, L: float) -> Array:
    """<z_j, x_i - x_j> + |z_i - z_j|^2 / (2 L), from two products."""
    zx, zz = z_i @ x_i.T, z_i @ z_i.T
    bent = np.diag(zz)[:, None] + np.diag(zz)[None] - 2 * zz
    gaps = zx.T - np.diag(zx)[None] + bent / (2 * L)
    np.fill_diagonal(gaps, 0.0)
    return gaps


# --- CVXPY with Clarabel: compiled once where that is possible, then new parameters for every query ---


def cvxpy_potentials(k: int) -> Potentials:
    phi, gaps = cp.Variable(k, nonneg=True), cp.Parameter((k, k))
    differences = cp.reshape(phi, (k, 1), order="C") @ np.ones((1, k))
    problem = cp.Problem(cp.Minimize(cp.sum(phi)), [differences - differences.T >= gaps])

    def solve(right: Array) -> Array:
        gaps.value = right
        _solve(problem)
        return np.asarray(phi.value)

    return solve


def cvxpy_theorem(k: int, d: int, L: float) -> Features:
    """K quadratic constraints, as the theorem and the published method have them."""
    v, g, features, heights = cp.Variable(), cp.Variable(d), cp.Parameter((k, d)), cp.Parameter(k)
    constraints: list[cp.Constraint] = [v >= heights[i] + cp.sum_squares(g - features[i]) / (2 * L) for i in range(k)]
    problem = cp.Problem(cp.Minimize(v), constraints)

    def solve(x: Array, x_i: Array, z_i: Array, phi: Array) -> tuple[float, Array]:
        features.value, heights.value = z_i, phi + (z_i * (x - x_i)).sum(1)
        value = _solve(problem, compiled=d <= LARGEST_COMPILED)
        return value, np.asarray(g.value)

    return solve


def cvxpy_one_quadratic(k: int, d: int, L: float) -> Features:
    """The same with v = t + |g|^2 / (2 L): a quadratic objective over K linear constraints."""
    t, g, features, heights = cp.Variable(), cp.Variable(d), cp.Parameter((k, d)), cp.Parameter(k)
    problem = cp.Problem(cp.Minimize(t + cp.sum_squares(g) / (2 * L)), [t >= heights - features @ g])

    def solve(x: Array, x_i: Array, z_i: Array, phi: Array) -> tuple[float, Array]:
        features.value, heights.value = z_i / L, _heights(x, x_i, z_i, phi, L)
        value = _solve(problem, compiled=d <= LARGEST_COMPILED)
        return value, np.asarray(g.value)

    return solve


def _heights(x: Array, x_i: Array, z_i: Array, phi: Array, L: float) -> Array:
    """The constraint's value at g = 0: b_i(x) + |z_i|^2 / (2 L)."""
    return phi + (z_i * (x - x_i)).sum(1) + (z_i**2).sum(1) / (2 * L)


def _solve(problem: cp.Problem, compiled: bool = True) -> float:
    with warnings.catch_warnings():
        # CVXPY warns that many parameters make compiling slow; compiling once is not inside the clock.
        warnings.simplefilter("ignore")
        problem.solve(solver="CLARABEL", ignore_dpp=not compiled)
    if problem.status != "optimal":
        raise RuntimeError(f"Clarabel stopped as {problem.status}")
    return float(problem.value)  # pyright: ignore[reportArgumentType]


# --- Clarabel without a modelling layer: minimise q.y + y'Py / 2 with b - A y in a cone ---


def clarabel_potentials(gaps: Array) -> Array:
    k = len(gaps)
    rows, columns = np.nonzero(~np.eye(k, dtype=bool))
    pairs, m = np.arange(len(rows)), len(rows)
    entries = np.concatenate([-np.ones(m), np.ones(m), -np.ones(k)])
    places = np.concatenate([pairs, pairs, m + np.arange(k)]), np.concatenate([rows, columns, np.arange(k)])
    A = sparse.csc_matrix((entries, places), shape=(m + k, k))
    b = np.concatenate([-gaps[rows, columns], np.zeros(k)])
    return np.asarray(_bare(sparse.csc_matrix((k, k)), np.ones(k), A, b, [("NonnegativeConeT", m + k)]).x)


def clarabel_one_quadratic(L: float) -> Features:
    """Over (t, g) as in `cvxpy_one_quadratic`."""

    def solve(x: Array, x_i: Array, z_i: Array, phi: Array) -> tuple[float, Array]:
        k, d = z_i.shape
        P = sparse.csc_matrix(sparse.diags(np.concatenate([[0.0], np.full(d, 1 / L)])))
        A = sparse.csc_matrix(-np.hstack([np.ones((k, 1)), z_i / L]))
        q = np.concatenate([[1.0], np.zeros(d)])
        solution = _bare(P, q, A, -_heights(x, x_i, z_i, phi, L), [("NonnegativeConeT", k)])
        return float(solution.obj_val), np.asarray(solution.x)[1:]

    return solve


def clarabel_dual(L: float) -> Features:
    """Over K weights in the simplex, from the Gram matrix of the centred z_i: what otad solves."""

    def solve(x: Array, x_i: Array, z_i: Array, phi: Array) -> tuple[float, Array]:
        k, centre = len(z_i), z_i.mean(0)
        moved = z_i - centre
        gram = moved @ moved.T
        heights = phi + (z_i * (x - x_i)).sum(1) + np.diag(gram) / (2 * L)
        P = sparse.csc_matrix(np.triu(gram / L))
        A = sparse.csc_matrix(np.vstack([np.ones((1, k)), -np.eye(k)]))
        b = np.concatenate([[1.0], np.zeros(k)])
        solution = _bare(P, -heights, A, b, [("ZeroConeT", 1), ("NonnegativeConeT", k)])
        return -float(solution.obj_val), np.asarray(solution.x) @ moved + centre

    return solve


def _bare(P: Any, q: Array, A: Any, b: Array, cones: list[tuple[str, int]]) -> Any:
    solver: Any = clarabel  # its extension module carries no types
    settings = solver.DefaultSettings()
    settings.verbose = False
    built = [getattr(solver, name)(size) for name, size in cones]
    solution = solver.DefaultSolver(P, q, A, b, built, settings).solve()
    if str(solution.status) != "Solved":
        raise RuntimeError(f"Clarabel stopped as {solution.status}")
    return solution


# --- Python Optimal Transport ---


def pot_bounds(x: Array, x_i: Array, z_i: Array, phi: Array, l: float, L: float) -> tuple[Array, Array]:
    """Values (2,) and features (2, d) of the lower and upper interpolant; POT asks for l > 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _solve
        bounds: Any = ot.mapping.nearest_brenier_potential_predict_bounds(
            x_i,
            phi,
            z_i,
            x[None],
            strongly_convex_constant=l,
            gradient_lipschitz_constant=L,
            solver="CLARABEL",
        )
    values, features = bounds
    return values[:, 0], features[:, 0]
