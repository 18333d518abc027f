"""Cells trained from samples: on the inputs as they are, in their principal components, on an encoder, or on both."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram
from otad.nn import CenteredFlatten, EncodedStem, dense_encoders, patch_encoders
from otad.train import DiagramRefinement, LearnedDiagram, refine_diagram

__all__ = ["encoded", "principal_basis", "spread", "train_cells"]


def train_cells(
    stem: nn.Module,
    inputs: Float[Tensor, "n ..."],
    labels: Int[Tensor, " n"],
    samples: Int[Tensor, " points"],
    *,
    most: int,
    seed: int,
    encoder: str | None = None,
    components: int | None = None,
    **options: Any,
) -> tuple[nn.Module, DiagramRefinement, Int[Tensor, " pieces"]]:
    """A power diagram whose pieces start at some of the samples.

    Principal components are taken before training and are part of what comes back: their basis is orthonormal, so
    pieces of them are pieces of all columns, at the same distances, and nothing is left of it to carry along.

    Args:
        stem: inputs to points; an isometry without parameters.
        inputs: training samples.
        labels: their class indices.
        samples: indices of those that pieces may start at.
        most: pieces, with the same share of every class, at least one.
        seed: of pieces and encoder, and of `refine_diagram`.
        encoder: orthogonal layers below the pieces, trained along: "dense", or "patches" (images). Of the samples only
            the classes count then.
        components: of the samples less their mean, principal ones; all columns where there are no more; None: all.
        options: of `refine_diagram`.

    Returns:
        inputs to the points that the diagram is about, the training's result, and which of `samples` the pieces are.

    Raises:
        ValueError: principal components of images; see also `refine_diagram`.
    """
    if components is not None and inputs.ndim != 2:
        raise ValueError(f"principal components belong to tables; the samples have shape {tuple(inputs.shape[1:])}")
    seen, basis = stem, None
    if components is not None and components < inputs.shape[1]:
        with torch.no_grad():
            points = stem(inputs)
        basis = principal_basis(points, components)
        inputs, seen = points @ basis, CenteredFlatten(torch.zeros(basis.shape[1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if encoder is not None and basis is not None:
            seen = EncodedStem(seen, *dense_encoders(len(basis), components=basis.shape[1]))
        elif encoder is not None:
            seen = encoded(stem, encoder, inputs.shape[1:])
        pieces = spread(labels[samples], most)
        start = _started(seen, inputs[samples[pieces]], labels[samples[pieces]])
    found = refine_diagram(start, seen, inputs, labels, seed=seed, **options)
    if basis is None:
        return seen, found, pieces
    if isinstance(seen, EncodedStem):
        seen.encoders[0].lift(basis)  # type: ignore[operator]
        return EncodedStem(stem, *seen.encoders), found, pieces
    low = found.diagram
    lifted = PowerDiagram(low.slopes @ basis.double().T, low.intercepts, low.classes)
    return stem, dataclasses.replace(found, diagram=lifted), pieces


def encoded(stem: nn.Module, encoder: str, shape: Sequence[int]) -> EncodedStem:
    """A stem of inputs of this shape, and on it the encoder "dense" or "patches" (images), not trained."""
    if encoder == "patches":
        c, height, width = shape
        return EncodedStem(stem, *patch_encoders((c, height, width)))
    return EncodedStem(stem, *dense_encoders(math.prod(shape)))


@torch.no_grad()
def principal_basis(points: Float[Tensor, "n d"], components: int) -> Float[Tensor, "d components"]:
    """Orthonormal directions in which the points vary most; fewer where there are fewer points or columns."""
    exact = (points - points.mean(0)).double()
    if exact.shape[0] < exact.shape[1]:
        directions = torch.linalg.svd(exact, full_matrices=False).Vh.T
    else:
        directions = torch.linalg.eigh(exact.T @ exact).eigenvectors.flip(1)
    return directions[:, :components].to(points)


def spread(y: Int[Tensor, " n"], most: int) -> Int[Tensor, " pieces"]:
    """Indices of at most so many points, in random order, with the same share of every class, at least one."""
    share = min(1.0, most / len(y))
    chosen = []
    for c in range(int(y.amax()) + 1):
        own = (y == c).nonzero().squeeze(1)
        chosen.append(own[torch.randperm(len(own))[: max(1, round(share * len(own)))]])
    return torch.cat(chosen)


@torch.no_grad()
def _started(stem: nn.Module, inputs: Float[Tensor, "n ..."], classes: Int[Tensor, " n"]) -> LearnedDiagram:
    """Pieces at these samples; on an encoder, which is still to be trained, random ones of their classes."""
    points = stem(inputs)
    if isinstance(stem, EncodedStem):
        return LearnedDiagram.on_encoder(points.shape[1], classes)
    return LearnedDiagram(points, classes)
