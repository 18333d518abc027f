"""Does the transport cost make a network's map an optimal transport, and what does that cost in accuracy?

Every backbone on 10,000 MNIST digits, the residual MLP also on the cells of pbmc68k and pancreas (where the data folder
has them): the same network with the same start, trained without transport cost and with the defaults of
`OTADClassifier`.

    python benchmarks/run.py transport_map
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from harness import Benchmark, Table

from otad import OTADClassifier
from otad.data import Dataset, load
from otad.nn import BACKBONES

__all__ = ["run"]

SEED, TEST_DIGITS = 0, 2000
SMALL_SEEDS = 3  # of pbmc68k, whose test part is 140 cells
LONG = 100  # epochs
WITHOUT: dict[str, Any] = {"alpha": 0.0, "margin": 0.0}
COLUMNS = (
    "data",
    "seed",
    "backbone",
    "training samples",
    "test samples",
    "epochs",
    "clean without, %",
    "clean with, %",
    "smallest L without, median",
    "smallest L with, median",
    "ratio",
    "monotone without, %",
    "monotone with, %",
    "seconds without",
    "seconds with",
)
TIMED = {
    "seconds": "training of the backbone, fit_backbone; with and without after each other in one process",
    "smallest L": "of 1,000 neighbourhoods of training points, K = 10, l = 0; monotone: the share that has one",
}


def run(quick: bool = False) -> Benchmark:
    return Benchmark(
        name="transport_map",
        question="What the transport cost does to the map and to the accuracy of the same network.",
        timed=TIMED,
        tables=[Table("Without and with the transport cost", COLUMNS, list(_rows(quick)))],
        seed=SEED,
    )


def _rows(quick: bool) -> Iterator[tuple[object, ...]]:
    for source, backbone, seed, *epochs in _cases(quick):
        row = _row(source, backbone, seed, *epochs)
        print("  ".join(f"{column} {value}" for column, value in zip(COLUMNS, row, strict=True)), flush=True)
        yield row


def _cases(quick: bool) -> list[tuple[Any, ...]]:
    """Data, backbone, seed, and epochs where they are not the usual ones."""
    if quick or not os.environ.get("OTAD_DATA"):
        digits = load("mnist-5k", n_train=1000 if quick else 4000, n_test=TEST_DIGITS // 2, seed=SEED)
        return [(digits, backbone, SEED) for backbone in BACKBONES]
    digits = load("mnist", n_train=10_000, n_test=TEST_DIGITS, seed=SEED)
    cells = [(load("pbmc68k", seed=seed), "mlp", seed) for seed in range(SMALL_SEEDS)]
    pancreas = load("pancreas", seed=SEED)  # of which the usual epochs are few
    several = [(pancreas, "mlp", SEED), (pancreas, "mlp", SEED, LONG)]
    return [(digits, backbone, SEED) for backbone in BACKBONES] + cells + several


def _row(data: Dataset, backbone: str, seed: int, epochs: int | None = None) -> tuple[object, ...]:
    settings = {"epochs": epochs}
    without, with_ = (_trained(data, backbone, seed, settings | alpha) for alpha in (WITHOUT, {}))
    clean, median, monotone, seconds = zip(_facts(without, data), _facts(with_, data), strict=True)
    sizes = (len(data.x_train), len(data.x_test), len(with_.history_))
    return (data.name, seed, backbone, *sizes, *clean, *median, median[0] / median[1], *monotone, *seconds)


def _trained(data: Dataset, backbone: str, seed: int, settings: dict[str, Any]) -> OTADClassifier:
    # Neighbourhoods are solved when asked for, so that a torn map costs no more than its training.
    clf = OTADClassifier(interpolation="neighborhood", backbone=backbone, random_state=seed, **settings)
    return clf.fit(data.x_train, data.y_train)


def _facts(clf: OTADClassifier, data: Dataset) -> tuple[float, float, float, float]:
    x = torch.as_tensor(data.x_test)
    with torch.no_grad():
        chosen = torch.cat([clf.backbone_(part).argmax(1) for part in x.split(250)]).numpy()
    clean = 100 * float((clf.classes_[chosen] == data.y_test).mean())
    health = clf.health_
    return clean, health["median"], 100 * health["feasible"], clf.seconds_["train"]


if __name__ == "__main__":
    print(run())
