"""Refinement: another potential, trained for a certified radius on an orthogonal encoder of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.cip import BrenierPotential
from otad.defense import OTAD, GlobalInterpolation
from otad.nn import Backbone, EncodedStem, MaxMinEncoder
from otad.storage import SavedClassifier
from otad.train import Deformations, anchored_potential, refine
from otad.transport import TransportMap

__all__ = ["Refined", "fit_refined", "restored_refined"]

PIECES = 500
ENCODED = 256  # units of the encoder, at most
ANCHORS = 3.0  # length of the features that the pieces start with, in target radii


@dataclass(frozen=True)
class Refined:
    """A potential that interpolates nothing, and what it stands between.

    Attributes:
        stem: inputs to the points of the potential: the backbone's stem, then the encoder.
        potential: to be evaluated by its lower branch.
        head: features to logits.
        pieces: points of the transport map that the potential's pieces started from.
    """

    stem: EncodedStem
    potential: BrenierPotential
    head: nn.Linear
    pieces: Int[Tensor, " pieces"]

    def module(self) -> OTAD:
        # It has learned its lower branch; the upper one would be another function.
        return OTAD(self.stem, GlobalInterpolation(self.potential, "lower"), self.head)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What to save beside potential and pieces, by name."""
        return {"encoders": self.stem.encoders.state_dict(), "head": self.head.state_dict()}


def fit_refined(
    target_radius: float,
    backbone: Backbone,
    transport: TransportMap,
    inputs: Float[Tensor, "n ..."],
    labels: Int[Tensor, " n"],
    training: Mapping[str, Any],
) -> tuple[Refined, dict[str, Any]]:
    """Train on all samples, the encoder along with the potential, whose pieces start at some of the samples.

    Args:
        target_radius: see `refine`.
        backbone: trained.
        transport: read off it.
        inputs: training samples; images are deformed while training.
        labels: their class indices.
        training: see `training_options`.

    Returns:
        the parts, and what was reached: facts "before" and "after", one dict per epoch in "history".
    """
    target_radius = float(target_radius)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training["seed"])
        encoded, head = _untrained(backbone, transport)
        pieces = torch.randperm(len(transport.x))[:PIECES]
    with torch.no_grad():
        points = encoded(inputs[transport.samples[pieces]])
        start = anchored_potential(points, transport.y[pieces], head, ANCHORS * target_radius)
    augment = Deformations() if inputs.ndim == 4 else None
    found = refine(start, head, encoded, inputs, labels, target_radius=target_radius, augment=augment, **training)
    history = [vars(epoch).copy() for epoch in found.history]
    reached = {"before": found.before, "after": found.after, "history": history}
    return Refined(encoded, found.potential, head, pieces), reached


def restored_refined(backbone: Backbone, saved: SavedClassifier) -> Refined | None:
    """What was saved, None where nothing was refined; torch draws the weights that it is first filled with."""
    if saved.pieces is None or saved.potential is None:
        return None
    encoded, head = _untrained(backbone, saved.transport)
    encoded.encoders.load_state_dict(saved.modules["encoders"])
    head.load_state_dict(saved.modules["head"])
    return Refined(encoded, saved.potential, head, saved.pieces)


def _untrained(backbone: Backbone, transport: TransportMap) -> tuple[EncodedStem, nn.Linear]:
    """The backbone's stem with an encoder, and a head of orthonormal rows that is not trained."""
    d = transport.x.shape[1]
    width = min(ENCODED, max(2, d - d % 2))
    head = nn.Linear(width, backbone.head.out_features).requires_grad_(False)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return EncodedStem(backbone.stem, MaxMinEncoder(d, width)), head
