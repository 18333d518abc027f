"""The loop that trains everything: AdamW or its like under a schedule, resumable, on whatever accelerate finds."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from otad.train.state import TrainingState

__all__ = ["Augment", "EpochRow", "digest", "train"]

logger = logging.getLogger(__name__)

Augment = Callable[[Tensor, torch.Generator], Tensor]

WARM_UP = 0.05  # share of the training


@dataclass(frozen=True)
class EpochRow:
    """One epoch in a history, and as text what the progress bar shows.

    Attributes:
        epoch: from 1.
        loss: mean over the samples.
        seconds: wall time since training began.
    """

    epoch: int
    loss: float
    seconds: float

    @classmethod
    def of(cls, epoch: int, seconds: float, means: list[float]) -> Self:
        """From what the objective returned, as means over the samples: the loss, then what followed it."""
        return cls(epoch, means[0], seconds)

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}"


Row = TypeVar("Row", bound=EpochRow)


def train(
    name: str,
    model: nn.Module,
    objective: nn.Module,
    data: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    row: type[Row],
    *,
    settings: dict[str, Any],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path | None,
    resume: bool,
    device: str | None,
    mixed_precision: str,
    progress: bool,
    first_rate: float = 1e-3,
    drop_last: bool = False,
    augment: Augment | None = None,
    after_step: Callable[[], None] | None = None,
) -> list[Row]:
    """Minimise an objective in place, by a linear warm-up and then half a cosine to rate zero.

    Args:
        name: of the checkpoint and the bar.
        model: what is learned, part of the objective; left on the device of the training.
        objective: a batch of every tensor of `data` -> (loss, further means over the batch ..), numbers or vectors.
        data: tensors of one length.
        optimizer: of the model; a group's "share" multiplies its rate.
        row: of the history.
        settings: beside those below, what must be the same for a checkpoint to be gone on from.
        epochs: passes over the data.
        batch_size: samples a step, per process.
        learning_rate: the largest of the schedule.
        seed: of the batch order and of what `augment` draws, both of seed and epoch alone.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16".
        progress: show a bar.
        first_rate: of the first step, as a share of the largest.
        drop_last: leave out the last batch of an epoch where it is not full.
        augment: the first tensor of a batch and a generator on the CPU -> another of its shape.
        after_step: called after every step.

    Returns:
        one row per epoch, those before a resumed checkpoint included.

    Raises:
        ModelFolderError: the checkpoint is damaged, or of another run.
        KeyboardInterrupt: after Ctrl-C; the checkpoint of the last finished epoch stays.
    """
    settings = settings | {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    settings |= {"data": digest(*data), "network": repr(model)}
    settings["shapes"] = [list(value.shape) for value in model.state_dict().values()]
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    order = _Shuffled(len(data[0]), seed)
    loader = DataLoader(_Batches(*data), batch_size, sampler=order, collate_fn=_whole, drop_last=drop_last)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    state = TrainingState(checkpoint, name, settings)
    history = [row(**kept) for kept in state.load(model, optimizer)] if resume else []
    started = time.perf_counter() - (history[-1].seconds if history else 0.0)
    show = progress and accelerator.is_local_main_process
    with tqdm(total=epochs, initial=len(history), desc=name, unit="epoch", disable=not show) as bar:
        for epoch in range(len(history), epochs):
            order.epoch = epoch
            objective.train()
            sums = torch.zeros(())
            for step, batch in enumerate(loader):
                _set_rate(optimizer, learning_rate, first_rate, (epoch * len(loader) + step) / (epochs * len(loader)))
                if augment is not None:
                    batch = (augment(batch[0], order.draws), *batch[1:])
                loss, *facts = objective(*batch)
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                optimizer.step()
                if after_step is not None:
                    after_step()
                means = torch.hstack([torch.ones_like(loss), loss.detach(), *facts])
                sums = sums.to(means.device) + len(batch[0]) * means.float()
            history.append(row.of(epoch + 1, time.perf_counter() - started, _means(accelerator, sums)))
            bar.set_postfix_str(str(history[-1]))
            bar.update()
            logger.debug("%r", history[-1])
            if accelerator.is_main_process:
                state.save(model, optimizer, [asdict(kept) for kept in history])
    optimizer.zero_grad(set_to_none=True)
    for buffer in model.buffers():  # batch statistics of the last step are each process's own
        buffer.copy_(broadcast(buffer))  # type: ignore[arg-type]
    return history


def digest(*parts: Tensor) -> str:
    """Of data or weights, so that a checkpoint is gone on from with its own only."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


class _Batches(Dataset):
    """Whole batches at once: one index operation instead of one per sample."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        chosen = torch.as_tensor(indices)
        return [tuple(tensor[chosen] for tensor in self.tensors)]


def _whole(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The one item that `_Batches` returns."""
    return items[0]


class _Shuffled(Sampler[int]):
    """An order that depends on seed and epoch alone, so that a resumed run sees the batches it would have seen.

    Attributes:
        draws: the generator of the present epoch, past its order.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0
        self.draws = torch.Generator()

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        self.draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.n, generator=self.draws).tolist())


def _set_rate(optimizer: Any, learning_rate: float, first: float, progress: float) -> None:
    warm = min(1.0, progress / WARM_UP + first)
    rate = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = group.get("share", 1.0) * rate


def _means(accelerator: Accelerator, sums: Tensor) -> list[float]:
    """Sums of all processes, divided by the first of them: the number of samples."""
    total = accelerator.reduce(sums, "sum")
    return (total / total[0]).tolist()[1:]  # type: ignore[index]
