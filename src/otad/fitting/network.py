"""CIP-net in place of the solver of a defended classifier."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from otad.defense import OTAD, NeighborhoodInterpolation, NetworkInterpolation
from otad.fitting.parameters import Parameters
from otad.nn.cip_net import CIPNet, Imitation
from otad.train.cip_net import compare, imitate

__all__ = ["fit_network", "measured_network", "network_state", "restored_network"]

logger = logging.getLogger(__name__)

TOLD = "new samples"  # the queries whose error a network tells with every answer
AT_ONCE = 256


def fit_network(
    parameters: Parameters, module: OTAD, training: Mapping[str, Any]
) -> tuple[OTAD, dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Let a network imitate the module's solver.

    What it learns from is drawn in stem space; a learned or robust retrieval embeds the inputs of these points, by
    `stem.inverse`, so that their neighbours are chosen as those of any input are.

    Args:
        parameters: of `OTADClassifier`.
        module: with a `NeighborhoodInterpolation`.
        training: see `training_options`.

    Returns:
        the module with the network, its imitation for each kind of query, and one dict per epoch.
    """
    solver = module.interpolation
    assert isinstance(solver, NeighborhoodInterpolation)
    inverse: Callable[[Tensor], Tensor] = module.stem.inverse  # type: ignore[assignment]
    interpolation, found, history = imitate(
        solver,
        module.head,
        coordinates=lambda points: module.coordinates(inverse(points)),
        width=parameters["network_width"],
        layers=parameters["network_layers"],
        heads=parameters["network_heads"],
        n_problems=parameters["network_problems"],
        **training,
    )
    for queries, imitation in found.items():
        if imitation.near:
            logger.info("CIP-net on %s: %s", queries, imitation)
        else:
            logger.warning("the network is far from the exact solution on %s: %s", queries, imitation)
    error = {queries: imitation.to_dict() for queries, imitation in found.items()}
    return OTAD(module.stem, interpolation, module.head), error, [vars(epoch).copy() for epoch in history]


def measured_network(module: OTAD, inputs: Float[Tensor, "n ..."]) -> dict[str, float]:
    """How near the module's network comes to its solver at these inputs, see `Imitation`.

    Raises:
        ValueError: the module has no network.
    """
    interpolation = module.interpolation
    if not isinstance(interpolation, NetworkInterpolation):
        raise ValueError("there is no network to measure; it takes interpolation='network'")
    solver = interpolation.solver

    def query(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = module.stem(part).double()
        return x, *solver.neighbors(x, module.coordinates(part))[:2]

    return compare(solver, interpolation.net, module.head, map(query, inputs.split(AT_ONCE))).to_dict()


def network_state(interpolation: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What to save of an interpolation's network, by its name; nothing where it has none."""
    return {"network": interpolation.net.state_dict()} if isinstance(interpolation, NetworkInterpolation) else {}


def restored_network(
    parameters: Parameters,
    module: OTAD,
    error: Mapping[str, Mapping[str, float]],
    modules: Mapping[str, dict[str, Tensor]],
) -> OTAD:
    """The module with the network that was saved; torch draws the weights that it is first filled with.

    Args:
        parameters: of `OTADClassifier`.
        module: with a `NeighborhoodInterpolation`.
        error: what `fit_network` found.
        modules: states by name, "network" among them.
    """
    solver = module.interpolation
    assert isinstance(solver, NeighborhoodInterpolation)
    net = CIPNet(parameters["network_width"], parameters["network_layers"], parameters["network_heads"])
    net.load_state_dict(modules["network"])
    interpolation = NetworkInterpolation(solver, net, Imitation(**error[TOLD]))  # type: ignore[arg-type]
    return OTAD(module.stem, interpolation, module.head)
