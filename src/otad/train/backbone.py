"""Fit a backbone under the transport cost: one loop for every network, on whatever devices accelerate finds."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from otad.nn.backbone import Backbone
from otad.train.state import TrainingState
from otad.train.steps import Batches, Shuffled, digest, mean_over_processes, set_rate, whole_batch

__all__ = ["Epoch", "fit_backbone"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """What the progress bar shows and the report plots.

    Attributes:
        epoch: from 1.
        loss: mean training loss, cross entropy plus alpha times the transport cost.
        transport_cost: mean over the training samples, in squared stem units.
        accuracy: share of training samples classified correctly while training.
        seconds: wall time since training began.
        block_costs: each block's part of the transport cost, first block first.
    """

    epoch: int
    loss: float
    transport_cost: float
    accuracy: float
    seconds: float
    block_costs: list[float] = field(default_factory=list)


def fit_backbone(
    backbone: Backbone,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    alpha: float = 1e-3,
    margin: float = 0.0,
    epochs: int = 30,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> list[Epoch]:
    """Minimise cross entropy + alpha * transport cost by AdamW with a cosine schedule, in place.

    Args:
        backbone: trained in place and left in eval mode on the CPU.
        x: training inputs.
        y: class indices.
        alpha: weight of the transport cost; 0 trains an ordinary network.
        margin: weight of a margin in feature units: adds margin * Q * |w_j - w_y| to the wrong logits, Q the largest
            |z_i - z_j| / |x_i - x_j| in the batch, so that the loss counts what the Lipschitz bound will cost.
        epochs: passes over the data.
        batch_size: samples a step, per process.
        learning_rate: the largest of the schedule.
        weight_decay: of AdamW.
        seed: of the batch order; the caller seeds the weights.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16".
        progress: show a bar with loss, transport cost and accuracy.

    Returns:
        One `Epoch` per epoch, those before a resumed checkpoint included.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the checkpoint of the last finished epoch stays.

    Source: Gai, Wang, Zhang, arXiv 2408.00329, Section 3; METHOD sections 1 and 3.
    """
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    order = Shuffled(len(x), seed)
    loader = DataLoader(Batches(x, y), batch_size=batch_size, sampler=order, collate_fn=whole_batch)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=learning_rate, weight_decay=weight_decay)
    objective, optimizer, loader = accelerator.prepare(_Objective(backbone, alpha, margin), optimizer, loader)
    settings = {"alpha": alpha, "margin": margin, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    settings |= {"learning_rate": learning_rate, "weight_decay": weight_decay, "data": digest(x, y)}
    settings["shapes"] = [list(value.shape) for value in backbone.state_dict().values()]
    state = TrainingState(checkpoint, "backbone", settings)
    history = [Epoch(**row) for row in state.load(backbone, optimizer)] if resume else []
    started = time.perf_counter() - (history[-1].seconds if history else 0.0)
    show = progress and accelerator.is_local_main_process
    objective.train()
    with tqdm(total=epochs, initial=len(history), desc="training", unit="epoch", disable=not show) as bar:
        for epoch in range(len(history), epochs):
            order.epoch = epoch
            sums = torch.zeros(3 + len(backbone.blocks), device=accelerator.device)
            for step, (inputs, labels) in enumerate(loader):
                set_rate(optimizer, learning_rate, (epoch * len(loader) + step) / (epochs * len(loader)))
                loss, accuracy, costs = objective(inputs, labels)
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                optimizer.step()
                facts = torch.stack([torch.ones_like(accuracy), loss.detach(), accuracy])
                sums += len(labels) * torch.cat([facts, costs]).float()
            _, loss, accuracy, *costs = mean_over_processes(accelerator, sums).tolist()
            history.append(Epoch(epoch + 1, loss, sum(costs), accuracy, time.perf_counter() - started, costs))
            bar.set_postfix(loss=f"{loss:.3f}", transport=f"{sum(costs):.2f}", accuracy=f"{accuracy:.1%}")
            bar.update()
            logger.debug("%s", history[-1])
            if accelerator.is_main_process:
                state.save(backbone, optimizer, [asdict(row) for row in history])
    optimizer.zero_grad(set_to_none=True)
    for buffer in backbone.buffers():  # batch statistics of the last step are each process's own
        buffer.copy_(broadcast(buffer))  # type: ignore[arg-type]
    backbone.to("cpu").eval().requires_grad_(False)
    return history


class _Objective(nn.Module):
    """Loss, accuracy and cost of each block for a batch; a module of its own so that any engine can wrap it."""

    def __init__(self, backbone: Backbone, alpha: float, margin: float) -> None:
        super().__init__()
        self.backbone, self.alpha, self.margin = backbone, alpha, margin

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = self.backbone.stem(inputs)
        z, costs = self.backbone.path(points)
        logits = self.backbone.head(z)
        accuracy = (logits.argmax(1) == labels).float().mean()
        if self.margin:
            logits = logits + self.margin * _quotient(points, z) * _row_distances(self.backbone.head.weight, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.alpha:
            loss = loss + self.alpha * costs.sum(1).mean()
        return loss, accuracy, costs.detach().mean(0)


def _quotient(points: Float[Tensor, "batch d"], z: Float[Tensor, "batch d"]) -> Tensor:
    """Largest |z_i - z_j| / |x_i - x_j| of the batch."""
    apart = torch.pdist(points)
    return torch.where(apart > 0, torch.pdist(z) / apart.clamp(min=1e-12), 0).amax() if len(z) > 1 else z.new_ones(())


def _row_distances(rows: Float[Tensor, "classes d"], labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
    """|w_j - w_y|, 0 for j = y."""
    squared = (rows[None] - rows[labels][:, None]).square().sum(2)
    others = torch.ones_like(squared, dtype=torch.bool).scatter(1, labels[:, None], False)
    return torch.where(others, squared.clamp(min=1e-12).sqrt(), 0)
