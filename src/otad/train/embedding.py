"""Fit the metric that chooses neighbours: near means of the same class."""

import math
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchEasyHardMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from otad.nn.embedding import OrthogonalEmbedding
from otad.train.loop import EpochRow, train

__all__ = ["EmbeddingEpoch", "TripletLoss", "fit_embedding"]

LEAST_STEPS = 300
SAMPLES_FOR_GAP = 256


class EmbeddingEpoch(EpochRow):
    """Its loss is the mean triplet loss over the samples."""


class TripletLoss(nn.Module):
    """Mean of max(0, margin + |e_a - e_p| - |e_a - e_n|) over triplets of a batch; 0 where there is none.

    A triplet has an anchor a, a sample p of its class and a sample n of another.

    Args:
        margin: in units of the coordinates.
        mining: "semihard" takes all triplets in which n is farther than p, by no more than the margin (published).
            "nearest" takes for each anchor the nearest p and the nearest n: what decides who its neighbours are.

    Source: Schroff, Kalenichenko, Philbin, CVPR 2015, arXiv 1503.03832; "nearest": Xuan, Stylianou, Pless, WACV 2020,
    arXiv 1904.04370. Both from the package pytorch-metric-learning.
    """

    def __init__(self, margin: float, mining: Literal["semihard", "nearest"] = "semihard") -> None:
        super().__init__()
        distance = LpDistance(normalize_embeddings=False)  # a network that wants norm 1 sees to it itself
        self.loss = TripletMarginLoss(margin=margin, distance=distance, reducer=MeanReducer())
        if mining == "semihard":
            self.miner = TripletMarginMiner(margin=margin, type_of_triplets="semihard", distance=distance)
        else:
            self.miner = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard", distance=distance)

    def forward(self, e: Float[Tensor, "batch e"], y: Int[Tensor, " batch"]) -> Tensor:
        return self.loss(e, y, self.miner(e, y))


def fit_embedding(
    embedding: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    margin: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = False,
) -> list[EmbeddingEpoch]:
    """Minimise the triplet loss by Adam with a cosine schedule, in place.

    An `OrthogonalEmbedding` learns from nearest triplets, and its weights are made orthogonal again after every step;
    any other embedding learns from semi-hard ones. What is None depends on which of the two it is.

    Args:
        embedding: inputs -> coordinates; trained in place and left frozen, in eval mode, on the CPU.
        x: training inputs.
        y: class indices.
        margin: of `TripletLoss`. None: 0.2, the published one, for coordinates of norm 1; for an `OrthogonalEmbedding`
            0.4 times the median distance from a sample to the nearest one of another class.
        epochs: passes over the data; None: 10 (orthogonal: 20), or more where that is under 300 steps.
        batch_size: samples a step, per process; triplets are formed within a batch. None: 128 (256).
        learning_rate: the largest of the schedule; None: 3e-3 (5e-3).
        seed: of the batch order; the caller seeds the weights.
        checkpoint: folder for the last epoch's state, written after every epoch.
        resume: go on from the checkpoint where there is one.
        device: "cpu", "cuda", ..; None leaves it to accelerate.
        mixed_precision: "no", "bf16" or "fp16".
        progress: show a bar with the loss.

    Returns:
        one row per epoch, those before a resumed checkpoint included.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the checkpoint of the last finished epoch stays.
    """
    orthogonal = isinstance(embedding, OrthogonalEmbedding)
    if margin is None:
        margin = 0.4 * _gap_between_classes(x, y) if orthogonal else 0.2
    batch_size = batch_size or (256 if orthogonal else 128)
    learning_rate = learning_rate or (5e-3 if orthogonal else 3e-3)
    epochs = epochs or max(20 if orthogonal else 10, math.ceil(LEAST_STEPS / math.ceil(len(x) / batch_size)))
    embedding.requires_grad_(True)
    history = train(
        "embedding",
        embedding,
        _Objective(embedding, TripletLoss(margin, "nearest" if orthogonal else "semihard")),
        (x, y),
        torch.optim.Adam(embedding.parameters(), lr=learning_rate),
        EmbeddingEpoch,
        settings={"margin": margin},
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint=checkpoint,
        resume=resume,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
        drop_last=len(x) % batch_size == 1 < len(x),  # one sample alone has neither triplets nor batch statistics
        after_step=embedding.orthogonalise if orthogonal else None,
    )
    embedding.to("cpu").eval().requires_grad_(False)
    return history


class _Objective(nn.Module):
    """The loss of a batch, in full precision; a module of its own so that any engine can wrap it."""

    def __init__(self, embedding: nn.Module, loss: TripletLoss) -> None:
        super().__init__()
        self.embedding, self.loss = embedding, loss

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor]:
        coordinates = self.embedding(inputs).float()
        with torch.autocast(coordinates.device.type, enabled=False):
            return (self.loss(coordinates, labels),)


def _gap_between_classes(x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> float:
    """Median distance from a sample to the nearest one of another class."""
    points = x.flatten(1).double()
    some = torch.linspace(0, len(x) - 1, min(SAMPLES_FOR_GAP, len(x))).long()
    apart = torch.cdist(points[some], points).masked_fill(y[some][:, None] == y[None], torch.inf).amin(1)
    return float(apart.median())
