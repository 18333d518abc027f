"""The training loop that all rivals share: AdamW, a schedule that ends in time, the same data order by seed."""

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from otad.attacks.threat_model import ThreatModel
from otad.errors import OTADError
from otad.nn import Backbone, build_backbone

__all__ = ["Loss", "TrainedNetwork", "accuracy", "backbone_for", "euclidean_budget", "train", "usual_epochs"]

Loss = Callable[[Tensor, Tensor, torch.Generator], Tensor]

HEAD_START = 0.1  # share of the time limit that may pass before the clock counts
SAMPLES_AT_ONCE = 1024


class TrainedNetwork(nn.Module):
    """A trained network, inputs -> logits.

    Attributes:
        network: what was trained.
        fitted: "epochs", "seconds" and "train_accuracy" of its training.
    """

    def __init__(self, network: nn.Module, fitted: dict[str, float]) -> None:
        super().__init__()
        self.network, self.fitted = network, fitted
        self.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        return self.network(x)


def backbone_for(x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], name: str, seed: int) -> Backbone:
    """The network of this name that `OTADClassifier` trains, in its default size; seeded, on the device of x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(name, x.mean(0).cpu(), int(y.max()) + 1).to(x.device)


def euclidean_budget(threat: ThreatModel, d: int) -> float:
    """The L2 radius to prepare for: eps under L2; under L-infinity half of eps sqrt(d), the radius around its cube.

    Noise or a margin as large as that radius itself would drown the samples.
    """
    return threat.eps if threat.norm == "l2" else threat.eps * math.sqrt(d) / 2


def train(
    module: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    loss: Loss,
    *,
    epochs: int | None,
    minutes: float,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    progress: bool = False,
) -> dict[str, float]:
    """Minimise a loss by AdamW in place; the module is left in evaluation mode.

    The rate warms up over a twentieth of the training and then falls to zero on a half cosine. What counts as done is
    the share of the steps or of the time, whichever is larger, so that training always ends annealed. The first tenth
    of the time is free: whoever would finish in time follows the steps alone, and so depends on the seed alone.

    Args:
        module: inputs -> logits.
        x: training samples.
        y: their classes.
        loss: inputs, labels and a generator for its random numbers -> mean loss of a batch.
        epochs: passes over the data, if the time allows; None takes `usual_epochs`.
        minutes: upper limit of the wall time.
        seed: of the batch order and the loss's random numbers.
        batch_size: samples a step.
        learning_rate: the largest of the schedule.
        progress: show a bar.

    Returns:
        "epochs" (not whole where time ran out), "seconds", "train_accuracy" (of the trained module).

    Raises:
        ValueError: no samples, x and y that differ in length, epochs or minutes not positive.
        OTADError: training diverged.
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y need the same number of rows, at least one; they have {len(x)} and {len(y)}")
    per_epoch = math.ceil(len(x) / batch_size)
    if epochs is None:
        epochs = usual_epochs(len(x), batch_size)
    if not (epochs >= 1 and minutes > 0):
        raise ValueError(f"epochs must be at least 1 and minutes positive; got {epochs} and {minutes}")
    started = time.perf_counter()
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device=x.device).manual_seed(seed)
    learned = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
    steps = epochs * per_epoch
    batches = iter(())
    done = 0
    module.train()
    with tqdm(total=steps, desc="training", unit="step", disable=not progress) as bar:
        while (share := _share(done / steps, (time.perf_counter() - started) / (60 * minutes))) < 1:
            rows = next(batches, None)
            if rows is None:
                batches = iter(torch.randperm(len(x), generator=order).to(x.device).split(batch_size))
                rows = next(batches)
            warm = min(1.0, share / 0.05 + 1e-2)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * share))
            value = loss(x[rows], y[rows], draws)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            done += 1
            bar.update()
    optimizer.zero_grad(set_to_none=True)
    module.eval()
    if not all(bool(p.isfinite().all()) for p in learned):
        raise OTADError("training diverged: weights are not finite; scale the columns of x, or lower the rate")
    seconds = time.perf_counter() - started
    return {"epochs": done * epochs / steps, "seconds": seconds, "train_accuracy": accuracy(module, x, y)}


def usual_epochs(n: int, batch_size: int = 128) -> int:
    """Of training on n samples: 12, or more where that is under 500 steps, as `OTADClassifier` takes."""
    return max(12, math.ceil(500 / math.ceil(n / batch_size)))


def accuracy(module: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> float:
    """Share of samples classified as y."""
    with torch.no_grad():
        right = [
            module(part).argmax(dim=1) == labels
            for part, labels in zip(x.split(SAMPLES_AT_ONCE), y.split(SAMPLES_AT_ONCE))
        ]
    return float(torch.cat(right).double().mean())


def _share(steps: float, elapsed: float) -> float:
    return min(1.0, max(steps, (elapsed - HEAD_START) / (1 - HEAD_START)))
