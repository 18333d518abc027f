"""The splits of a comparison: samples, radii, and a network that attacks transfer from."""

import functools
import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from otad.data import Dataset, load
from otad.nn import residual_mlp
from otad.runs.radii import radii_for
from otad.runs.selection import class_indices
from otad.train.backbone import fit_backbone

__all__ = ["Samples", "Splits", "source_epochs"]

logger = logging.getLogger("otad.runs")

# Of the undefended network that attacks transfer from.
SOURCE_EPOCHS = 6
SOURCE_STEPS = 300
SOURCE_BATCH = 128


@dataclass(frozen=True)
class Samples:
    """One split as tensors, labels as class indices, and what an attacker knows of it."""

    data: Dataset
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    digest: str


class Splits:
    """The splits of a comparison, read when first needed; the last one is kept for the next method."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.samples = functools.lru_cache(maxsize=1)(self._samples)
        self.network = functools.lru_cache(maxsize=1)(self._network)
        self.radii = functools.cache(self._radii)

    def _samples(self, source: str, seed: int) -> Samples:
        data = load(source, seed=seed, **self.options)
        classes = np.unique(data.y_train)
        y_train, y_test = (class_indices(classes, labels, data.name) for labels in (data.y_train, data.y_test))
        digest = hashlib.sha256()
        for part in (data.x_train, data.x_test, y_train, y_test):
            digest.update(np.ascontiguousarray(part).tobytes())
        return Samples(
            data=data,
            x_train=torch.as_tensor(data.x_train),
            y_train=torch.as_tensor(y_train),
            x_test=torch.as_tensor(data.x_test),
            y_test=torch.as_tensor(y_test),
            digest=digest.hexdigest(),
        )

    def _radii(self, source: str) -> list[float]:
        """Of seed 0, so that more seeds later on do not change them."""
        return radii_for(self.samples(source, 0).data)

    def _network(self, source: str, seed: int) -> nn.Module:
        """Undefended: attacks on methods without a network of their own transfer from it."""
        logger.info("train an undefended network that attacks transfer from")
        samples = self.samples(source, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = residual_mlp(samples.x_train.mean(0), int(samples.y_train.max()) + 1)
        fit_backbone(
            network,
            samples.x_train,
            samples.y_train,
            alpha=0.0,
            epochs=source_epochs(len(samples.x_train)),
            batch_size=SOURCE_BATCH,
            seed=seed,
        )
        return network


def source_epochs(n: int) -> int:
    """Of the network that attacks transfer from, on n samples: about 300 steps, and at least six epochs."""
    return max(SOURCE_EPOCHS, SOURCE_STEPS // math.ceil(n / SOURCE_BATCH))
