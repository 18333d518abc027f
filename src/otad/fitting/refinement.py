"""Refinement: pieces, on an encoder of their own or not, trained for a certified radius."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import BrenierPotential, PowerDiagram
from otad.defense import OTAD, CellInterpolation, GlobalInterpolation, identity_head
from otad.fitting.parameters import Parameters
from otad.nn import Backbone, EncodedStem, MaxMinEncoder, dense_encoders, patch_encoders
from otad.storage import SavedClassifier
from otad.train import Deformations, LearnedDiagram, anchored_potential, refine, refine_diagram
from otad.transport import TransportMap

__all__ = ["Refined", "encoded", "fit_refined", "restored_refined", "spread", "started_cells", "usual_cells"]

PIECES = 500  # of a potential, at most
CELLS, CELLS_SHARE = 2000, 12  # of a diagram: so many, or one for so many samples where that is more
TABLE_CELLS, TABLE_SHARE = 10, 20  # of tables, which many pieces learn by heart: of a class in the mean, or a share
TABLE_TEMPERATURE = 0.5
ENCODED_CELLS, ENCODED_TEMPERATURE = 1, 1.7  # of a class, on an encoder; of images on one
ENCODED = 256  # units of the encoder, at most
ANCHORS = 3.0  # length of the features that the pieces of a potential start with, in target radii


@dataclass(frozen=True)
class Refined:
    """What was learned in place of an interpolated map, and what it stands between.

    Attributes:
        stem: inputs to points: the backbone's stem, and the encoder on it where there is one.
        learned: a potential, to be evaluated by its lower branch, or a power diagram.
        head: features, or scores, to logits.
        pieces: points of the transport map that the pieces started from; on an encoder only their classes did.
    """

    stem: nn.Module
    learned: BrenierPotential | PowerDiagram
    head: nn.Linear
    pieces: Int[Tensor, " pieces"]

    def module(self) -> OTAD:
        if isinstance(self.learned, PowerDiagram):
            return OTAD(self.stem, CellInterpolation(self.learned), self.head)
        # It has learned its lower branch; the upper one would be another function.
        return OTAD(self.stem, GlobalInterpolation(self.learned, "lower"), self.head)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What to save beside a potential and the pieces, by name."""
        found = {"encoders": self.stem.encoders.state_dict()} if isinstance(self.stem, EncodedStem) else {}
        if isinstance(self.learned, PowerDiagram):
            return found | {"diagram": self.learned.state_dict()}
        return found | {"head": self.head.state_dict()}


def fit_refined(
    parameters: Parameters,
    backbone: Backbone,
    transport: TransportMap,
    inputs: Float[Tensor, "n ..."],
    labels: Int[Tensor, " n"],
    training: Mapping[str, Any],
) -> tuple[Refined, dict[str, Any]]:
    """Train on all samples, the encoder along with the pieces, which start at some of the samples.

    Args:
        parameters: of `OTADClassifier`: target_radius, refinement, encoder and deform.
        backbone: trained.
        transport: read off it.
        inputs: training samples; images are deformed while training.
        labels: their class indices.
        training: see `training_options`.

    Returns:
        the parts, and what was reached: facts "before" and "after", one dict per epoch in "history".
    """
    radius, kind, encoder = float(parameters["target_radius"]), parameters["refinement"], parameters["encoder"]
    images, n_classes = inputs.ndim == 4, backbone.head.out_features
    few = max(TABLE_CELLS * n_classes, len(labels) // TABLE_SHARE)
    most = ENCODED_CELLS * n_classes if encoder else usual_cells(len(labels)) if images else few
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training["seed"])
        stem, head = _untrained(kind, encoder, backbone, inputs.shape[1:])
        pieces = spread(transport.y, PIECES if kind == "potential" else most)
        first, classes = inputs[transport.samples[pieces]], transport.y[pieces]
        cells = started_cells(stem, first, classes) if kind == "cells" else None
    deformed = images and parameters["deform"]
    options = {"target_radius": radius, "augment": Deformations() if deformed else None, **training}
    if cells is not None:
        box = (0.0, 1.0) if images and not encoder else None
        options["augment"] = Deformations.usual(inputs) if deformed else None
        if encoder or not images:
            options["temperature"] = ENCODED_TEMPERATURE if images else TABLE_TEMPERATURE
        found = refine_diagram(cells, stem, inputs, labels, box=box, **options)
        learned = found.diagram
    else:
        with torch.no_grad():
            start = anchored_potential(stem(first), classes, head, ANCHORS * radius)
        found = refine(start, head, stem, inputs, labels, **options)
        learned = found.potential
    history = [vars(epoch).copy() for epoch in found.history]
    return Refined(stem, learned, head, pieces), {"before": found.before, "after": found.after, "history": history}


def restored_refined(backbone: Backbone, saved: SavedClassifier) -> Refined | None:
    """What was saved, None where nothing was refined; torch draws the weights that it is first filled with."""
    if saved.pieces is None:
        return None
    kind, shape = "cells" if saved.potential is None else "potential", saved.learned["input_shape"]
    stem, head = _untrained(kind, saved.parameters.get("encoder"), backbone, shape)
    if isinstance(stem, EncodedStem):
        if not any(name.endswith("free") for name in saved.modules["encoders"]):  # folders of before hold these
            stem.settle()
        stem.encoders.load_state_dict(saved.modules["encoders"])
    if saved.potential is not None:
        head.load_state_dict(saved.modules["head"])
        return Refined(stem, saved.potential, head, saved.pieces)
    parts = saved.modules["diagram"]
    diagram = PowerDiagram(parts["slopes"], parts["intercepts"], parts["classes"])
    expected = (len(saved.pieces), _dimension(stem, shape))
    if diagram.slopes.shape != expected or diagram.n_classes != head.out_features:
        raise ValueError("the diagram does not fit the other parts")
    return Refined(stem, diagram, head, saved.pieces)


def encoded(stem: nn.Module, encoder: str, shape: Sequence[int]) -> EncodedStem:
    """A stem of inputs of this shape, and on it the encoder "dense" or "patches" (images), not trained."""
    if encoder == "patches":
        c, height, width = shape
        return EncodedStem(stem, *patch_encoders((c, height, width)))
    return EncodedStem(stem, *dense_encoders(math.prod(shape)))


@torch.no_grad()
def started_cells(stem: nn.Module, inputs: Float[Tensor, "n ..."], classes: Int[Tensor, " n"]) -> LearnedDiagram:
    """Pieces at these samples; on an encoder, which is still to be trained, random ones of their classes."""
    points = stem(inputs)
    if isinstance(stem, EncodedStem):
        return LearnedDiagram.on_encoder(points.shape[1], classes)
    return LearnedDiagram(points, classes)


def _dimension(stem: nn.Module, shape: Sequence[int]) -> int:
    with torch.no_grad():
        return stem(torch.zeros(1, *shape)).shape[1]


def _untrained(kind: str, encoder: str | None, backbone: Backbone, shape: Sequence[int]) -> tuple[nn.Module, nn.Linear]:
    """Stem and head: of cells the identity as head; of a potential orthonormal rows, not to be trained."""
    d, classes = _dimension(backbone.stem, shape), backbone.head.out_features
    if kind == "cells":
        return backbone.stem if encoder is None else encoded(backbone.stem, encoder, shape), identity_head(classes)
    width = min(ENCODED, max(2, d - d % 2))
    head = nn.Linear(width, classes).requires_grad_(False)
    nn.init.zeros_(head.bias)
    nn.init.orthogonal_(head.weight)
    return EncodedStem(backbone.stem, MaxMinEncoder(d, width)), head


def usual_cells(n: int) -> int:
    """Pieces of a diagram trained on n images, at most."""
    return max(CELLS, n // CELLS_SHARE)


def spread(y: Int[Tensor, " n"], most: int) -> Int[Tensor, " pieces"]:
    """Indices of at most so many points, in random order, with the same share of every class, at least one."""
    share = min(1.0, most / len(y))
    chosen = []
    for c in range(int(y.amax()) + 1):
        own = (y == c).nonzero().squeeze(1)
        chosen.append(own[torch.randperm(len(own))[: max(1, round(share * len(own)))]])
    return torch.cat(chosen)
