"""The network, and the transport map that it leaves behind."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.errors import OTADError
from otad.fitting.parameters import Parameters
from otad.nn import Backbone, build_backbone
from otad.train import fit_backbone
from otad.transport import TransportMap, read_transport_map

__all__ = ["restored_backbone", "train_backbone", "transport_of"]

logger = logging.getLogger(__name__)

LEAST_EPOCHS, LEAST_STEPS = 12, 500


def train_backbone(
    parameters: Parameters,
    inputs: Float[Tensor, "n ..."],
    labels: Int[Tensor, " n"],
    n_classes: int,
    training: Mapping[str, Any],
) -> tuple[Backbone, list[dict[str, Any]]]:
    """Build and train it.

    Args:
        parameters: of `OTADClassifier`.
        inputs: training samples.
        labels: their class indices.
        n_classes: outputs of the head.
        training: see `training_options`.

    Returns:
        the backbone, and one dict per epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training["seed"])
        backbone = _untrained(parameters, inputs.mean(0), n_classes)
    steps = math.ceil(len(inputs) / parameters["batch_size"])
    history = fit_backbone(
        backbone,
        inputs,
        labels,
        alpha=parameters["alpha"],
        margin=parameters["margin"],
        epochs=parameters["epochs"] or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / steps)),
        batch_size=parameters["batch_size"],
        learning_rate=parameters["learning_rate"],
        **training,
    )
    return backbone, [vars(epoch).copy() for epoch in history]


def transport_of(backbone: Backbone, inputs: Float[Tensor, "n ..."], labels: Int[Tensor, " n"]) -> TransportMap:
    """The transport map, checked; see `read_transport_map`.

    Raises:
        OTADError: training diverged.
    """
    transport = read_transport_map(backbone, inputs, labels)
    if not transport.z.isfinite().all():
        raise OTADError("training diverged: features are not finite; lower learning_rate or scale the columns of X")
    if transport.conflicts:
        logger.warning("%d points carry samples of different classes", transport.conflicts)
    return transport


def restored_backbone(
    parameters: Parameters, shape: tuple[int, ...], n_classes: int, modules: Mapping[str, dict[str, Tensor]]
) -> Backbone:
    """What was saved; torch draws the weights that it is first filled with.

    Args:
        parameters: of `OTADClassifier`.
        shape: of one sample.
        n_classes: outputs of the head.
        modules: states by name, "backbone" among them.
    """
    backbone = _untrained(parameters, torch.zeros(shape), n_classes)
    backbone.load_state_dict(modules["backbone"])
    return backbone.eval().requires_grad_(False)


def _untrained(parameters: Parameters, mean: Float[Tensor, "..."], n_classes: int) -> Backbone:
    sizes = {"n_blocks": parameters["n_blocks"], "width": parameters["width"]}
    return build_backbone(parameters["backbone"], mean, n_classes, **sizes, options=parameters["backbone_options"])
