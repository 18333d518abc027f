"""What training loops share: batches in a reproducible order, the schedule, sums over processes."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, Sampler

__all__ = ["Batches", "Shuffled", "digest", "mean_over_processes", "set_rate", "whole_batch"]


def digest(x: Tensor, y: Tensor) -> str:
    """Of the training data, so that a checkpoint is gone on from with its own data only."""
    hashed = hashlib.sha256()
    for part in (x, y):
        hashed.update(part.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def mean_over_processes(accelerator: Accelerator, sums: Tensor) -> Tensor:
    """Sums of all processes, divided by the first of them: the number of samples."""
    total = accelerator.reduce(sums, "sum")
    return total / total[0]  # type: ignore[index]


class Batches(Dataset):
    """Whole batches at once: one index operation instead of one per sample."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        chosen = torch.as_tensor(indices)
        return [(self.x[chosen], self.y[chosen])]


def whole_batch(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The one item that `Batches` returns."""
    return items[0]


class Shuffled(Sampler[int]):
    """An order that depends on seed and epoch alone, so that a resumed run sees the batches it would have seen."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.n, generator=generator).tolist())


def set_rate(optimizer: Any, learning_rate: float, progress: float) -> None:
    """Linear warm-up over the first twentieth, then a half cosine to zero."""
    warm = min(1.0, progress / 0.05 + 1e-3)
    rate = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = rate
