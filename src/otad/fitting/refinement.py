"""Refinement: pieces, on an encoder of their own or not, trained for a certified radius."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import BrenierPotential, PowerDiagram
from otad.defense import OTAD, CellInterpolation, GlobalInterpolation, identity_head
from otad.errors import DataError
from otad.fitting.cells import encoded, spread, train_cells
from otad.fitting.parameters import Parameters
from otad.nn import Backbone, EncodedStem, MaxMinEncoder
from otad.storage import SavedClassifier
from otad.train import USUAL_POSES, Deformations, DiagramRefinement, Noise, Refinement, anchored_potential, refine
from otad.transport import TransportMap

__all__ = ["Refined", "fit_refined", "restored_refined", "usual_cells"]

PIECES = 500  # of a potential, at most
CELLS, CELLS_SHARE = 2000, 12  # of a diagram: so many, or one for so many samples where that is more
POSED_CELLS, POSED_SHARE = 400, 24  # likewise, where each has poses
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
        parameters: of `OTADClassifier`: target_radius, refinement, encoder, components, deform and
            refinement_options.
        backbone: trained.
        transport: read off it.
        inputs: training samples; images are deformed while training.
        labels: their class indices.
        training: see `training_options`.

    Returns:
        the parts, and what was reached: facts "before" and "after", one dict per epoch in "history".
    """
    cells = parameters["refinement"] == "cells"
    fit = _fit_cells if cells else _fit_potential
    refined, found = fit(parameters, backbone, transport, inputs, labels, training)
    history = [vars(epoch).copy() for epoch in found.history]
    return refined, {"before": found.before, "after": found.after, "history": history}


def _fit_cells(
    parameters: Parameters,
    backbone: Backbone,
    transport: TransportMap,
    inputs: Tensor,
    labels: Tensor,
    training: Mapping[str, Any],
) -> tuple[Refined, DiagramRefinement]:
    images, encoder, classes = inputs.ndim == 4, parameters["encoder"], backbone.head.out_features
    if int(torch.bincount(transport.y, minlength=classes).min()) == 0:
        raise DataError(
            "a class has no point of its own: all of its samples are twins of more samples of other classes"
        )
    grey = images and inputs.shape[1] == 1
    options = dict(parameters["refinement_options"] or {})
    share, noise = options.pop("pieces", None), options.pop("noise", None)
    if share is None and encoder:
        share = ENCODED_CELLS
    poses = options.pop("poses", len(USUAL_POSES) if grey and parameters["deform"] and not encoder else 1)
    usual = usual_cells(len(labels), poses) if images else max(TABLE_CELLS * classes, len(labels) // TABLE_SHARE)
    if encoder or not images:
        options.setdefault("temperature", ENCODED_TEMPERATURE if images else TABLE_TEMPERATURE)
    augment = Deformations.usual(inputs) if images and parameters["deform"] else None
    stem, found, pieces = train_cells(
        backbone.stem,
        inputs,
        labels,
        transport.samples,
        transport.y,
        encoder=encoder,
        components=parameters["components"],
        poses=poses,
        target_radius=float(parameters["target_radius"]),
        box=(0.0, 1.0) if images and not encoder else None,
        most=usual if share is None else round(share * classes),
        augment=Noise(noise) if noise else augment,
        **training,
        **options,
    )
    return Refined(stem, found.diagram, identity_head(classes), pieces), found


def _fit_potential(
    parameters: Parameters,
    backbone: Backbone,
    transport: TransportMap,
    inputs: Tensor,
    labels: Tensor,
    training: Mapping[str, Any],
) -> tuple[Refined, Refinement]:
    radius, deformed = float(parameters["target_radius"]), inputs.ndim == 4 and parameters["deform"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training["seed"])
        stem, head = _encoded_by_one(backbone, inputs.shape[1:])
        pieces = spread(transport.y, PIECES)
    with torch.no_grad():
        start = anchored_potential(stem(inputs[transport.samples[pieces]]), transport.y[pieces], head, ANCHORS * radius)
    augment = Deformations() if deformed else None
    found = refine(start, head, stem, inputs, labels, target_radius=radius, augment=augment, **training)
    return Refined(stem, found.potential, found.head, pieces), found


def restored_refined(backbone: Backbone, saved: SavedClassifier) -> Refined | None:
    """What was saved, None where nothing was refined; torch draws the weights that it is first filled with."""
    if saved.pieces is None:
        return None
    shape, classes, encoder = saved.learned["input_shape"], backbone.head.out_features, saved.parameters.get("encoder")
    if saved.potential is not None:
        stem, head = _encoded_by_one(backbone, shape)
        _load_encoders(stem, saved.modules)
        head.load_state_dict(saved.modules["head"])
        return Refined(stem, saved.potential, head, saved.pieces)
    stem = backbone.stem
    if encoder is not None:
        stem = encoded(backbone.stem, encoder, shape)
        _load_encoders(stem, saved.modules)
    parts = saved.modules["diagram"]
    diagram = PowerDiagram(parts["slopes"], parts["intercepts"], parts["classes"])
    expected = (len(saved.pieces), _dimension(stem, shape))
    if diagram.slopes.shape != expected or diagram.n_classes != classes:
        raise ValueError("the diagram does not fit the other parts")
    return Refined(stem, diagram, identity_head(classes), saved.pieces)


def _load_encoders(stem: EncodedStem, modules: Mapping[str, Any]) -> None:
    if not any(name.endswith("free") for name in modules["encoders"]):  # folders of before hold these
        stem.settle()
    stem.encoders.load_state_dict(modules["encoders"])


def _dimension(stem: nn.Module, shape: Sequence[int]) -> int:
    with torch.no_grad():
        return stem(torch.zeros(1, *shape)).shape[1]


def _encoded_by_one(backbone: Backbone, shape: Sequence[int]) -> tuple[EncodedStem, nn.Linear]:
    """Of a potential: the stem with one orthogonal layer, and orthonormal rows as head, not to be trained."""
    d = _dimension(backbone.stem, shape)
    width = min(ENCODED, max(2, d - d % 2))
    head = nn.Linear(width, backbone.head.out_features).requires_grad_(False)
    nn.init.zeros_(head.bias)
    nn.init.orthogonal_(head.weight)
    return EncodedStem(backbone.stem, MaxMinEncoder(d, width)), head


def usual_cells(n: int, poses: int = 1) -> int:
    """Pieces of a diagram trained on n images, at most, each counted once where it has several poses."""
    least, share = (POSED_CELLS, POSED_SHARE) if poses > 1 else (CELLS, CELLS_SHARE)
    return max(least, n // share)
