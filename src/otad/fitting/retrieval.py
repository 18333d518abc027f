"""The metric that chooses neighbours: an embedding that is trained, and the training points in it."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from otad.errors import OTADError
from otad.fitting.parameters import Parameters
from otad.nn.embedding import build_embedding
from otad.retrieval import Retrieval
from otad.train import fit_embedding

__all__ = ["fit_retrieval", "restored_retrieval", "retrieval_state"]

State = dict[str, Tensor]


def fit_retrieval(
    parameters: Parameters,
    inputs: Float[Tensor, "n ..."],
    labels: Int[Tensor, " n"],
    samples: Int[Tensor, " points"],
    training: Mapping[str, Any],
) -> tuple[Retrieval | None, list[dict[str, Any]]]:
    """Train the embedding and embed the points of the transport map.

    Args:
        parameters: of `OTADClassifier`.
        inputs: training samples.
        labels: their class indices.
        samples: the training sample at each point of the transport map.
        training: see `training_options`.

    Returns:
        the retrieval, None where neighbours are those in stem units; and one dict per epoch.

    Raises:
        OTADError: training diverged.
    """
    kind = parameters["retrieval"]
    if kind == "euclidean":
        return None, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training["seed"])
        embedding = build_embedding(kind, inputs.mean(0), parameters["embedding_width"])
    history = fit_embedding(embedding, inputs, labels, epochs=parameters["embedding_epochs"], **training)
    retrieval = Retrieval.of(embedding, inputs[samples])
    if not retrieval.points.isfinite().all():
        raise OTADError("training the embedding diverged: coordinates are not finite; scale the columns of X")
    return retrieval, [vars(epoch).copy() for epoch in history]


def retrieval_state(interpolation: nn.Module) -> dict[str, State]:
    """What to save of an interpolation's retrieval, by its name; nothing where it has none."""
    retrieval = interpolation.retrieval
    return {"retrieval": retrieval.state_dict()} if isinstance(retrieval, Retrieval) else {}


def restored_retrieval(
    parameters: Parameters, shape: tuple[int, ...], modules: Mapping[str, State]
) -> Retrieval | None:
    """What was saved, as `fit_retrieval` returned it; torch draws the weights that it is first filled with.

    Args:
        parameters: of `OTADClassifier`.
        shape: of one sample.
        modules: states by name, "retrieval" among them.
    """
    if parameters["retrieval"] == "euclidean":
        return None
    state = dict(modules["retrieval"])
    points = state.pop("points")
    embedding = build_embedding(parameters["retrieval"], torch.zeros(shape), parameters["embedding_width"])
    weights = {name.removeprefix("embedding."): value for name, value in state.items()}
    embedding.load_state_dict(weights, assign=True)  # in the precision of the file
    return Retrieval(embedding, points)
