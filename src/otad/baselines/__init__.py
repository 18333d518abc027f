"""Rivals: classifiers to compare with, on the same data and under the same attacks."""

from collections.abc import Callable

from torch import nn

from otad.baselines.nearest import NearestNeighbor

__all__ = ["BASELINES", "NearestNeighbor"]

# name -> fit(x, y, threat, *, minutes, seed, progress), which returns a module, inputs -> logits.
BASELINES: dict[str, Callable[..., nn.Module]] = {}
