"""Rivals: classifiers to compare with, on the same data and under the same attacks."""

from collections.abc import Callable

from torch import nn

from otad.baselines.adversarial import fit_pgd, fit_trades, fit_undefended
from otad.baselines.lipschitz import LipschitzNetwork, fit_lipschitz
from otad.baselines.nearest import NearestNeighbor, fit_nearest
from otad.baselines.smoothing import SmoothedClassifier, fit_smoothing

__all__ = [
    "BASELINES",
    "LipschitzNetwork",
    "NearestNeighbor",
    "SmoothedClassifier",
    "fit_lipschitz",
    "fit_nearest",
    "fit_pgd",
    "fit_smoothing",
    "fit_trades",
    "fit_undefended",
]

# Name -> fit(x, y, threat, *, minutes, seed=0, progress=False): a module, inputs -> logits, in evaluation mode, with
# the facts of its training as `fitted` and, where it has a certificate, a method `certify(x)`.
BASELINES: dict[str, Callable[..., nn.Module]] = {
    "undefended": fit_undefended,
    "1-nn": fit_nearest,
    "pgd": fit_pgd,
    "trades": fit_trades,
    "lipschitz": fit_lipschitz,
    "smoothing": fit_smoothing,
}
