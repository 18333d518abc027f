"""Cells trained from samples: on the inputs as they are, in their principal components, on an encoder, or on both."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import PowerDiagram
from otad.nn import CenteredFlatten, EncodedStem, dense_encoders, patch_encoders
from otad.train import USUAL_POSES, DiagramRefinement, LearnedDiagram, Poses, refine_diagram

__all__ = ["encoded", "principal_basis", "spread", "train_cells"]

NO_VARIANCE = 1e-6  # standard deviation of a direction that counts as none, as a share of the largest


def train_cells(
    stem: nn.Module,
    inputs: Float[Tensor, "n ..."],
    labels: Int[Tensor, " n"],
    samples: Int[Tensor, " points"],
    classes: Int[Tensor, " points"],
    *,
    most: int,
    seed: int,
    encoder: str | None = None,
    components: int | None = None,
    poses: int = 1,
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
        classes: of such pieces, which is not the label where a point stands for several samples.
        most: pieces, with the same share of every class, at least one.
        seed: of pieces and encoder, and of `refine_diagram`.
        encoder: orthogonal layers below the pieces, trained along: "dense", or "patches" (images). Of the samples only
            the classes count then.
        components: of the samples less their mean, principal ones, at most those that the samples vary in; where there
            are no more columns, or for None, all columns.
        poses: of every piece (images, no encoder), the first of `USUAL_POSES`: so many times `most`; 1 leaves them out.
        options: of `refine_diagram`.

    Returns:
        inputs to the points that the diagram is about, the training's result, and which of `samples` the pieces are.

    Raises:
        ValueError: what does not go with components or poses, or no samples; see also `LearnedDiagram` and
            `refine_diagram`.
    """
    if components is not None:
        _check_components(components, inputs, encoder, options)
    if not 1 <= poses <= len(USUAL_POSES):
        raise ValueError(f"poses must be from 1 to {len(USUAL_POSES)}; got {poses}")
    if len(classes) == 0:
        raise ValueError("there are no samples for pieces to start at")
    if poses > 1 and (encoder is not None or inputs.ndim != 4 or not isinstance(stem, CenteredFlatten)):
        raise ValueError("poses are of images on a CenteredFlatten, without an encoder; leave them out")
    seen, basis = stem, None
    if components is not None and components < inputs.shape[1]:
        with torch.no_grad():
            points = stem(inputs)
        basis = principal_basis(points, components)
        inputs, seen = points @ basis, CenteredFlatten(torch.zeros(basis.shape[1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if encoder is not None:
            shape = inputs.shape[1:] if basis is None else basis.shape[:1]
            seen = encoded(seen, encoder, shape, components=None if basis is None else basis.shape[1]).to(inputs.dtype)
        pieces = spread(classes, most)
        start = _started(seen, inputs[samples[pieces]], classes[pieces], poses)
        pieces = pieces.repeat_interleave(poses)
    found = refine_diagram(start, seen, inputs, labels, seed=seed, **options)
    if basis is None:
        return seen, found, pieces
    if isinstance(seen, EncodedStem):
        seen.encoders[0].lift(basis)  # type: ignore[operator]
        return EncodedStem(stem, *seen.encoders), found, pieces
    low = found.diagram
    lifted = PowerDiagram(low.slopes @ basis.double().T, low.intercepts, low.classes)
    return stem, dataclasses.replace(found, diagram=lifted), pieces


def _check_components(components: int, inputs: Tensor, encoder: str | None, options: Mapping[str, Any]) -> None:
    if components < 1:
        raise ValueError(f"components must be at least 1; got {components}")
    if inputs.ndim != 2 or encoder == "patches":
        raise ValueError(f"principal components belong to tables; the samples have shape {tuple(inputs.shape[1:])}")
    unfit = [name for name in ("box", "augment") if options.get(name) is not None]
    if unfit:
        raise ValueError(f"{' and '.join(unfit)} would apply to principal components, not to columns; leave it out")


def encoded(stem: nn.Module, encoder: str, shape: Sequence[int], *, components: int | None = None) -> EncodedStem:
    """A stem of inputs of this shape, and on it the encoder "dense" or "patches" (images), not trained.

    With components the first layer of a dense one takes so many coordinates, as `MaxMinEncoder.lift` expects.
    """
    if encoder == "patches":
        c, height, width = shape
        return EncodedStem(stem, *patch_encoders((c, height, width)))
    return EncodedStem(stem, *dense_encoders(math.prod(shape), components=components))


@torch.no_grad()
def principal_basis(points: Float[Tensor, "n d"], components: int) -> Float[Tensor, "d components"]:
    """Orthonormal directions in which the points vary most; fewer where they vary in fewer, at least one."""
    exact = (points - points.mean(0)).double()
    if exact.shape[0] < exact.shape[1]:
        _, size, rows = torch.linalg.svd(exact, full_matrices=False)
        directions = rows.T
    else:
        squares, directions = (part.flip(-1) for part in torch.linalg.eigh(exact.T @ exact))
        size = squares.clamp(min=0).sqrt()
    varied = max(1, int((size > NO_VARIANCE * size[0]).sum()))
    return directions[:, : min(components, varied)].to(points)


def spread(y: Int[Tensor, " n"], most: int) -> Int[Tensor, " pieces"]:
    """Indices of at most so many points, in random order, with the same share of every class, at least one."""
    share = min(1.0, most / len(y))
    chosen = []
    for c in range(int(y.amax()) + 1):
        own = (y == c).nonzero().squeeze(1)
        chosen.append(own[torch.randperm(len(own))[: max(1, round(share * len(own)))]])
    return torch.cat(chosen)


@torch.no_grad()
def _started(stem: nn.Module, inputs: Float[Tensor, "n ..."], classes: Int[Tensor, " n"], poses: int) -> LearnedDiagram:
    """Pieces at these samples; on an encoder, which is still to be trained, random ones of their classes."""
    points = stem(inputs)
    if isinstance(stem, EncodedStem):
        return LearnedDiagram.on_encoder(points.shape[1], classes)
    posed = Poses(stem.mean, USUAL_POSES[:poses]) if poses > 1 else None  # type: ignore[arg-type]
    return LearnedDiagram(points, classes, poses=posed)
