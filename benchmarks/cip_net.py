"""Does a network that guesses the solution of a neighbourhood pay, beside the exact kernels on the same machine?

A classifier is trained on 4,000 MNIST digits (or the training cells of pbmc68k, where the data folder has them); its
neighbourhoods are solved, a CIP-net of the default size learns from them, and both answer the test samples.

    python benchmarks/run.py cip_net
"""

import os
from functools import cache
from typing import Any

import torch
from harness import Benchmark, Table, median_seconds, with_threads
from torch import Tensor

from otad import OTADClassifier
from otad.cip import Regularity
from otad.cip.gram import inner_products
from otad.data import Dataset, load
from otad.defense import NeighborhoodInterpolation, NetworkInterpolation, guessed_weights
from otad.train.cip_net import CIPEpoch, compare, imitate

__all__ = ["run"]

K, SEED, REPEATS, BATCH = 10, 0, 5, 1000
PROBLEMS, EPOCHS = 50_000, 20
PUBLISHED = Regularity(0.0, 2.0)

TIMED = {
    "exact": "NeighborhoodInterpolation at test points, without gradients, float64: neighbours, potentials, programme; "
    "microseconds a query",
    "network": "NetworkInterpolation at the same points: neighbours, inner products in float64, the network in float32",
    "given the neighbours": "the same without the search for neighbours, which both share",
    "gradient": "forward and backward in the query, as an attack needs them, given the neighbours",
}


def run(quick: bool = False) -> Benchmark:
    accuracy, speed, training = [], [], []
    for name, bounds in _cases(quick):
        data, clf = _trained(name, quick)
        transport, head = clf.transport_, clf.backbone_.head
        words = "l = 0, L = 2" if bounds else "l = 0, smallest L"
        solver = NeighborhoodInterpolation(transport.x, transport.z, k=K, regularity=bounds)
        network, found, history = _imitation(solver, head, quick)
        with torch.no_grad():
            x = clf.module_.stem(torch.as_tensor(data.x_test)).double()
            tested = compare(solver, network.net, head, [(part, *solver.neighbors(part)[:2]) for part in x.split(250)])
            relaxed = float(solver(x).stats["relaxed"].double().mean())
        for queries, imitation in (found | {"test samples": tested}).items():
            figures = imitation.to_dict()
            accuracy.append((name, words, queries, *figures.values()))
        training.append((name, words, relaxed, len(history), history[-1].seconds, history[-1].loss))
        for threads in sorted({1, torch.get_num_threads()}):
            speed += [
                (name, words, transport.x.shape[1], len(x[:BATCH]), threads, *row)
                for row in with_threads(threads, _speed, solver, network, x[:BATCH])
            ]
    return Benchmark(
        name="cip_net",
        question="Microseconds a query and errors of CIP-net (width 32, 2 layers, 4 heads) beside the exact kernels, "
        f"K = {K}.",
        timed=TIMED,
        tables=[
            Table(
                "How near: relative feature error and equal labels, beside two guesses without a network",
                (
                    "data",
                    "bounds",
                    "queries",
                    "feature error",
                    "95th percentile",
                    "same label",
                    "nearest",
                    "mean",
                    "problems",
                ),
                accuracy,
            ),
            Table(
                "How fast (microseconds a query)",
                ("data", "bounds", "d", "batch", "threads", "what", "exact", "network", "exact / network"),
                speed,
            ),
            Table(
                f"Training on {PROBLEMS:,} solved problems",
                ("data", "bounds", "relaxed share of test samples", "epochs", "seconds", "last loss"),
                training,
            ),
        ],
        seed=SEED,
        notes=["A ratio above 1 means that the network is faster."],
    )


def _cases(quick: bool) -> list[tuple[str, Regularity | None]]:
    if quick:
        return [("mnist-5k", PUBLISHED)]
    tables: list[tuple[str, Regularity | None]] = [("pbmc68k", PUBLISHED)] if "OTAD_DATA" in os.environ else []
    return [("mnist-5k", PUBLISHED), *tables, ("mnist-5k", None)]


@cache
def _trained(name: str, quick: bool) -> tuple[Dataset, OTADClassifier]:
    if name == "mnist-5k":
        data = load(name, n_train=500 if quick else 4000, n_test=BATCH, seed=SEED)
    else:
        data = load(name, data_dir=os.environ["OTAD_DATA"], seed=SEED)
    clf = OTADClassifier("neighborhood", smoothness=2.0, random_state=SEED, device="cpu", epochs=2 if quick else None)
    return data, clf.fit(data.x_train, data.y_train)


def _imitation(
    solver: NeighborhoodInterpolation, head: torch.nn.Linear, quick: bool
) -> tuple[NetworkInterpolation, dict[str, Any], list[CIPEpoch]]:
    n, epochs = (1000, 2) if quick else (PROBLEMS, EPOCHS)
    return imitate(solver, head, n_problems=n, epochs=epochs, seed=SEED, device="cpu")


def _speed(
    solver: NeighborhoodInterpolation, network: NetworkInterpolation, x: Tensor
) -> list[tuple[str, float, float, float]]:
    """Microseconds a query of both, and their ratio."""
    x_i, z_i, _ = solver.neighbors(x)

    def solve(query: Tensor) -> Tensor:
        return solver.solve(query, x_i, z_i).value

    def guess(query: Tensor) -> Tensor:
        weights = guessed_weights(network.net, inner_products(query, x_i, z_i), network.smoothness)
        return (weights[:, None] @ z_i).squeeze(1)

    def gradient(answer: Any) -> Any:
        query = x.clone().requires_grad_()
        return torch.autograd.grad(answer(query).sum(), query)

    rows = []
    for what, exact, ours in (
        ("all", lambda: solver(x), lambda: network(x)),
        ("given the neighbours", lambda: solve(x), lambda: guess(x)),
    ):
        with torch.no_grad():
            rows.append((what, median_seconds(exact, REPEATS), median_seconds(ours, REPEATS)))
    rows.append(
        ("gradient", median_seconds(lambda: gradient(solve), REPEATS), median_seconds(lambda: gradient(guess), REPEATS))
    )
    return [(what, 1e6 * a / len(x), 1e6 * b / len(x), a / b) for what, a, b in rows]
